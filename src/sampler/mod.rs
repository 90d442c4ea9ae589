//! Samplers as tables: the coefficients of every step, the ops that apply them, and the noise; nothing here runs anything.
//!
//! Every sampler step is a linear combination, so one program serves all steps and only its coefficients change.
//! Latents of every sampler live in variance-preserving space, `x = α x₀ + σ ε` with `α² + σ² = 1`: what the network reads
//! are the latents themselves. Samplers that other engines run on `x / α` (Euler) give the same images, the last `α` being 1.

mod ddim;
mod dpmpp;
mod euler;
mod fragment;
mod inversion;
mod noise;
mod pndm;
mod schedule;
mod torch;

pub use fragment::{HISTORY, LATENTS, NOISE, PUSH, STORE, State, UPDATE, append_update, update};
pub use noise::{Noise, Rng, counters, draw, normal, uniform};
pub use schedule::{Level, fraction_with_signal, level_at, level_at_fraction};
pub(crate) use schedule::{Table, spaced};

use crate::models::config::{Prediction, SchedulerConfig, Spacing};
use crate::{Error, Result};

/// Which sampler; `Display` and `FromStr` use the names of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Song et al. 2020, eq. 12 (`DDIMScheduler`).
    Ddim,
    /// Karras et al. 2022 without churn (`EulerDiscreteScheduler`).
    Euler,
    /// k-diffusion's `sample_euler_ancestral` (`EulerAncestralDiscreteScheduler`).
    EulerAncestral,
    /// DPM-Solver++ 2M, midpoint (Lu et al. 2022; `DPMSolverMultistepScheduler`).
    Dpmpp2m,
    /// The same on the noise levels of Karras et al. 2022.
    Dpmpp2mKarras,
    /// Pseudo linear multi-step (Liu et al. 2022; `PNDMScheduler` with `skip_prk_steps`). Runs one model call more than steps.
    Pndm,
}

impl Method {
    pub const ALL: [Method; 6] =
        [Method::Ddim, Method::Euler, Method::EulerAncestral, Method::Dpmpp2m, Method::Dpmpp2mKarras, Method::Pndm];

    pub fn name(self) -> &'static str {
        match self {
            Method::Ddim => "ddim",
            Method::Euler => "euler",
            Method::EulerAncestral => "euler-a",
            Method::Dpmpp2m => "dpmpp-2m",
            Method::Dpmpp2mKarras => "dpmpp-2m-karras",
            Method::Pndm => "pndm",
        }
    }

    /// The sampler a model's `scheduler_config.json` names; `None` where that class has no counterpart here.
    pub fn of(config: &SchedulerConfig) -> Option<Method> {
        Some(match config.class.as_str() {
            "DDIMScheduler" => Method::Ddim,
            "EulerDiscreteScheduler" => Method::Euler,
            "EulerAncestralDiscreteScheduler" => Method::EulerAncestral,
            "DPMSolverMultistepScheduler" if config.karras => Method::Dpmpp2mKarras,
            "DPMSolverMultistepScheduler" => Method::Dpmpp2m,
            "PNDMScheduler" => Method::Pndm,
            _ => return None,
        })
    }

    /// What the diffusers class does where neither the user nor the model's file names a spacing.
    fn usual_spacing(self) -> Spacing {
        match self {
            Method::Ddim | Method::Pndm => Spacing::Leading,
            Method::Euler | Method::EulerAncestral | Method::Dpmpp2m | Method::Dpmpp2mKarras => Spacing::Linspace,
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Method> {
        Method::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| {
            let names = Method::ALL.map(Method::name).join(", ");
            Error::Usage(format!("unknown sampler '{name}' (one of {names})"))
        })
    }
}

