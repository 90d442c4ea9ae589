//! Prompts to what every sampling step reads: the host's side of the programs `text` and `condition`, whose states stay on the device.

use crate::Result;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::pipeline::Pipeline;
use crate::pipeline::programs::{Sizes, buffer, pooled_width, rows};
use crate::sampler::Schedule;
use std::ops::Range;

/// A prompt's states on the host: context `[T, D]`, and for SDXL the pooled projection `[P]` (else
/// empty).
#[derive(Clone, Debug)]
pub struct Text {
    pub context: Vec<f32>,
    pub pooled: Vec<f32>,
}

/// Buffers of text states, a row per prompt.
#[derive(Clone, Copy)]
pub(crate) struct States<'a> {
    pub context: &'a str,
    /// Read by SDXL's UNets alone.
    pub pooled: Option<&'a str>,
}

/// What the program `text` makes: one row.
pub(crate) const ENCODED: States<'_> = States { context: buffer::TEXT_CONTEXT, pooled: Some(buffer::TEXT_POOLED) };
/// What the program `condition` reads: all rows of the batch.
pub(crate) const TOLD: States<'_> = States { context: buffer::CONTEXT, pooled: Some(buffer::POOLED) };

/// Numbers of a row: context, and pooled text where the UNet takes it.
fn widths(pipeline: &Pipeline) -> Result<(usize, Option<usize>)> {
    Ok((pipeline.tokens() * pipeline.config.unet.context_width, pooled_width(pipeline)?))
}

/// Copies one row on the device; the pooled text where both sides have one.
pub(crate) fn copy(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    (from, from_row): (States<'_>, usize),
    (to, to_row): (States<'_>, usize),
) -> Result<()> {
    let (context, pooled) = widths(pipeline)?;
    executor.copy((from.context, from_row * context), (to.context, to_row * context), context)?;
    match (pooled, from.pooled, to.pooled) {
        (Some(width), Some(from), Some(to)) => executor.copy((from, from_row * width), (to, to_row * width), width),
        (_, _, _) => Ok(()),
    }
}

/// Reads rows to the host.
pub(crate) fn read(
    pipeline: &Pipeline,
    executor: &dyn Executor,
    states: States<'_>,
    total: usize,
    rows: Range<usize>,
) -> Result<Vec<Text>> {
    let (width, pooled_width) = widths(pipeline)?;
    let (mut context, mut pooled) = (vec![0.0; total * width], vec![0.0; total * pooled_width.unwrap_or(0)]);
    executor.read(states.context, DataMut::F32(&mut context))?;
    if let (Some(_), Some(name)) = (pooled_width, states.pooled) {
        executor.read(name, DataMut::F32(&mut pooled))?;
    }
    let own =
        |values: &[f32], row: usize| values[row * values.len() / total..(row + 1) * values.len() / total].to_vec();
    Ok(rows.map(|row| Text { context: own(&context, row), pooled: own(&pooled, row) }).collect())
}

/// Puts one prompt's states where the program `text` leaves them.
pub(crate) fn write(pipeline: &Pipeline, executor: &mut dyn Executor, text: &Text) -> Result<()> {
    executor.write(buffer::TEXT_CONTEXT, Data::F32(&text.context))?;
    match widths(pipeline)?.1 {
        Some(_) => executor.write(buffer::TEXT_POOLED, Data::F32(&text.pooled)),
        None => Ok(()),
    }
}

/// Zeros in that place: what SDXL tells the unconditional branch without a negative prompt.
pub(crate) fn write_nothing(pipeline: &Pipeline, executor: &mut dyn Executor) -> Result<()> {
    let (context, pooled) = widths(pipeline)?;
    let nothing = Text { context: vec![0.0; context], pooled: vec![0.0; pooled.unwrap_or(0)] };
    write(pipeline, executor, &nothing)
}

/// Encodes one prompt by the loaded program `text`; its states are then in [`ENCODED`].
pub(crate) fn encode(pipeline: &Pipeline, executor: &mut dyn Executor, program: ProgramId, prompt: &str) -> Result<()> {
    let encoded = pipeline.tokenize(prompt)?;
    for (name, tokens) in buffer::IDS.iter().zip(&encoded) {
        executor.write(name, Data::I32(&tokens.ids))?;
    }
    if let Some(tokens) = encoded.get(1) {
        executor.write(buffer::EOS, Data::I32(&[tokens.eos as i32]))?;
    }
    if !pipeline.learned.is_empty() {
        for (tower, name) in buffer::LEARNED.iter().take(encoded.len()).enumerate() {
            let rows: Vec<f32> = pipeline.learned.iter().flat_map(|token| &token.embeddings[tower]).copied().collect();
            executor.write(name, Data::F32(&rows))?;
        }
    }
    executor.run(program)
}

/// The states of all rows side by side: context `[R, T, D]` and pooled `[R, P]`.
pub(crate) fn stacked(texts: &[Text]) -> Text {
    let all = |part: fn(&Text) -> &[f32]| texts.iter().flat_map(part).copied().collect();
    Text { context: all(|text| &text.context), pooled: all(|text| &text.pooled) }
}

/// SDXL's size numbers of images that are neither cropped nor scaled, `[rows, 6]` (see [`crate::models::unet::Added`]).
pub(crate) fn size_ids(pipeline: &Pipeline, sizes: Sizes, rows: usize) -> Vec<f32> {
    let factor = pipeline.config.vae.factor();
    let (height, width) = ((sizes.height * factor) as f32, (sizes.width * factor) as f32);
    [height, width, 0.0, 0.0, height, width].repeat(rows)
}

/// Computes what all steps share by the loaded program `condition`, from the states in [`TOLD`].
pub(crate) fn condition(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    program: ProgramId,
    sizes: Sizes,
    schedule: &Schedule,
) -> Result<()> {
    if pipeline.config.unet.added.is_some() {
        let size_ids = size_ids(pipeline, sizes, rows(sizes, schedule));
        executor.write(buffer::SIZE_IDS, Data::F32(&size_ids))?;
    }
    let timesteps: Vec<f64> = schedule.steps.iter().map(|step| step.timestep).collect();
    executor.write(buffer::TIMESTEPS, Data::F64(&timesteps))?;
    executor.run(program)
}
