//! What an objective can use of a run: latents, and ops to predict, estimate, renoise, decode and take image features.

use super::Loss;
use crate::models::config::ClipImageConfig;
use crate::models::preprocess::Preprocess;
use crate::models::unet::{Added, Unet};
use crate::models::vae;
use crate::optimize::variable::States;
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::Branch;
use crate::pipeline::programs::{self, Sizes, pooled_width};
use crate::program::{Builder, Scalar, ValueId};
use crate::rewards::image_features;
use crate::sampler::{LATENTS, Level};
use crate::weights::Component;

/// The two noise levels at which an objective may ask the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// That of the latents.
    T1,
    /// That of [`StepContext::renoise`].
    T2,
}

/// What a prediction is conditioned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Condition {
    /// The prompt as the variable has it.
    Optimized,
    /// The prompt as the user wrote it.
    Prompt,
    /// The unconditional branch, as the variable has it.
    Null,
}

/// Timesteps and levels of [`At::T1`] and [`At::T2`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevels {
    pub t1: f64,
    pub level1: Level,
    pub t2: f64,
    pub level2: Level,
}

/// The network's output for `x`: read by [`StepContext::estimate`] and [`StepContext::noise`].
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    x: ValueId,
    output: ValueId,
    at: At,
}

/// Named buffers of a program that holds an objective; in a chain with [`Place::suffix`] behind them.
pub(crate) mod buffer {
    /// Keys and values, and pooled text, of what is not optimized.
    pub const PROMPT: [&str; 2] = ["prompt.kv", "prompt.pooled"];
    pub const NULL: [&str; 2] = ["null.kv", "null.pooled"];
    pub const SIZE_IDS: &str = "objective.size_ids";
    /// Per level, `[1]`.
    pub const TIMESTEP: [&str; 2] = ["objective.t1", "objective.t2"];
    /// Per level, coefficients over the noisy latents and the network's output: the clean latents and the noise in them.
    pub const CLEAN: [&str; 2] = ["objective.clean.t1", "objective.clean.t2"];
    pub const NOISE: [&str; 2] = ["objective.noise.t1", "objective.noise.t2"];
    /// Coefficients over clean latents and fresh noise.
    pub const RENOISE: &str = "objective.renoise";
    /// Noise-to-signal ratio at `t2` and its negative.
    pub const RATIO: &str = "objective.ratio";
    /// Seeds and draw of the fresh noise, `[B, 4]`.
    pub const COUNTER: &str = "objective.counter";
    /// Always 0.
    pub const ZERO: &str = "objective.zero";
}

/// Where in a run an objective stands: what its predictions are conditioned on, and how its buffers are called.
pub(crate) enum Place {
    /// A sampling step: named buffers of each branch, and in the place of one of them what is optimized.
    Step { optimized: Option<Optimized> },
    /// The latents of a whole run after some step: rows of the run's own keys and values, `[rows, T, W]`.
    Chain { rows: usize, suffix: String },
}

/// The branch that is optimized, as the network reads it.
pub(crate) struct Optimized {
    branch: Branch,
    /// Keys and values of every cross-attention, and pooled text where the network takes it.
    kv: ValueId,
    pooled: Option<ValueId>,
}

impl Optimized {
    pub fn new(b: &mut Builder, pipeline: &Pipeline, branch: Branch, states: States) -> Optimized {
        let kv = Unet::new(&pipeline.config.unet).context_kv(b, states.context);
        Optimized { branch, kv, pooled: states.pooled }
    }
}

/// One point of a run as an objective sees it. All images and latents are `[B, h, w, C]` of the accumulator type.
pub struct StepContext<'s> {
    pub b: &'s mut Builder,
    /// The latents at [`At::T1`].
    pub latents: ValueId,
    pipeline: &'s Pipeline,
    unet: Unet<'s>,
    sizes: Sizes,
    guidance: f64,
    place: Place,
    /// Whether something was predicted, and with what is optimized.
    pub(crate) predicts: bool,
    pub(crate) uses_optimized: bool,
}

