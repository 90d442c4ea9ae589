//! The programs of a text-to-image run: text, condition (once per batch), step (once per sampling step), decode (once per image).

use crate::exec::{Data, Executor};
use crate::models::clip_text::{self, Prompt};
use crate::models::unet::{Added, Unet};
use crate::models::vae;
use crate::pipeline::Pipeline;
use crate::plan::{Footprint, Planned, plan};
use crate::program::{Builder, DType, Origin, Program, Rows, ValueId};
use crate::sampler::{LATENTS, Needs, Schedule, append_update};
use crate::{Error, Result};

/// The sizes a set of programs is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: usize,
    /// Latent height and width.
    pub height: usize,
    pub width: usize,
    /// Prompt tokens.
    pub tokens: usize,
}

/// The planned programs of one batch size.
pub struct Programs {
    pub text: Planned,
    pub condition: Planned,
    pub step: Planned,
    pub decode: Planned,
}

/// Named buffers by which the programs and the host exchange data.
pub mod buffer {
    /// Token ids per tower, `[1, T]`.
    pub const IDS: [&str; 2] = ["text.ids", "text.ids_2"];
    /// Rows of the learned tokens per tower, `[R, C]`.
    pub const LEARNED: [&str; 2] = ["text.learned", "text.learned_2"];
    /// End-of-text position in the second tower's ids, `[1]`.
    pub const EOS: &str = "text.eos_2";
    pub const TEXT_CONTEXT: &str = "text.context";
    pub const TEXT_POOLED: &str = "text.pooled";
    /// Rows of the batch (twice with guidance: unconditional first), `[R, T, D]`.
    pub const CONTEXT: &str = "context";
    pub const POOLED: &str = "pooled";
    pub const SIZE_IDS: &str = "size_ids";
    pub const TIMESTEPS: &str = "timesteps";
    pub const KV: &str = "kv";
    pub const TIME: &str = "time";
    /// Index of the sampling step, `[1]`.
    pub const STEP: &str = "step";
    pub const DECODE_LATENTS: &str = "decode.latents";
    pub const IMAGE: &str = "image";
}

/// The buffer that holds the gradient to a buffer.
pub fn gradient_of(name: &str) -> String {
    format!("d.{name}")
}

/// Names of the buffers that a program reads.
pub fn input_names(program: &Program) -> impl Iterator<Item = String> {
    program.inputs.iter().filter_map(|id| match &program.value(*id).origin {
        Origin::Input(name) => Some(name.clone()),
        Origin::Weight(_) | Origin::Op(_) => None,
    })
}

impl Programs {
    pub fn plan(
        pipeline: &Pipeline,
        executor: &dyn Executor,
        dtype: DType,
        sizes: Sizes,
        schedule: &Schedule,
    ) -> Result<Programs> {
        let plan = |program: Program| plan(program, |program, node| executor.workspace(program, node));
        Ok(Programs {
            text: plan(text(pipeline, dtype)?),
            condition: plan(condition(pipeline, dtype, sizes, schedule)?),
            step: plan(step(pipeline, dtype, sizes, schedule)?),
            decode: plan(decode(pipeline, dtype, sizes)?),
        })
    }

    pub fn all(&self) -> [&Planned; 4] {
        [&self.text, &self.condition, &self.step, &self.decode]
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(&self.all())
    }
}

/// Rows the UNet sees per batch: two per image under guidance.
pub fn rows(sizes: Sizes, schedule: &Schedule) -> usize {
    if schedule.needs.uncond { 2 * sizes.batch } else { sizes.batch }
}

/// One prompt's token ids → its text states.
pub fn text(pipeline: &Pipeline, dtype: DType) -> Result<Program> {
    let mut b = Builder::new("text", dtype);
    let towers = &pipeline.config.text;
    let tokens = pipeline.tokens();
    let ids: Vec<_> = buffer::IDS.iter().take(towers.len()).map(|name| b.input_i32(*name, &[1, tokens])).collect();
    let pool_at = (towers.len() > 1).then(|| b.input_i32(buffer::EOS, &[1]));
    let rows: usize = pipeline.learned.iter().map(|token| token.rows).sum();
    let tables = buffer::LEARNED.iter().zip(towers).filter(|_| rows > 0);
    let learnable: Vec<_> = tables.map(|(name, tower)| b.accumulator_input(*name, &[rows, tower.width])).collect();
    let prompt = Prompt { ids: &ids, learnable: &learnable, pool_at, past: None };
    let states = clip_text::encode(&mut b, towers, &prompt);
    b.output(buffer::TEXT_CONTEXT, states.context);
    if let Some(pooled) = states.pooled {
        b.output(buffer::TEXT_POOLED, pooled);
    }
    b.finish()
}

/// Most pixels of a batch: no machine holds more, and no size of a program overflows below.
const MOST_PIXELS: usize = 1 << 34;

