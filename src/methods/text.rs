//! Prompts to what every sampling step reads: the host's side of the programs `text` and `condition`.

use crate::Result;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::methods::pipeline::Pipeline;
use crate::methods::programs::{Sizes, buffer, rows};
use crate::sampler::Schedule;

/// A prompt's states on the host: context `[T, D]`, and for SDXL the pooled projection `[P]` (else empty).
#[derive(Clone, Debug)]
pub struct Text {
    pub context: Vec<f32>,
    pub pooled: Vec<f32>,
}

/// Encodes one prompt by the loaded program `text`.
pub(super) fn encode(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    program: ProgramId,
    prompt: &str,
) -> Result<Text> {
    let config = &pipeline.config;
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
    executor.run(program)?;
    let mut text = Text { context: vec![0.0; pipeline.tokens() * config.unet.context_width], pooled: vec![] };
    executor.read(buffer::TEXT_CONTEXT, DataMut::F32(&mut text.context))?;
    if let (Some(_), Some(width)) = (encoded.get(1), config.text.last().and_then(|tower| tower.projection)) {
        text.pooled = vec![0.0; width];
        executor.read(buffer::TEXT_POOLED, DataMut::F32(&mut text.pooled))?;
    }
    Ok(text)
}

/// The states of all rows side by side: context `[R, T, D]` and pooled `[R, P]`.
pub(super) fn stacked(texts: &[Text]) -> Text {
    let all = |part: fn(&Text) -> &[f32]| texts.iter().flat_map(part).copied().collect();
    Text { context: all(|text| &text.context), pooled: all(|text| &text.pooled) }
}

/// SDXL's size numbers of images that are neither cropped nor scaled, `[rows, 6]` (see [`crate::models::unet::Added`]).
pub(super) fn size_ids(pipeline: &Pipeline, sizes: Sizes, rows: usize) -> Vec<f32> {
    let factor = pipeline.config.vae.factor();
    let (height, width) = ((sizes.height * factor) as f32, (sizes.width * factor) as f32);
    [height, width, 0.0, 0.0, height, width].repeat(rows)
}

/// Computes what all steps share by the loaded program `condition`, from context and pooled states of all rows; a model without
/// added conditions reads no `pooled`.
pub(super) fn condition(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    program: ProgramId,
    sizes: Sizes,
    schedule: &Schedule,
    [context, pooled]: [Data<'_>; 2],
) -> Result<()> {
    executor.write(buffer::CONTEXT, context)?;
    if pipeline.config.unet.added.is_some() {
        executor.write(buffer::POOLED, pooled)?;
        let size_ids = size_ids(pipeline, sizes, rows(sizes, schedule));
        executor.write(buffer::SIZE_IDS, Data::F32(&size_ids))?;
    }
    let timesteps: Vec<f64> = schedule.steps.iter().map(|step| step.timestep).collect();
    executor.write(buffer::TIMESTEPS, Data::F64(&timesteps))?;
    executor.run(program)
}
