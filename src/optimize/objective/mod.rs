//! Objectives of optimisation while sampling: functions that append ops from the latents of a step to one number per image.
//!
//! [`minority`] and [`repulsion`] are two. A third, away from an image that was seen before, and a run that raises it:
//!
//! ```
//! use rarebit::exec::{Data, cpu::Cpu};
//! use rarebit::methods::minority::{Minority, Settings};
//! use rarebit::pipeline::{Pipeline, Progress, generate};
//! use rarebit::optimize::objective::{At, Objective, Scene, Told};
//! use rarebit::program::DType;
//! use rarebit::sampler::{self, Method, Rng};
//!
//! # fn main() -> rarebit::Result<()> {
//! let pipeline = Pipeline::open(rarebit::assets::shapes()?, None)?;
//! let novelty = Objective::new("novelty", |s: &mut Scene<'_>| {
//!     let look = s.predict(s.latents, At::Now, Told::Learned);
//!     let estimate = s.clean(look);
//!     let shape = s.b.shape(estimate);
//!     let seen = s.b.wide_input("seen", &shape);
//!     s.distance(estimate, seen)
//! });
//! let sampler = sampler::Settings { method: Method::Ddim, spacing: None, steps: 20, eta: 0.0, guidance: 4.0, cfg_pp: false };
//! let images = generate::Settings { width: 64, height: 64, sampler, rng: Rng::Philox, dtype: DType::F32 };
//! let settings = Settings { objectives: vec![novelty], trace: true, ..Settings::of(&pipeline, images)? };
//! let mut cpu = Cpu::<f32>::new();
//! let mut run = Minority::plan(&pipeline, &cpu, settings, &["a red heart"])?.load(&mut cpu)?;
//! run.write("seen", Data::F32(&vec![0.5; 16 * 16 * 4]))?;
//! let job = generate::Job { prompt: "a red heart".into(), negative: None, seed: 7, draws: vec![] };
//! let mut scores = vec![];
//! let made = run.run(&[job], &[7], &mut |progress| {
//!     if let Progress::Iteration(Some(iteration)) = progress {
//!         scores.push(iteration.score[0]);
//!     }
//!     Ok(())
//! })?;
//! println!("{} pixels, {} times optimised, from {:.2} to {:.2}", made[0].rgb.len() / 3, scores.len(), scores[0], scores[9]);
//! # assert!(scores[9] > scores[0]);
//! # Ok(()) }
//! ```

mod programs;

pub use programs::{Ask, Loaded, Look, Objectives, Passes, Varies, score_name};

use crate::models::unet::{Added, Unet};
use crate::optimize::variable::States;
use crate::pipeline::Pipeline;
use crate::pipeline::programs::{Sizes, pooled_width};
use crate::program::{Builder, DType, Scalar, ValueId};
use crate::sampler::LATENTS;

/// The two noise levels an objective may ask the network at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// That of the latents, timestep `t`.
    Now,
    /// That of [`Scene::renoise`], timestep `s`.
    Again,
}

/// What the network is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Told {
    /// The prompt as the variable has it.
    Learned,
    /// The prompt as the user wrote it.
    Prompt,
    /// What the unconditional branch is told, as the variable has it.
    Null,
}

/// The network's output for `x`: read by [`Scene::clean`] and [`Scene::noise`].
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    x: ValueId,
    output: ValueId,
    at: At,
}

/// What an objective makes of a step, a number per image each, `[B]`.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    /// What is raised, as far as its gradient goes.
    pub ascend: ValueId,
    /// What is reported.
    pub report: ValueId,
}

impl From<ValueId> for Score {
    fn from(value: ValueId) -> Score {
        Score { ascend: value, report: value }
    }
}

type Append = dyn Fn(&mut Scene<'_>) -> Score;

/// Something to raise; see [`minority`] and [`repulsion`] for two.
pub struct Objective {
    pub name: &'static str,
    append: Box<Append>,
}

impl Objective {
    pub fn new<S: Into<Score>>(name: &'static str, append: impl Fn(&mut Scene<'_>) -> S + 'static) -> Objective {
        Objective { name, append: Box::new(move |scene| append(scene).into()) }
    }
}

/// Named buffers of a program that holds an objective.
pub(crate) mod scene {
    /// Keys and values, and pooled text, of what stays as it is.
    pub const PROMPT: [&str; 2] = ["prompt.kv", "prompt.pooled"];
    pub const NULL: [&str; 2] = ["null.kv", "null.pooled"];
    pub const SIZE_IDS: &str = "objective.size_ids";
    /// Per level, `[1]`.
    pub const TIMESTEP: [&str; 2] = ["objective.t", "objective.s"];
    /// Per level, coefficients over the noisy latents and the network's output: the clean image and the noise in them.
    pub const CLEAN: [&str; 2] = ["objective.clean.t", "objective.clean.s"];
    pub const NOISE: [&str; 2] = ["objective.noise.t", "objective.noise.s"];
    /// Coefficients over a clean image and fresh noise.
    pub const RENOISE: &str = "objective.renoise";
    /// Noise-to-signal ratio at `s` and its negative.
    pub const RATIO: &str = "objective.ratio";
    /// Seeds and draw of the fresh noise, `[B, 4]`.
    pub const COUNTER: &str = "objective.counter";
    /// Always 0.
    pub const ZERO: &str = "objective.zero";
}

