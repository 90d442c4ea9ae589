//! A sampling run as a differentiable function: per-sample losses on its latents, and their gradients to what went in.
//!
//! Two ways to store what the backward needs, with the same bits: *latents*, which keeps only the sampler's state after every
//! step and runs each step's UNet again on the way back (memory does not grow with the number of steps but for that state), and
//! *activations*, one program over all steps, where the budget holds everything. (The same bits in f32 and f64: in 16 bits the
//! forward of the second also rounds between a product and its activation, which are apart there for the backward. An objective that
//! predicts adds its share to the gradient of the text in another order.)
//!
//! The starting noise and the noise of every step are buffers on the device. An optimizer changes the first there, along a gradient that
//! never leaves it; what comes to the host per evaluation is the losses ([`Loaded::gradient`]). A loss alone ([`Loaded::loss`]) runs no
//! backward.
//!
//! ```
//! use rarebit::exec::{Data, Executor, cpu::Cpu};
//! use rarebit::optimize::chain::{Chain, Options, Term};
//! use rarebit::optimize::objective::{Objective, StepContext};
//! use rarebit::optimize::optimizer::Optimizer;
//! use rarebit::optimize::variable::Entry;
//! use rarebit::pipeline::Pipeline;
//! use rarebit::program::DType;
//! use rarebit::sampler::{Method, Settings};
//!
//! # fn main() -> rarebit::Result<()> {
//! let pipeline = Pipeline::open(rarebit::assets::shapes()?, None)?;
//! // How far each image is from a target, in the mean over its pixels.
//! let objective = Objective::new("target", |s: &mut StepContext<'_>| {
//!     let image = s.decode(s.latents);
//!     let (shape, len) = (s.b.shape(image), s.b.shape(image)[1..].iter().product::<usize>());
//!     let target = s.b.input("target", &shape);
//!     let difference = s.difference(image, target);
//!     let squares = s.squares(difference);
//!     s.b.affine(squares, 1.0 / len as f64, 0.0)
//! });
//! let sampler = Settings { method: Method::Ddim, spacing: None, steps: 10, eta: 0.0, guidance: 4.0, cfg_pp: false };
//! let options = Options { width: 64, height: 64, batch: 1, dtype: DType::F32, sampler, image_steps: None, budget: None };
//! let mut cpu = Cpu::<f32>::new();
//! let chain = Chain::plan(&pipeline, &cpu, &options, &[Entry::Latents], vec![Term::at_end(objective)])?;
//! let adam = Optimizer::ADAM.plan(&cpu, DType::F32, &[chain.noise_parameter()], 1.0)?;
//! println!("{}", chain.footprint());
//! let mut chain = chain.load::<f32>(&mut cpu)?;
//! let mut adam = adam.load(chain.executor(), &pipeline.model)?;
//! chain.prompts(&["a red heart"], &[""])?;
//! chain.write("target", Data::F32(&vec![0.5; 64 * 64 * 3]))?;
//! chain.set_noise(&vec![0.1; 4 * 16 * 16])?;
//! let mut losses = vec![];
//! for _ in 0..5 {
//!     losses.push(chain.gradient()?[0][0]);
//!     adam.step(chain.executor(), 0.05)?;
//! }
//! println!("losses {losses:?}");
//! # assert!(losses[4] < losses[0]);
//! # Ok(()) }
//! ```

mod programs;
mod run;
mod term;

pub use programs::{DRAWS, NOISE, Storage};
pub use run::{Evaluation, Loaded};
pub use term::Term;

use crate::exec::{Executor, HostFloat};
use crate::optimize::objective::NoiseLevels;
use crate::optimize::variable::{Entry, Parameter};
use crate::pipeline::Pipeline;
use crate::pipeline::programs::{Sizes, rows};
use crate::plan::{Footprint, Planned};
use crate::program::DType;
use crate::sampler::{self, Level, Schedule, Step, level_at_fraction};
use crate::{Error, Result};
use programs::{Parts, Spec};

#[derive(Clone, Debug)]
pub struct Options {
    /// Pixels.
    pub width: usize,
    pub height: usize,
    pub batch: usize,
    pub dtype: DType,
    pub sampler: sampler::Settings,
    /// Steps of a plain run beside it, from the same noise by the same sampler: for images of more steps than are differentiated
    /// ([`Loaded::sample`]).
    pub image_steps: Option<usize>,
    /// Bytes of arena the run may take. `None`: as if unlimited, but states only, no activations across steps.
    pub budget: Option<usize>,
}

