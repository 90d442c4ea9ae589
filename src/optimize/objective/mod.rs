//! Objectives: closures that append ops from latents to one number per image, which is minimized.
//!
//! The same type is used at a sampling step ([`ObjectiveSpec`]) and on the latents of a whole run ([`crate::optimize::chain`]). What
//! it may use is [`StepContext`]'s: predictions of the network, estimates of the clean latents, noise, decoded pixels, image features.
//! A method that raises something negates it, as [`minority`] and [`repulsion`] do. A third, away from an image that was seen before,
//! and a run that minimizes it:
//!
//! ```
//! use rarebit::exec::{Data, cpu::Cpu};
//! use rarebit::methods::minority::{Minority, Settings};
//! use rarebit::optimize::objective::{At, Condition, Objective, StepContext};
//! use rarebit::pipeline::{Pipeline, Progress, generate};
//! use rarebit::program::DType;
//! use rarebit::sampler::{self, Method, Rng};
//!
//! # fn main() -> rarebit::Result<()> {
//! let pipeline = Pipeline::open(rarebit::assets::shapes()?, None)?;
//! let novelty = Objective::new("novelty", |s: &mut StepContext<'_>| {
//!     let prediction = s.predict(s.latents, At::T1, Condition::Optimized);
//!     let estimate = s.estimate(prediction);
//!     let shape = s.b.shape(estimate);
//!     let seen = s.b.accumulator_input("seen", &shape);
//!     let distance = s.distance(estimate, seen);
//!     s.raise(distance)
//! });
//! let sampler = sampler::Settings { method: Method::Ddim, spacing: None, steps: 20, eta: 0.0, guidance: 4.0, cfg_pp: false };
//! let images = generate::Settings { width: 64, height: 64, sampler, rng: Rng::Philox, dtype: DType::F32 };
//! let settings = Settings { objectives: vec![novelty], trace: true, ..Settings::of(&pipeline, images)? };
//! let mut cpu = Cpu::<f32>::new();
//! let mut run = Minority::plan(&pipeline, &cpu, settings, &["a red heart"])?.load(&mut cpu)?;
//! run.write("seen", Data::F32(&vec![0.5; 16 * 16 * 4]))?;
//! let job = generate::Job { prompt: "a red heart".into(), negative: None, seed: 7, draws: vec![] };
//! let mut distances = vec![];
//! let made = run.run(&[job], &[7], &mut |progress| {
//!     if let Progress::Iteration(Some(iteration)) = progress {
//!         distances.push(iteration.score[0]);
//!     }
//!     Ok(())
//! })?;
//! println!("{} pixels, {} iterations, from {:.2} to {:.2}", made[0].rgb.len() / 3, distances.len(), distances[0], distances[9]);
//! # assert!(distances[9] > distances[0]);
//! # Ok(()) }
//! ```

mod context;
mod minority;
pub mod references;
mod repulsion;
mod reward;
mod spec;

pub use context::{At, Condition, NoiseLevels, Prediction, StepContext};
pub(crate) use context::{Place, buffer};
pub use minority::{Minority, minority};
pub use repulsion::repulsion;
pub use reward::{RewardPrompts, estimated_reward, reward};
pub use spec::{Loaded, Nfe, ObjectiveSpec, Objectives, report_name};

use crate::program::{DType, ValueId};

/// What an objective makes of a step, a number per image each, `[B]`.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// What is minimized, as far as its gradient goes.
    pub minimize: ValueId,
    /// What is reported.
    pub report: ValueId,
}

impl From<ValueId> for Loss {
    fn from(value: ValueId) -> Loss {
        Loss { minimize: value, report: value }
    }
}

type Append<'a> = dyn Fn(&mut StepContext<'_>) -> Loss + 'a;

/// Something to minimize. Inputs that its ops declare are named buffers, which the caller writes.
pub struct Objective<'a> {
    pub name: &'static str,
    append: Box<Append<'a>>,
}

impl<'a> Objective<'a> {
    pub fn new<L: Into<Loss>>(name: &'static str, append: impl Fn(&mut StepContext<'_>) -> L + 'a) -> Objective<'a> {
        Objective { name, append: Box::new(move |context| append(context).into()) }
    }

    /// Appends it; what is not one number per image fails the program.
    pub(crate) fn append(&self, context: &mut StepContext<'_>) -> Loss {
        let loss = (self.append)(context);
        let batch = context.batch();
        for value in [loss.minimize, loss.report] {
            let found = context.b.shape(value);
            if found != [batch] {
                context.b.fail(format!("an objective is {found:?}; it must be one number per image, [{batch}]"));
            }
        }
        loss
    }
}

/// The loss scale that gradients in a program type want: f16 has no small numbers.
pub fn loss_scale(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1024.0,
        DType::BF16 | DType::F32 | DType::F64 | DType::I32 => 1.0,
    }
}