/// What the user asks of the sampler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub method: Method,
    /// `None` takes the model's own (see [`Settings::spacing`]).
    pub spacing: Option<Spacing>,
    pub steps: usize,
    /// Fraction of fresh noise in DDIM, 0 (none) to 1 (DDPM); 0 for every other sampler.
    pub eta: f64,
    /// Weight `w` of `e = e_u + w (e_c − e_u)`. At exactly 1 the unconditional branch is left out.
    pub guidance: f64,
    /// CFG++ (Chung et al. 2024): `x₀` from the guided prediction, renoised with the unconditional one; `w` in (0, 1], DDIM or Euler.
    pub cfg_pp: bool,
}

impl Settings {
    /// The spacing in force: the user's, else the model's, else the sampler's own.
    pub fn spacing(&self, config: &SchedulerConfig) -> Spacing {
        self.spacing.or(config.spacing).unwrap_or_else(|| self.method.usual_spacing())
    }
}

/// What a step program must provide: it fixes the program's shape, two schedules with equal needs share one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Needs {
    /// Depth of the history of stored predictions, 0 to 3.
    pub history: usize,
    /// Some step leaves the history as it is, so the shift needs a switch.
    pub switch: bool,
    /// Steps add fresh noise: draw `k + 1` of the image at step `k`, whether or not its coefficient is zero.
    pub noise: bool,
    /// Both branches of guidance run.
    pub uncond: bool,
}

/// One model call and the linear combination after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The time that the network is given, in training steps; a whole number except for Euler.
    pub timestep: f64,
    /// The latents of this step are `alpha x₀ + sigma ε`.
    pub alpha: f64,
    pub sigma: f64,
    /// `x₀ = denoised[0] x + denoised[1] e` with `e` the network's output, whatever it predicts.
    pub denoised: [f64; 2],
    /// Stored quantity from `[x, e_c, e_u?]`; empty without history.
    store: Vec<f64>,
    /// New latents from `[x, e_c, e_u?, noise?]`, or from `[x, stored, history…]`.
    update: Vec<f64>,
    /// `[1, 0]` to shift the history, `[0, 1]` to leave it; empty without a switch.
    push: Vec<f64>,
}

impl Step {
    /// The coefficient buffers the host writes before it runs the step: name and values, to be cast to the buffer's type.
    pub fn buffers(&self) -> impl Iterator<Item = (&'static str, &[f64])> {
        [(STORE, &self.store[..]), (UPDATE, &self.update), (PUSH, &self.push)]
            .into_iter()
            .filter(|(_, c)| !c.is_empty())
    }

    /// The same step of a schedule with both branches under another guidance weight. Not for CFG++, which uses the branches apart.
    pub(crate) fn guided(&self, weight: f64) -> Step {
        let spread = |coefficients: &[f64], branches: bool| match *coefficients {
            [x, with, without, ref noise @ ..] if branches => {
                let both = with + without;
                [&[x, weight * both, (1.0 - weight) * both], noise].concat()
            }
            _ => coefficients.to_vec(),
        };
        let multi = !self.store.is_empty();
        Step { store: spread(&self.store, multi), update: spread(&self.update, !multi), ..self.clone() }
    }
}

/// Every step of a sampler, first to last.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    pub steps: Vec<Step>,
    /// The initial latents are unit noise times this.
    pub initial_scale: f64,
    pub needs: Needs,
}

/// The tables of `settings` for a model.
///
/// Follows the scheduler classes of diffusers 0.42 (named at [`Method`]), their rounding of timesteps included.
/// `Error::Usage` when a setting makes no sense or the sampler cannot follow the model's prediction type, `Error::Model` when
/// the model's noise schedule is no schedule.
pub fn schedule(config: &SchedulerConfig, settings: &Settings) -> Result<Schedule> {
    check(config, settings)?;
    let spacing = settings.spacing(config);
    let needs = Needs {
        history: 0,
        switch: false,
        noise: settings.method == Method::EulerAncestral || settings.eta > 0.0,
        uncond: settings.cfg_pp || settings.guidance != 1.0,
    };
    let guide = Guide { prediction: config.prediction, settings, needs };
    let table = Table::new(config)?;
    Ok(match settings.method {
        Method::Ddim => ddim::schedule(config, &table, spacing, guide),
        Method::Euler | Method::EulerAncestral => euler::schedule(config, &table, spacing, guide),
        Method::Dpmpp2m | Method::Dpmpp2mKarras => dpmpp::schedule(config, &table, spacing, guide),
        Method::Pndm => pndm::schedule(config, &table, spacing, guide),
    })
}

