//! A sampler run backwards: from clean latents to the noise that it would make them of.

use super::{Schedule, Step};
use crate::{Error, Result};

impl Schedule {
    /// The steps that undo these, the last of them first.
    ///
    /// A step makes `y = u₀ x + u₁ e(x, t)`; the one that undoes it makes `x = (y - u₁ e)/u₀` of `e(y, t)`: the network is asked at the
    /// less noisy latents with the timestep of the noisier ones, which is all that keeps it from being exact (DDIM inversion: Song et al.
    /// 2021, section 4.3; Mokady et al. 2023). For DDIM and a network that predicts ε this is diffusers' `DDIMInverseScheduler`. Latents
    /// enter as they are; what comes out is unit noise times [`Schedule::initial_scale`] of the sampler.
    ///
    /// `Error::Usage` where a step depends on those before it or on noise, so that it cannot be undone alone, and `Error::Model` where it
    /// keeps nothing of `x`.
    pub fn inverted(&self) -> Result<Schedule> {
        if self.needs.history > 0 || self.needs.noise {
            let what = "an inversion undoes a sampler step by step, which takes --sampler ddim or euler without --eta";
            return Err(Error::Usage(what.into()));
        }
        let steps = self.steps.iter().rev().map(Step::inverted).collect::<Result<_>>()?;
        Ok(Schedule { steps, initial_scale: 1.0, needs: self.needs })
    }
}

impl Step {
    fn inverted(&self) -> Result<Step> {
        let kept = self.kept();
        if kept == 0.0 {
            let what = format!("the sampling step at timestep {} keeps nothing of its latents", self.timestep);
            return Err(Error::Model(format!("{what}: from what it makes no noise can be told")));
        }
        let undone = |(index, u): (usize, &f64)| if index == 0 { 1.0 / kept } else { -u / kept };
        Ok(Step { update: self.update.iter().enumerate().map(undone).collect(), ..self.clone() })
    }

    /// The coefficient of the latents of this step in the next ones, for samplers without history.
    pub(crate) fn kept(&self) -> f64 {
        self.update[0]
    }
}
