//! A sampling run as a differentiable function: per-sample losses on its latents, and their gradients to what went in.
//!
//! Two ways to store what the backward needs, with the same bits: *latents*, which keeps only the sampler's state after every
//! step and runs each step's UNet again on the way back (memory does not grow with the number of steps but for that state), and
//! *activations*, one program over all steps, where the budget holds everything. (The same bits in f32 and f64: in 16 bits the
//! forward of the second also rounds between a product and its activation, which are apart there for the backward.)
//!
//! ```
//! use rarebit::exec::{Data, Executor, cpu::Cpu};
//! use rarebit::optimize::chain::{Chain, Leaf, Objective, Options};
//! use rarebit::pipeline::Pipeline;
//! use rarebit::models::vae;
//! use rarebit::program::DType;
//! use rarebit::sampler::{Method, Settings};
//!
//! # fn main() -> rarebit::Result<()> {
//! let pipeline = Pipeline::open(rarebit::assets::shapes()?, None)?;
//! let config = &pipeline.config.vae;
//! // How far each image is from a target, in the mean over its pixels.
//! let loss = Objective::on_final(move |b, latents| {
//!     let image = vae::decode(b, config, latents);
//!     let (shape, len) = (b.shape(image), b.shape(image)[1..].iter().product::<usize>());
//!     let target = b.input("target", &shape);
//!     let minus = b.affine(target, -1.0, 0.0);
//!     let difference = b.add(image, minus);
//!     let squares = b.dot(difference, difference);
//!     b.affine(squares, 1.0 / len as f64, 0.0)
//! });
//! let sampler = Settings { method: Method::Ddim, spacing: None, steps: 10, eta: 0.0, guidance: 4.0, cfg_pp: false };
//! let options = Options { width: 64, height: 64, batch: 1, dtype: DType::F32, sampler, budget: None };
//! let mut cpu = Cpu::<f32>::new();
//! let chain = Chain::plan(&pipeline, &cpu, &options, &[Leaf::Noise], vec![loss])?;
//! println!("{}", chain.footprint());
//! let mut chain = chain.load::<f32>(&mut cpu)?;
//! chain.prompts(&["a red heart"], &[""])?;
//! chain.write("target", Data::F32(&vec![0.5; 64 * 64 * 3]))?;
//! let noise = vec![0.1; 4 * 16 * 16];
//! let found = chain.evaluate(&noise, &[])?;
//! println!("loss {}, gradient to the noise {:?}", found.losses[0][0], &found.gradients[0][..4]);
//! # assert!(found.losses[0][0] > 0.0 && found.gradients[0].iter().any(|d| *d != 0.0));
//! # Ok(()) }
//! ```

mod programs;
mod run;

pub use run::{Evaluation, Loaded};

use crate::exec::{Executor, HostFloat};
use crate::pipeline::Pipeline;
use crate::pipeline::programs::Sizes;
use crate::plan::{Footprint, Planned, Recompute};
use crate::program::{Builder, DType, ValueId};
use crate::sampler::{self, Schedule};
use crate::{Error, Result};
use programs::{Design, Parts};

/// What a gradient is taken with respect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// The starting noise, `[B, h, w, C]`, unit variance.
    Noise,
    /// The text states of all rows (under guidance the unconditional ones first), `[R, T, D]`.
    Context,
    /// SDXL's pooled text of all rows, `[R, P]`.
    Pooled,
}

/// Appends ops from latents `[B, h, w, C]` at the UNet's scale to a loss per sample `[B]`.
pub type Loss<'a> = dyn Fn(&mut Builder, ValueId) -> ValueId + 'a;

/// A loss on the latents at one point of the run. Inputs it declares are written by [`Loaded::write`].
pub struct Objective<'a> {
    /// Steps done at that point; `None`: all.
    pub after: Option<usize>,
    pub loss: Box<Loss<'a>>,
}

impl<'a> Objective<'a> {
    pub fn on_final(loss: impl Fn(&mut Builder, ValueId) -> ValueId + 'a) -> Objective<'a> {
        Objective { after: None, loss: Box::new(loss) }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    /// Pixels.
    pub width: usize,
    pub height: usize,
    pub batch: usize,
    pub dtype: DType,
    pub sampler: sampler::Settings,
    /// Bytes of arena the run may take. `None`: as if unlimited, but states only, no activations across steps.
    pub budget: Option<usize>,
}

/// How the backward gets the forward's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// The state after every step; each step's forward runs again, in this many segments.
    Latents(Recompute),
    /// Everything.
    Activations,
}

/// A differentiable run, planned but not loaded.
pub struct Chain<'p> {
    pipeline: &'p Pipeline,
    sizes: Sizes,
    schedule: Schedule,
    leaves: Vec<Leaf>,
    /// Steps done before each objective.
    after: Vec<usize>,
    parts: Parts,
    storage: Storage,
}

impl<'p> Chain<'p> {
    /// Builds and plans the programs of a run, its losses and its gradients.
    ///
    /// With a budget, everything is kept if that fits, else the sampler's states, and each step is recomputed in as few segments
    /// as fit; `Error::Memory` names what the run needs at least.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        options: &Options,
        leaves: &[Leaf],
        objectives: Vec<Objective<'_>>,
    ) -> Result<Chain<'p>> {
        let (height, width) = pipeline.latent_size(options.width, options.height)?;
        let schedule = sampler::schedule(&pipeline.config.scheduler, &options.sampler)?;
        let sizes = Sizes { batch: options.batch, height, width, tokens: pipeline.tokens() };
        if leaves.contains(&Leaf::Pooled) && pipeline.config.unet.added.is_none() {
            return Err(Error::Usage("this model is not conditioned on pooled text; SDXL is".into()));
        }
        let steps = schedule.steps.len();
        let after: Vec<usize> = objectives.iter().map(|objective| objective.after.unwrap_or(steps)).collect();
        if let Some(after) = after.iter().find(|after| **after > steps) {
            return Err(Error::Usage(format!("a loss after step {after} of {steps}")));
        }
        let dtype = options.dtype;
        let design = Design { pipeline, dtype, sizes, schedule: &schedule, leaves, objectives, after: &after };
        let (parts, storage) = design.plan(executor, options.budget)?;
        Ok(Chain { pipeline, sizes, schedule, leaves: leaves.to_vec(), after, parts, storage })
    }

    pub fn storage(&self) -> Storage {
        self.storage
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(&self.programs())
    }

    /// Bytes of the buffer of the sampler's states between the steps; it is part of the footprint.
    pub fn state_bytes(&self) -> usize {
        self.parts.state_bytes()
    }

    /// Every planned program.
    pub fn programs(&self) -> Vec<&Planned> {
        self.parts.all()
    }

    /// Loads weights and programs. `F` is what the host holds of the run.
    pub fn load<'e, F: HostFloat>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e, F>> {
        Loaded::new(self, executor)
    }
}