/// A differentiable run, planned but not loaded.
pub struct Chain<'p> {
    pipeline: &'p Pipeline,
    sizes: Sizes,
    /// The steps of the run, then those of the plain run beside it.
    schedule: Schedule,
    /// Of the run.
    steps: usize,
    /// The noise that the plain run starts from is unit noise times this.
    image_scale: f64,
    entries: Vec<Entry>,
    /// Steps done before each objective, and the noise levels it sees.
    after: Vec<usize>,
    levels: Vec<NoiseLevels>,
    parts: Parts,
    storage: Storage,
}

impl<'p> Chain<'p> {
    /// Builds and plans the programs of a run, its losses and its gradients to `entries`.
    ///
    /// With a budget, everything is kept if that fits, else the sampler's states, and each step is recomputed in as few segments
    /// as fit; `Error::Memory` names what the run needs at least. A gradient to tokens is that to [`Entry::Context`]
    /// ([`Loaded::copy_gradient`]), carried on by [`crate::optimize::variable::VariableSpec::backward`]: `Error::Usage` here.
    pub fn plan(
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        options: &Options,
        entries: &[Entry],
        terms: Vec<Term<'_>>,
    ) -> Result<Chain<'p>> {
        let (height, width) = pipeline.latent_size(options.width, options.height)?;
        let mut schedule = sampler::schedule(&pipeline.config.scheduler, &options.sampler)?;
        let (steps, mut image_scale) = (schedule.steps.len(), schedule.initial_scale);
        if let Some(image_steps) = options.image_steps {
            let settings = sampler::Settings { steps: image_steps, ..options.sampler };
            let plain = sampler::schedule(&pipeline.config.scheduler, &settings)?;
            if schedule.needs.noise || plain.needs != schedule.needs {
                return Err(Error::Usage(
                    "a sampler that adds noise, or takes another state, has one number of steps".into(),
                ));
            }
            image_scale = plain.initial_scale;
            schedule.steps.extend(plain.steps);
        }
        let sizes = Sizes { batch: options.batch, height, width, tokens: pipeline.tokens() };
        if entries.contains(&Entry::Pooled) && pipeline.config.unet.added.is_none() {
            return Err(Error::Usage("this model is not conditioned on pooled text; SDXL is".into()));
        }
        if entries.contains(&Entry::Tokens) {
            return Err(Error::Usage("a run has no gradient to tokens; ask for that to the text states".into()));
        }
        let after: Vec<usize> = terms.iter().map(|term| term.after.unwrap_or(steps)).collect();
        if let Some(after) = after.iter().find(|after| **after > steps) {
            return Err(Error::Usage(format!("a loss after step {after} of {steps}")));
        }
        let levels =
            terms.iter().zip(&after).map(|(term, after)| levels(pipeline, &schedule.steps[..steps], *after, term.t2));
        let levels = levels.collect::<Result<_>>()?;
        let (dtype, guidance) = (options.dtype, options.sampler.guidance);
        let spec = Spec { pipeline, dtype, sizes, schedule: &schedule, steps, guidance, entries, terms, after: &after };
        let (parts, storage) = spec.plan(executor, options.budget)?;
        Ok(Chain {
            pipeline,
            sizes,
            schedule,
            steps,
            image_scale,
            entries: entries.to_vec(),
            after,
            levels,
            parts,
            storage,
        })
    }

    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Network function evaluations of one run: UNet calls, each on one image's latents.
    pub fn calls(&self) -> usize {
        self.steps * rows(self.sizes, &self.schedule)
    }

    /// The same of a run that makes an image: the plain one beside it, where there is one.
    pub fn image_calls(&self) -> usize {
        self.image_steps() * rows(self.sizes, &self.schedule)
    }

    /// Steps of the run.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Steps of a run that makes an image.
    pub fn image_steps(&self) -> usize {
        match self.schedule.steps.len() - self.steps {
            0 => self.steps,
            plain => plain,
        }
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

    /// The starting noise as what an optimizer changes.
    pub fn noise_parameter(&self) -> Parameter {
        let Sizes { batch, height, width, .. } = self.sizes;
        Parameter { name: NOISE, shape: vec![batch, height, width, self.pipeline.config.unet.in_channels] }
    }

    /// Loads weights and programs. `F` is what the host holds of the run.
    pub fn load<'e, F: HostFloat>(self, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e, F>> {
        Loaded::new(self, executor)
    }
}

/// The levels an objective sees after `done` steps. Final latents are clean.
fn levels(pipeline: &Pipeline, steps: &[Step], done: usize, t2: f64) -> Result<NoiseLevels> {
    let (t2, level2) = level_at_fraction(&pipeline.config.scheduler, t2)?;
    let (t1, level1) = match steps.get(done) {
        Some(step) => (step.timestep, Level { alpha: step.alpha, sigma: step.sigma }),
        None => (0.0, Level { alpha: 1.0, sigma: 0.0 }),
    };
    Ok(NoiseLevels { t1, level1, t2, level2 })
}