/// One sampling step as an objective sees it. All images and latents are `[B, h, w, C]` of the wide type.
pub struct Scene<'s> {
    pub b: &'s mut Builder,
    /// The latents at timestep `t`.
    pub latents: ValueId,
    pipeline: &'s Pipeline,
    unet: Unet<'s>,
    sizes: Sizes,
    guidance: f64,
    learned: Option<Learned>,
    looked_at_learned: bool,
}

/// The branch that is optimised, as the network is told it.
struct Learned {
    /// Which: [`Told::Learned`] or [`Told::Null`].
    told: Told,
    /// Keys and values of every cross-attention, and pooled text where the network takes it.
    kv: ValueId,
    pooled: Option<ValueId>,
}

impl<'s> Scene<'s> {
    pub(crate) fn new(
        b: &'s mut Builder,
        pipeline: &'s Pipeline,
        sizes: Sizes,
        guidance: f64,
        learned: Option<(Told, States)>,
    ) -> Scene<'s> {
        let unet = Unet::new(&pipeline.config.unet);
        let learned =
            learned.map(|(told, States { context, pooled })| Learned { told, kv: unet.context_kv(b, context), pooled });
        let Sizes { batch, height, width, .. } = sizes;
        let latents = b.wide_input(LATENTS, &[batch, height, width, pipeline.config.unet.in_channels]);
        Scene { b, latents, pipeline, unet, sizes, guidance, learned, looked_at_learned: false }
    }

    pub fn batch(&self) -> usize {
        self.sizes.batch
    }

    /// The network's output for `x`, without guidance.
    pub fn predict(&mut self, x: ValueId, at: At, told: Told) -> Prediction {
        let [kv, pooled] = if told == Told::Null { scene::NULL } else { scene::PROMPT };
        let (kv, pooled) = match &self.learned {
            Some(learned) if learned.told == told => {
                self.looked_at_learned = true;
                (learned.kv, learned.pooled)
            }
            Some(_) | None => {
                let Sizes { batch, tokens, .. } = self.sizes;
                let kv = self.b.input(kv, &[batch, tokens, self.unet.kv_width()]);
                (kv, self.pooled_width().map(|width| self.b.input(pooled, &[batch, width])))
            }
        };
        let time = self.time(at, pooled);
        let output = self.unet.forward(self.b, x, kv, time);
        Prediction { x, output: self.b.widen(output), at }
    }

    /// The network's output for `x` under classifier-free guidance.
    pub fn guided(&mut self, x: ValueId, at: At, told: Told) -> Prediction {
        let (with, without) = (self.predict(x, at, told), self.predict(x, at, Told::Null));
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
        let timestep = self.b.wide_input(scene::TIMESTEP[at as usize], &[1]);
        let Some(pooled) = pooled else { return self.unet.time(self.b, timestep, None) };
        let size_ids = self.b.wide_input(scene::SIZE_IDS, &[self.sizes.batch, 6]);
        let time = self.unet.time(self.b, timestep, Some(Added { pooled, size_ids }));
        let zero = self.b.input_i32(scene::ZERO, &[1]);
        self.b.select(time, zero)
    }

    /// Tweedie's estimate of the clean image.
    pub fn clean(&mut self, p: Prediction) -> ValueId {
        self.read(p, scene::CLEAN[p.at as usize])
    }

    /// The noise the network sees in its input, whatever it predicts.
    pub fn noise(&mut self, p: Prediction) -> ValueId {
        self.read(p, scene::NOISE[p.at as usize])
    }

    fn read(&mut self, p: Prediction, coefficients: &str) -> ValueId {
        let coefficients = self.b.scalars(coefficients, 2);
        self.b.combine(&[p.x, p.output], coefficients)
    }

    /// Fresh unit noise, another one at every iteration; asking twice gives the same.
    pub fn draw(&mut self) -> ValueId {
        let counter = self.b.input_i32(scene::COUNTER, &[self.sizes.batch, 4]);
        let shape = self.b.shape(self.latents);
        self.b.noise(counter, &shape)
    }

    /// A clean image with noise added to the second level.
    pub fn renoise(&mut self, clean: ValueId, noise: ValueId) -> ValueId {
        let coefficients = self.b.scalars(scene::RENOISE, 2);
        self.b.combine(&[clean, noise], coefficients)
    }

    /// `(σ_s / α_s) (x − y)` at the second level.
    fn ratio_times_difference(&mut self, x: ValueId, y: ValueId) -> ValueId {
        let coefficients = self.b.scalars(scene::RATIO, 2);
        self.b.combine(&[x, y], coefficients)
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

    /// `‖x‖₂²` per image; [`Scene::root`] of it has gradient 0 at 0.
    pub fn squares(&mut self, x: ValueId) -> ValueId {
        self.b.dot(x, x)
    }

    pub fn root(&mut self, squares: ValueId) -> ValueId {
        self.b.map(squares, Scalar::Sqrt)
    }
}