impl<'s> StepContext<'s> {
    pub(crate) fn new(
        b: &'s mut Builder,
        pipeline: &'s Pipeline,
        sizes: Sizes,
        guidance: f64,
        place: Place,
    ) -> StepContext<'s> {
        let Sizes { batch, height, width, .. } = sizes;
        let latents = b.accumulator_input(LATENTS, &[batch, height, width, pipeline.config.unet.in_channels]);
        StepContext::at(b, pipeline, sizes, guidance, place, latents)
    }

    /// The same of latents that are a value of the program.
    pub(crate) fn at(
        b: &'s mut Builder,
        pipeline: &'s Pipeline,
        sizes: Sizes,
        guidance: f64,
        place: Place,
        latents: ValueId,
    ) -> StepContext<'s> {
        let unet = Unet::new(&pipeline.config.unet);
        StepContext { b, latents, pipeline, unet, sizes, guidance, place, predicts: false, uses_optimized: false }
    }

    pub fn batch(&self) -> usize {
        self.sizes.batch
    }

    /// The network's output for `x`, without guidance.
    pub fn predict(&mut self, x: ValueId, at: At, condition: Condition) -> Prediction {
        self.predicts = true;
        let (kv, pooled) = self.text(condition);
        let time = self.time(at, pooled);
        let output = self.unet.forward(self.b, x, kv, time);
        Prediction { x, output: self.b.to_accumulator(output), at }
    }

    /// Keys and values `[B, T, W]` and pooled text `[B, P]` of a condition.
    fn text(&mut self, condition: Condition) -> (ValueId, Option<ValueId>) {
        let Sizes { batch, tokens, .. } = self.sizes;
        let (width, pooled_width) = (self.unet.kv_width(), self.pooled_width());
        let branch = if condition == Condition::Null { Branch::Negative } else { Branch::Prompt };
        match &self.place {
            // What is optimized takes the place of its branch, but not of the prompt as the user wrote it.
            Place::Step { optimized: Some(optimized) }
                if optimized.branch == branch && condition != Condition::Prompt =>
            {
                self.uses_optimized = true;
                (optimized.kv, optimized.pooled)
            }
            Place::Step { .. } => {
                let [kv, pooled] = if branch == Branch::Negative { buffer::NULL } else { buffer::PROMPT };
                let kv = self.b.input(kv, &[batch, tokens, width]);
                (kv, pooled_width.map(|width| self.b.input(pooled, &[batch, width])))
            }
            &Place::Chain { rows, .. } => {
                let start = if branch == Branch::Negative { 0 } else { rows - batch };
                if branch == Branch::Negative && rows == batch {
                    self.b.fail("at guidance 1 there is no unconditional branch");
                }
                let kv = self.b.input(programs::buffer::KV, &[rows, tokens, width]);
                let kv = self.b.slice(kv, start, batch);
                let pooled = pooled_width.map(|width| {
                    let pooled = self.b.input(programs::buffer::POOLED, &[rows, width]);
                    self.b.slice(pooled, start, batch)
                });
                (kv, pooled)
            }
        }
    }

    /// The name of one of this context's own buffers.
    fn name(&self, buffer: &str) -> String {
        match &self.place {
            Place::Step { .. } => buffer.to_string(),
            Place::Chain { suffix, .. } => format!("{buffer}{suffix}"),
        }
    }

    /// The network's output for `x` under classifier-free guidance.
    pub fn guided(&mut self, x: ValueId, at: At, condition: Condition) -> Prediction {
        let (with, without) = (self.predict(x, at, condition), self.predict(x, at, Condition::Null));
        let with = self.b.affine(with.output, self.guidance, 0.0);
        let without = self.b.affine(without.output, 1.0 - self.guidance, 0.0);
        Prediction { x, output: self.b.add(with, without), at }
    }

    fn pooled_width(&mut self) -> Option<usize> {
        pooled_width(self.pipeline).unwrap_or_else(|error| {
            self.b.fail(error.to_string());
            None
        })
    }

    /// Time projections of every residual block at one level, `[1, W]`, or `[B, W]` where pooled text is added.
    fn time(&mut self, at: At, pooled: Option<ValueId>) -> ValueId {
        let timestep = self.b.accumulator_input(self.name(buffer::TIMESTEP[at as usize]), &[1]);
        let Some(pooled) = pooled else { return self.unet.time(self.b, timestep, None) };
        let size_ids = self.b.accumulator_input(self.name(buffer::SIZE_IDS), &[self.sizes.batch, 6]);
        let time = self.unet.time(self.b, timestep, Some(Added { pooled, size_ids }));
        let zero = self.b.input_i32(self.name(buffer::ZERO), &[1]);
        self.b.select(time, zero)
    }

    /// Tweedie's estimate of the clean latents.
    pub fn estimate(&mut self, p: Prediction) -> ValueId {
        self.read(p, buffer::CLEAN[p.at as usize])
    }

    /// The noise the network sees in its input, whatever it predicts.
    pub fn noise(&mut self, p: Prediction) -> ValueId {
        self.read(p, buffer::NOISE[p.at as usize])
    }

    fn read(&mut self, p: Prediction, coefficients: &str) -> ValueId {
        let coefficients = self.b.scalars(self.name(coefficients), 2);
        self.b.combine(&[p.x, p.output], coefficients)
    }

    /// Fresh unit noise, another one at every iteration; asking twice gives the same.
    pub fn draw(&mut self) -> ValueId {
        let counter = self.b.input_i32(self.name(buffer::COUNTER), &[self.sizes.batch, 4]);
        let shape = self.b.shape(self.latents);
        self.b.noise(counter, &shape)
    }

    /// Clean latents with noise added to the second level.
    pub fn renoise(&mut self, clean: ValueId, noise: ValueId) -> ValueId {
        let coefficients = self.b.scalars(self.name(buffer::RENOISE), 2);
        self.b.combine(&[clean, noise], coefficients)
    }

    /// `(σ_t2 / α_t2) (x − y)`.
    pub(super) fn ratio_times_difference(&mut self, x: ValueId, y: ValueId) -> ValueId {
        let coefficients = self.b.scalars(self.name(buffer::RATIO), 2);
        self.b.combine(&[x, y], coefficients)
    }

    /// Images `[B, H, W, 3]`, nominally in [-1, 1], of clean latents at the UNet's scale.
    pub fn decode(&mut self, latents: ValueId) -> ValueId {
        vae::decode(self.b, &self.pipeline.config.vae, latents)
    }

    /// Features `[B, projection]` by a CLIP of images as [`StepContext::decode`] gives them, of length 1.
    pub fn image_features(
        &mut self,
        config: &ClipImageConfig,
        component: Component,
        preprocess: &Preprocess,
        image: ValueId,
    ) -> ValueId {
        image_features(self.b, config, component, preprocess, image)
    }

    /// `‖x − y‖₂` per image, with gradient 0 where they are equal.
    pub fn distance(&mut self, x: ValueId, y: ValueId) -> ValueId {
        let difference = self.difference(x, y);
        let squares = self.squares(difference);
        self.root(squares)
    }

    pub fn difference(&mut self, x: ValueId, y: ValueId) -> ValueId {
        let minus = self.b.affine(y, -1.0, 0.0);
        self.b.add(x, minus)
    }

    /// `‖x‖₂²` per image; [`StepContext::root`] of it has gradient 0 at 0.
    pub fn squares(&mut self, x: ValueId) -> ValueId {
        self.b.dot(x, x)
    }

    pub fn root(&mut self, squares: ValueId) -> ValueId {
        self.b.map(squares, Scalar::Sqrt)
    }

    /// Something that is raised: its negative is minimized, and it is reported.
    pub fn raise(&mut self, x: ValueId) -> Loss {
        Loss { minimize: self.negated(x), report: x }
    }

    pub fn negated(&mut self, x: ValueId) -> ValueId {
        self.b.affine(x, -1.0, 0.0)
    }
}
