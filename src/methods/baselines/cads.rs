//! CADS (Sadat et al. 2023, arXiv 2310.17347, algorithm 1): sampling with noise on the text states, less and less of it.

use crate::exec::Executor;
use crate::methods::sampling_loop::SamplingLoop;
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::pipeline::conditioning::{Branch, Text};
use crate::pipeline::generate::{self, Generator, Image, Job, Loaded};
use crate::pipeline::{Observer, Pipeline};
use crate::sampler::{draw, normal};
use crate::{Error, Result};
use serde_json::{Value, json};

/// The schedule's numbers. Time runs from 1 to 0.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Cads {
    /// Below this time the text states are clean.
    pub tau1: f64,
    /// Above this time they are noise alone.
    pub tau2: f64,
    /// Standard deviation `s` of the noise.
    pub scale: f64,
    /// Weight ψ of the noisy states brought back to the mean and deviation of the clean ones; the rest is not brought back.
    pub psi: f64,
    /// The unconditional states are corrupted too; the paper leaves them clean.
    pub negatives: bool,
    /// Dynamic guidance: the guidance weight is multiplied with γ as well.
    pub dynamic_guidance: bool,
}

impl Default for Cads {
    /// What the public ports for Stable Diffusion use.
    fn default() -> Cads {
        Cads { tau1: 0.6, tau2: 0.9, scale: 0.25, psi: 1.0, negatives: false, dynamic_guidance: false }
    }
}

impl ImageMethod for Cads {
    fn name(&self) -> &'static str {
        "cads"
    }

    fn title(&self) -> String {
        "CADS".into()
    }

    fn options(&self) -> Value {
        json!(self)
    }

    fn remarks(&self, settings: &generate::Settings) -> Vec<String> {
        let is_guided = settings.sampler.cfg_pp || settings.sampler.guidance != 1.0;
        let flags = [("--cads-negative", self.negatives), ("--cads-guidance", self.dynamic_guidance)];
        let unused = flags.iter().filter(|(_, given)| *given && !is_guided);
        unused.map(|(flag, _)| format!("{flag}: --guidance 1 runs the prompt's branch only")).collect()
    }

    fn check(&self, _batch: usize) -> Result<()> {
        self.validate()
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        let (cads, settings) = (*self, request.settings.clone());
        let generator = Generator::plan(pipeline, executor, settings, request.batch)?;
        Ok(Box::new(SamplingLoop::new(generator, move |images, jobs, observe| run(images, &cads, jobs, observe))))
    }
}

/// Makes one full batch of images.
pub fn run(images: &mut Loaded<'_, '_>, cads: &Cads, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
    cads.validate()?;
    if cads.dynamic_guidance && images.is_cfg_pp() {
        return Err(Error::Usage("CADS with dynamic guidance does not go with CFG++".into()));
    }
    images.begin(jobs)?;
    let (prompts, negatives) = (images.texts(Branch::Prompt)?, images.texts(Branch::Negative)?);
    let guidance = images.guidance();
    let steps = images.schedule.steps.len();
    let mut clean = true;
    for step in 0..steps {
        let gamma = cads.gamma(step, steps);
        if gamma < 1.0 || !clean {
            let corrupted = |texts: &[Text], branch: u64| -> Vec<Text> {
                let draw = draw::TEXT + 2 * step as u64 + branch;
                texts.iter().zip(jobs).map(|(text, job)| corrupted(text, cads, gamma, job.seed, draw)).collect()
            };
            let prompts = corrupted(&prompts, 0);
            let negatives = if cads.negatives { corrupted(&negatives, 1) } else { vec![] };
            images.condition_on(&[(Branch::Prompt, &prompts), (Branch::Negative, &negatives)])?;
            clean = gamma >= 1.0;
        }
        if cads.dynamic_guidance {
            images.guide(step, gamma * guidance);
        }
        images.step(step, observe)?;
    }
    images.finish(observe)
}

/// Context and pooled text each with noise of their own.
fn corrupted(text: &Text, cads: &Cads, gamma: f64, seed: u64, draw: u64) -> Text {
    let mut text = text.clone();
    let split = text.context.len();
    let mut noise = vec![0.0; split + text.pooled.len()];
    normal(seed, draw, &mut noise);
    cads.corrupt(&mut text.context, gamma, &noise[..split]);
    cads.corrupt(&mut text.pooled, gamma, &noise[split..]);
    text
}

impl Cads {
    /// `Error::Usage` where the numbers make no schedule.
    pub fn validate(&self) -> Result<()> {
        let fraction = |x: f64| (0.0..=1.0).contains(&x);
        if !(fraction(self.tau1) && fraction(self.tau2) && self.tau1 < self.tau2) {
            let what =
                format!("CADS from {} to {}: must be times between 0 and 1, the lower first", self.tau1, self.tau2);
            return Err(Error::Usage(what));
        }
        if !(self.scale >= 0.0 && self.scale.is_finite() && fraction(self.psi)) {
            let (scale, psi) = (self.scale, self.psi);
            return Err(Error::Usage(format!("CADS noise {scale}, mixing {psi}: must be 0 or more, and 0 to 1")));
        }
        Ok(())
    }