/// The switches of [`minority`]; the default is the method.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Minority {
    /// Weight λ of the term whose second estimate has no gradient.
    pub lambda: f64,
    /// Leaves out the other term, so that no gradient passes through the second estimate (the paper's naive objective).
    pub stop_second: bool,
    /// The second estimate is told the learned prompt, not the user's.
    pub second_learned: bool,
    /// Both estimates are those of classifier-free guidance.
    pub guided: bool,
    /// Squared distances.
    pub squared: bool,
}

impl Default for Minority {
    fn default() -> Minority {
        Minority { lambda: 1.0, stop_second: false, second_learned: false, guided: false, squared: false }
    }
}

/// How far the estimate `f` of the clean image moves when it is noised to level `s` and estimated again, without the token: `g`
/// (Um & Ye 2025, eq. 8 to 10).
///
/// `J = ‖sg(f) − g‖ + λ ‖f − sg(g)‖`. With `e` the noise seen in `α_s f + σ_s n`, `f − g = (σ_s / α_s)(e − n)` exactly: both terms have
/// that length, and `∇J = ∇‖f − g‖ + (λ − 1) (∂f)ᵀ (f − g) / ‖f − g‖`. At λ = 1 `f` itself drops out, and with it the cancellation
/// in `f − g`.
pub fn minority(o: Minority) -> Objective {
    Objective::new("minority", move |s: &mut Scene<'_>| {
        let look =
            |s: &mut Scene<'_>, x, at, told| if o.guided { s.guided(x, at, told) } else { s.predict(x, at, told) };
        let first = look(s, s.latents, At::Now, Told::Learned);
        let f = s.clean(first);
        let n = s.draw();
        let noised = s.renoise(f, n);
        let second = look(s, noised, At::Again, if o.second_learned { Told::Learned } else { Told::Prompt });
        let e = s.noise(second);
        let moved = s.ratio_times_difference(e, n);
        let squares = s.squares(moved);
        let norm = s.root(squares);
        let distance = if o.squared { squares } else { norm };

        let through_second = if o.stop_second { 0.0 } else { 1.0 };
        let report = s.b.affine(distance, through_second + o.lambda, 0.0);
        let mut ascend = (!o.stop_second).then_some(distance);
        if o.lambda != through_second {
            let direction = if o.squared {
                s.b.affine(moved, 2.0, 0.0)
            } else {
                let norm = s.b.affine(norm, 1.0, f64::from(f32::MIN_POSITIVE));
                let inverse = s.b.map(norm, Scalar::Reciprocal);
                s.b.scale(moved, inverse)
            };
            let direction = s.b.detach(direction);
            let along = s.b.dot(direction, f);
            let along = s.b.affine(along, o.lambda - through_second, 0.0);
            ascend = Some(ascend.map_or(along, |ascend| s.b.add(ascend, along)));
        }
        Score { ascend: ascend.unwrap_or(report), report }
    })
}

/// How far the estimates of a batch are from each other: `Σ_{j ≠ i} ‖f_i − f_j‖` of image `i`, with gradients on both sides
/// (`popt_diverse` of the released code).
pub fn repulsion() -> Objective {
    Objective::new("repulsion", |s: &mut Scene<'_>| {
        let batch = s.batch();
        if batch < 2 {
            s.b.fail("repulsion needs at least two images in a batch");
        }
        let prediction = s.predict(s.latents, At::Now, Told::Learned);
        let f = s.clean(prediction);
        // Every image beside its `shift`-th next one, round and round.
        let twice = s.b.repeat(f, 2);
        let mut sum: Option<ValueId> = None;
        for shift in 1..batch {
            let other = s.b.slice(twice, shift, batch);
            let distance = s.distance(f, other);
            sum = Some(sum.map_or(distance, |sum| s.b.add(sum, distance)));
        }
        sum.unwrap_or(f)
    })
}

/// The loss scale a program type wants.
pub fn loss_scale(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1024.0,
        DType::BF16 | DType::F32 | DType::F64 | DType::I32 => 1.0,
    }
}
