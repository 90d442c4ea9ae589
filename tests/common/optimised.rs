//! A short run of MinorityPrompt on a device, and how far it is from the same run in f64.
//!
//! In 16 bits no run gets nearer than exact arithmetic with the same storage (`tests/common/rounded.rs`): that is what a device is
//! measured by. How near that is depends on the prompt and the noise: of two images of the embedded model at timestep 751 the
//! gradients of exact arithmetic are off by 0.002 and 0.018 in f16 and by 0.03 and 0.19 in bf16, an angle. It is a draw of
//! rounding errors that a few directions are far more sensitive to than others: of six images of tiny-sd1 in two types the
//! emulation's angles are 0.4 to 2.1 times those of storage alone, and 1.2 (f16) and 1.05 (bf16) times all six together.

use super::golden::relative_error;
use super::minority::settings;
use rarebit::exec::Executor;
use rarebit::methods::minority::Minority;
use rarebit::optimize::objective::loss_scale;
use rarebit::optimize::variable::Variable;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::Progress;
use rarebit::pipeline::generate::{Image, Job};
use rarebit::program::DType;
use rarebit::{Error, Result};

/// What a run leaves behind. Tokens are per tower, `[B, C]`.
pub struct Optimised {
    /// J per iteration and image.
    pub scores: Vec<Vec<f64>>,
    /// At the first iteration.
    pub gradient: Vec<Vec<f64>>,
    pub learned: Vec<Vec<f32>>,
    /// What the token began as.
    pub first: Vec<Vec<f32>>,
    pub images: Vec<Image>,
}

/// Runs `common::minority::settings` up to the first iteration, which leaves its gradient, and then from beginning to end.
pub fn optimise(pipeline: &Pipeline, executor: &mut dyn Executor, dtype: DType, jobs: &[Job]) -> Result<Optimised> {
    let mut settings = settings(pipeline, dtype);
    settings.loss_scale = loss_scale(dtype);
    let seeds: Vec<u64> = jobs.iter().map(|job| 100 + job.seed).collect();
    let first = match &settings.variable {
        Variable::Token(token) => token.initial(pipeline, &seeds)?,
        Variable::TextStates(_) | Variable::Latents => vec![],
    };
    let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
    let mut loaded = Minority::plan(pipeline, executor, settings, &prompts)?.load(executor)?;
    // An error that is not this one comes again below.
    let _ = loaded.run(jobs, &seeds, &mut |progress| match progress {
        Progress::Iteration(_) => Err(Error::Usage("one iteration is enough".into())),
        Progress::Step { .. }
        | Progress::Image { .. }
        | Progress::Preview { .. }
        | Progress::Remark { .. }
        | Progress::Again => Ok(()),
    });
    let gradient = loaded.gradient()?;
    let mut scores = vec![];
    let images = loaded.run(jobs, &seeds, &mut |progress| {
        if let Progress::Iteration(Some(iteration)) = progress {
            scores.push(iteration.score.clone());
        }
        Ok(())
    })?;
    Ok(Optimised { scores, gradient, learned: loaded.learned()?, first, images })
}

/// A 16-bit run may be this many times as far off as exact arithmetic with the same storage; the gradient of one image, a draw
/// each, so many times.
const MARGIN: f64 = 2.0;
const MARGIN_OF_DRAWS: f64 = 4.0;
/// Whatever storage does: an angle, and a fraction of signs, of which chance alone gets half right.
const FURTHEST: f64 = 0.5;
const SIGNS: f64 = 0.25;
/// Of f32 runs.
const SINGLE: f64 = 1e-4;
/// J is one number, which storage alone may by chance get right: it may be off by so many roundings.
const ROUNDINGS: f64 = 4.0;

/// How far a run is from another; of towers and images the furthest.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    /// Of J, relative.
    pub score: f64,
    /// Between the gradients, an angle.
    pub gradient: f64,
    /// Fraction of the token's numbers that moved the other way, but for one of each: one whose gradient is next to nothing turns by any
    /// rounding, and of 32 it is more than the share that angles of a fiftieth allow.
    pub signs: f64,
    /// Of the latents, relative.
    pub latents: f64,
}

impl Distance {
    /// What is allowed where storage alone leads as far as `storage`.
    pub fn allowed(dtype: DType, storage: Option<Distance>) -> Distance {
        let unit = match dtype {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            DType::F32 | DType::F64 | DType::I32 => SINGLE / ROUNDINGS,
        };
        let [gradient, latents] = storage.map_or([0.0; 2], |storage| [storage.gradient, storage.latents]);
        let (gradient, latents) = ((SINGLE + MARGIN_OF_DRAWS * gradient).min(FURTHEST), SINGLE + MARGIN * latents);
        // Adam's first step is the rate times a sign, however small the number. Of a vector that is off by an angle θ, θ / π of the
        // signs turn (where its numbers are normal), and one of 128 turns the movement by 0.18 already: signs are counted.
        Distance { score: ROUNDINGS * unit, gradient, signs: gradient.min(SIGNS), latents }
    }

    /// What it is of, and how far off.
    pub fn parts(&self) -> [(&'static str, f64); 4] {
        [
            ("J, relative error", self.score),
            ("gradient to the token, angle", self.gradient),
            ("token's numbers that moved the other way, share", self.signs),
            ("latents, relative error", self.latents),
        ]
    }
}

impl Optimised {
    fn moved(&self) -> Vec<Vec<f64>> {
        let less = |(now, first): (&f32, &f32)| f64::from(*now) - f64::from(*first);
        self.learned.iter().zip(&self.first).map(|(now, first)| now.iter().zip(first).map(less).collect()).collect()
    }

    pub fn distance(&self, exact: &Optimised) -> Distance {
        assert_eq!((self.scores.len(), self.images.len()), (exact.scores.len(), exact.images.len()));
        let relative = |(a, b): (&f64, &f64)| (a - b).abs() / b.abs();
        let scores = self.scores.iter().flatten().zip(exact.scores.iter().flatten());
        let other_way = |(a, b): (&Vec<f64>, &Vec<f64>)| {
            let turned = a.iter().zip(b).filter(|(a, b)| (**a > 0.0) != (**b > 0.0)).count();
            turned.saturating_sub(1) as f64 / b.len() as f64
        };
        let (moved, should) = (self.moved(), exact.moved());
        let images = self.images.iter().zip(&exact.images);
        Distance {
            score: furthest(scores.map(relative)),
            gradient: furthest(self.gradient.iter().zip(&exact.gradient).map(|(a, b)| angle(a, b))),
            signs: furthest(moved.iter().zip(&should).map(other_way)),
            latents: furthest(images.map(|(a, b)| relative_error(&a.latents, &b.latents))),
        }
    }
}

/// The greatest, and not a number where one is not.
fn furthest(distances: impl Iterator<Item = f64>) -> f64 {
    distances.fold(0.0, |a, b| if a >= b { a } else { b })
}

/// Between two vectors, from the chord between their directions: their cosine near 1 has lost it.
fn angle(a: &[f64], b: &[f64]) -> f64 {
    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (a_length, b_length) = (length(a), length(b));
    let chord = a.iter().zip(b).map(|(a, b)| (a / a_length - b / b_length).powi(2)).sum::<f64>().sqrt();
    2.0 * (chord / 2.0).min(1.0).asin()
}