/// Refuses settings that make no sense.
pub(crate) fn check(config: &SchedulerConfig, s: &Settings) -> Result<()> {
    let usage = |what: String| Err(Error::Usage(what));
    let method = s.method;
    if s.steps == 0 || s.steps > config.train_timesteps {
        return usage(format!("--steps {}: must be 1 to {}", s.steps, config.train_timesteps));
    }
    if !s.guidance.is_finite() {
        return usage(format!("--guidance {}: must be a finite number", s.guidance));
    }
    if !(0.0..=1.0).contains(&s.eta) {
        return usage(format!("--eta {}: must be 0 to 1", s.eta));
    }
    if s.eta > 0.0 && method != Method::Ddim {
        return usage(format!("--eta {} works with --sampler ddim, not {method}", s.eta));
    }
    if s.cfg_pp && !matches!(method, Method::Ddim | Method::Euler) {
        return usage(format!("CFG++ works with --sampler ddim or euler, not {method}"));
    }
    if s.cfg_pp && !(s.guidance > 0.0 && s.guidance <= 1.0) {
        return usage(format!("--guidance {}: must be above 0 and at most 1 with CFG++", s.guidance));
    }
    if method == Method::Pndm && config.prediction == Prediction::Sample {
        return usage("--sampler pndm cannot follow a model that predicts the sample; use ddim".into());
    }
    if method == Method::Pndm && config.rescale_zero_snr {
        return usage("--sampler pndm cannot start at zero signal, as this model does; use ddim".into());
    }
    Ok(())
}

/// How a step's coefficients spread over the network's branches.
#[derive(Clone, Copy)]
pub(crate) struct Guide<'a> {
    pub prediction: Prediction,
    pub settings: &'a Settings,
    pub needs: Needs,
}

impl Guide<'_> {
    /// The coefficients of `x` and of each branch for `on_x x + on_e e`, `e` guided.
    fn split(&self, on_x: f64, on_e: f64) -> Vec<f64> {
        let w = self.settings.guidance;
        if self.needs.uncond { vec![on_x, w * on_e, (1.0 - w) * on_e] } else { vec![on_x, on_e] }
    }

    /// A step without memory: new latents `on_x0 x₀ + on_eps ε + on_noise n`.
    pub fn single(&self, timestep: f64, from: Level, on_x0: f64, on_eps: f64, on_noise: f64) -> Step {
        let ([ax, ae], [bx, be]) = (from.x0(self.prediction), from.eps(self.prediction));
        let mut update = if self.settings.cfg_pp {
            let mut update = self.split(on_x0 * ax + on_eps * bx, on_x0 * ae);
            update[2] += on_eps * be;
            update
        } else {
            self.split(on_x0 * ax + on_eps * bx, on_x0 * ae + on_eps * be)
        };
        if self.needs.noise {
            update.push(on_noise);
        }
        Step { store: vec![], update, push: vec![], ..self.blank(timestep, from) }
    }

    /// A step with memory: it stores `d = store[0] x + store[1] e` and yields `update` over `[x, d, history…]`.
    fn multi(&self, timestep: f64, at: Level, store: [f64; 2], update: Vec<f64>, push: bool) -> Step {
        let push = match (self.needs.switch, push) {
            (false, _) => vec![],
            (true, true) => vec![1.0, 0.0],
            (true, false) => vec![0.0, 1.0],
        };
        Step { store: self.split(store[0], store[1]), update, push, ..self.blank(timestep, at) }
    }

    fn blank(&self, timestep: f64, at: Level) -> Step {
        let denoised = at.x0(self.prediction);
        Step { timestep, alpha: at.alpha, sigma: at.sigma, denoised, store: vec![], update: vec![], push: vec![] }
    }
}