/// Refuses batches beyond all machines.
pub fn check_pixels(width: usize, height: usize, batch: usize) -> Result<()> {
    match width.checked_mul(height).and_then(|pixels| pixels.checked_mul(batch)) {
        Some(pixels) if pixels <= MOST_PIXELS => Ok(()),
        Some(_) | None => Err(Error::Memory(format!(
            "{batch} images of {width}x{height} at once are more than 2^34 pixels; a smaller --batch or --size needs less"
        ))),
    }
}

/// Width of the pooled text that SDXL's UNets are conditioned on; `None` for the others.
pub fn pooled_width(pipeline: &Pipeline) -> Result<Option<usize>> {
    let Some(added) = &pipeline.config.unet.added else { return Ok(None) };
    let width = added.input_width.checked_sub(6 * added.time_dim);
    width.map(Some).ok_or_else(|| Error::Model("the UNet's added conditions leave no room for the pooled text".into()))
}

/// Text states of all rows and the timesteps of all steps → what every step reads.
pub fn condition(pipeline: &Pipeline, dtype: DType, sizes: Sizes, schedule: &Schedule) -> Result<Program> {
    let config = &pipeline.config;
    let (unet, rows) = (Unet::new(&config.unet), rows(sizes, schedule));
    let mut b = Builder::new("condition", dtype);
    let context = b.input(buffer::CONTEXT, &[rows, sizes.tokens, config.unet.context_width]);
    let timesteps = b.accumulator_input(buffer::TIMESTEPS, &[schedule.steps.len()]);
    let added = pooled_width(pipeline)?.map(|width| Added {
        pooled: b.input(buffer::POOLED, &[rows, width]),
        size_ids: b.accumulator_input(buffer::SIZE_IDS, &[rows, 6]),
    });
    let kv = unet.context_kv(&mut b, context);
    let time = unet.time(&mut b, timesteps, added);
    b.output(buffer::KV, kv);
    b.output(buffer::TIME, time);
    b.finish()
}

/// What every step of a run reads: keys and values of the text, time projections of all steps.
#[derive(Clone, Copy)]
pub struct Conditions {
    pub kv: ValueId,
    pub time: ValueId,
}

impl Conditions {
    /// As named buffers.
    pub fn inputs(b: &mut Builder, unet: &Unet, sizes: Sizes, schedule: &Schedule, added: bool) -> Conditions {
        let (rows, steps) = (rows(sizes, schedule), schedule.steps.len());
        let kv = b.input(buffer::KV, &[rows, sizes.tokens, unet.kv_width()]);
        let time = if added { vec![steps, rows, unet.time_width()] } else { vec![steps, unet.time_width()] };
        Conditions { kv, time: b.input(buffer::TIME, &time) }
    }
}

/// The UNet at step `index [1]`: its predictions with and, under guidance, without the prompt, as rows of what it makes of both.
pub fn predict(
    b: &mut Builder,
    unet: &Unet,
    needs: Needs,
    latents: ValueId,
    conditions: Conditions,
    index: ValueId,
) -> (Rows, Option<Rows>) {
    let time = b.select(conditions.time, index);
    if !needs.uncond {
        return (unet.forward(b, latents, conditions.kv, time).into(), None);
    }
    let batch = b.shape(latents)[0];
    let x = b.repeat(latents, 2);
    let value = unet.forward(b, x, conditions.kv, time);
    (Rows { value, at: batch }, Some(Rows { value, at: 0 }))
}

/// One sampling step: UNet, guidance, update; latents in, latents out.
pub fn step(pipeline: &Pipeline, dtype: DType, sizes: Sizes, schedule: &Schedule) -> Result<Program> {
    let config = &pipeline.config;
    let unet = Unet::new(&config.unet);
    let mut b = Builder::new("step", dtype);
    let latents = b.accumulator_input(LATENTS, &[sizes.batch, sizes.height, sizes.width, config.unet.in_channels]);
    let conditions = Conditions::inputs(&mut b, &unet, sizes, schedule, config.unet.added.is_some());
    let index = b.input_i32(buffer::STEP, &[1]);
    let (conditional, unconditional) = predict(&mut b, &unet, schedule.needs, latents, conditions, index);
    append_update(&mut b, schedule.needs, latents, conditional, unconditional);
    b.finish()
}

/// Writes what step `index` of a run reads besides its state and its noise: its number and coefficients.
pub fn write_step(executor: &mut dyn Executor, schedule: &Schedule, index: usize) -> Result<()> {
    executor.write(buffer::STEP, Data::I32(&[index as i32]))?;
    schedule.steps[index].buffers().try_for_each(|(name, values)| executor.write(name, Data::F64(values)))
}

/// One image's latents → its pixels.
pub fn decode(pipeline: &Pipeline, dtype: DType, sizes: Sizes) -> Result<Program> {
    let config = &pipeline.config.vae;
    let mut b = Builder::new("decode", config.dtype(dtype));
    let latents = b.accumulator_input(buffer::DECODE_LATENTS, &[1, sizes.height, sizes.width, config.latent_channels]);
    let image = vae::decode(&mut b, config, latents);
    b.output(buffer::IMAGE, image);
    b.finish()
}