    /// The fraction γ of the clean states at step `index` of `steps`.
    pub fn gamma(&self, index: usize, steps: usize) -> f64 {
        let t = 1.0 - index as f64 / steps as f64;
        ((self.tau2 - t) / (self.tau2 - self.tau1)).clamp(0.0, 1.0)
    }

    /// `ŷ = √γ y + s √(1 − γ) n`, brought back to the mean and deviation of `y` with weight ψ; mean and deviation are those of all
    /// numbers. At γ = 1 nothing changes, not a bit.
    pub fn corrupt(&self, y: &mut [f32], gamma: f64, noise: &[f32]) {
        if gamma >= 1.0 || y.is_empty() {
            return;
        }
        let (mean, std) = moments(y.iter().map(|y| f64::from(*y)));
        let mixed = |y: f32, n: f32| gamma.sqrt() * f64::from(y) + self.scale * (1.0 - gamma).sqrt() * f64::from(n);
        let noisy: Vec<f64> = y.iter().zip(noise).map(|(y, n)| mixed(*y, *n)).collect();
        let (noisy_mean, noisy_std) = moments(noisy.iter().copied());
        // Without noise at γ = 0 all numbers are equal, and there is nothing to bring back.
        let back = if noisy_std > 0.0 { std / noisy_std } else { 0.0 };
        for (y, noisy) in y.iter_mut().zip(noisy) {
            let rescaled = (noisy - noisy_mean) * back + mean;
            *y = (self.psi * rescaled + (1.0 - self.psi) * noisy) as f32;
        }
    }
}

fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let variance = values.map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gamma_falls_from_one_to_zero() {
        let cads = Cads::default();
        let gammas: Vec<f64> = (0..50).map(|i| cads.gamma(i, 50)).collect();
        assert!(gammas[..=5].iter().all(|g| *g < 1e-12) && gammas[20..].iter().all(|g| *g == 1.0));
        assert!(gammas[5..=20].windows(2).all(|pair| pair[0] < pair[1]));
        let few: Vec<f64> = (0..4).map(|i| cads.gamma(i, 4)).collect();
        assert!(few.iter().zip([0.0, 0.5, 1.0, 1.0]).all(|(g, expected)| (g - expected).abs() < 1e-12), "{few:?}");
        assert!(Cads { tau1: 0.9, tau2: 0.6, ..cads }.validate().is_err() && cads.validate().is_ok());
    }

    fn states() -> (Vec<f32>, Vec<f32>) {
        let (mut y, mut n) = (vec![0.0; 600], vec![0.0; 600]);
        normal(1, 0, &mut y);
        normal(2, 0, &mut n);
        y.iter_mut().for_each(|y| *y = 0.3 + 2.0 * *y);
        (y, n)
    }

    #[test]
    fn corruption_keeps_mean_and_deviation() {
        let (y, n) = states();
        let of = |y: &[f32]| moments(y.iter().map(|y| f64::from(*y)));
        for gamma in [0.0, 0.3, 0.9] {
            let mut noisy = y.clone();
            Cads::default().corrupt(&mut noisy, gamma, &n);
            let ((mean, std), (expected_mean, expected)) = (of(&noisy), of(&y));
            assert!((mean - expected_mean).abs() < 1e-5 && (std - expected).abs() < 1e-5, "{mean} {std}");
            assert!(noisy != y);
        }
    }

    #[test]
    fn edges() {
        let (y, n) = states();
        let corrupted = |cads: Cads, gamma: f64, y: &[f32]| {
            let mut noisy = y.to_vec();
            cads.corrupt(&mut noisy, gamma, &n);
            noisy
        };
        let cads = Cads::default();
        assert!(corrupted(cads, 1.0, &y) == y, "nothing changes at γ = 1");
        // At γ = 0 and ψ = 1 the scale of the noise is brought back.
        let (one, other) = (corrupted(cads, 0.0, &y), corrupted(Cads { scale: 4.0, ..cads }, 0.0, &y));
        assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-5));
        // ψ = 0 leaves the noisy states alone.
        let raw = corrupted(Cads { psi: 0.0, ..cads }, 0.25, &y);
        let expected = 0.5 * y[7] + 0.25 * 0.75f32.sqrt() * n[7];
        assert!((raw[7] - expected).abs() < 1e-6);
        // Without deviation nothing is divided by it.
        assert!(corrupted(Cads { scale: 0.0, ..cads }, 0.0, &y).iter().all(|y| y.is_finite()));
        assert!(corrupted(cads, 0.5, &[1.0; 600]).iter().all(|y| y.is_finite()));
    }
}
