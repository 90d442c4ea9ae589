//! Noise levels: the training table, the timesteps a sampler visits, and what a prediction says at a level.
//!
//! Tables are rounded to f32 where torch and numpy do, so that timesteps and levels equal those of diffusers.

use crate::models::config::{BetaSchedule, Prediction, SchedulerConfig, Spacing};
use crate::{Error, Result};

/// Stands for a terminal `ᾱ` of 0 where a formula divides by it: the smallest f16 subnormal, as diffusers does.
const SMALLEST_ALPHA_BAR: f32 = 1.0 / (1 << 24) as f32;

/// Latents are `alpha x₀ + sigma ε`, `alpha² + sigma² = 1`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    pub alpha: f64,
    pub sigma: f64,
}

impl Level {
    /// From the cumulative product `ᾱ = alpha²`.
    pub fn from_alpha_bar(alpha_bar: f64) -> Level {
        Level { alpha: alpha_bar.sqrt(), sigma: (1.0 - alpha_bar).sqrt() }
    }

    /// From the noise-to-signal ratio `sigma / alpha`, the `sigma` of Karras et al. 2022.
    pub fn from_ratio(ratio: f64) -> Level {
        let alpha = 1.0 / (ratio * ratio + 1.0).sqrt();
        Level { alpha, sigma: ratio * alpha }
    }

    /// `x₀` as coefficients of `[x, e]` (Salimans & Ho 2022 for v).
    pub fn x0(self, prediction: Prediction) -> [f64; 2] {
        let Level { alpha, sigma } = self;
        match prediction {
            Prediction::Epsilon => {
                let alpha = alpha.max(f64::from(SMALLEST_ALPHA_BAR).sqrt());
                [1.0 / alpha, -sigma / alpha]
            }
            Prediction::V => [alpha, -sigma],
            Prediction::Sample => [0.0, 1.0],
        }
    }

    /// `ε` as coefficients of `[x, e]`.
    pub fn eps(self, prediction: Prediction) -> [f64; 2] {
        let Level { alpha, sigma } = self;
        match prediction {
            Prediction::Epsilon => [0.0, 1.0],
            Prediction::V => [sigma, alpha],
            Prediction::Sample => [1.0 / sigma, -alpha / sigma],
        }
    }
}

/// The levels a model was trained at, by training step.
pub struct Table {
    alpha_bars: Vec<f32>,
    set_alpha_to_one: bool,
}

impl Table {
    /// `alphas_cumprod` of the model, terminal zero included where the schedule is rescaled to it.
    /// `Error::Model` where the numbers describe no diffusion.
    pub fn new(config: &SchedulerConfig) -> Result<Table> {
        let wrong = |what: String| Err(Error::Model(format!("scheduler_config.json: {what}")));
        let SchedulerConfig { train_timesteps: n, beta_start, beta_end, .. } = *config;
        if !(2..=1 << 20).contains(&n) {
            return wrong(format!("num_train_timesteps {n} must be 2 to {}", 1 << 20));
        }
        if ![beta_start, beta_end].iter().all(|b| *b > 0.0 && *b < 1.0) {
            return wrong(format!("beta_start {beta_start} and beta_end {beta_end} must lie between 0 and 1"));
        }
        let mut betas = betas(config);
        if config.rescale_zero_snr {
            rescale_zero_terminal_snr(&mut betas);
        }
        let alpha_bars = cumulative(&betas);
        let ordinary = |a: &f32| *a > 0.0 && *a < 1.0;
        let checked = if config.rescale_zero_snr { n - 1 } else { n };
        if let Some(bad) = alpha_bars[..checked].iter().position(|a| !ordinary(a)) {
            return wrong(format!("the betas leave either no signal or no noise at training step {bad}"));
        }
        Ok(Table { alpha_bars, set_alpha_to_one: config.set_alpha_to_one })
    }

    /// `ᾱ` at a training step; before step 0 the final one: 1 or that of step 0. Past the end the last.
    pub fn alpha_bar(&self, timestep: i64) -> f64 {
        let last = self.alpha_bars.len() - 1;
        match usize::try_from(timestep) {
            Ok(t) => self.alpha_bars[t.min(last)].into(),
            Err(_) if self.set_alpha_to_one => 1.0,
            Err(_) => self.alpha_bars[0].into(),
        }
    }

    /// `sigma / alpha` at every training step, ascending, finite.
    pub fn ratios(&self) -> Vec<f32> {
        let mut alpha_bars = self.alpha_bars.clone();
        if let Some(last) = alpha_bars.last_mut().filter(|a| **a <= 0.0) {
            *last = SMALLEST_ALPHA_BAR;
        }
        alpha_bars.iter().map(|&a| ((1.0 - a) / a).sqrt()).collect()
    }
}

/// The noise level of training step `t`, as diffusers counts them.
pub fn level_at(config: &SchedulerConfig, t: i64) -> Result<Level> {
    Ok(Level::from_alpha_bar(Table::new(config)?.alpha_bar(t)))
}

/// The timestep at this fraction of the training steps, kept within `1 ..= T − 1`, the timesteps that have noise and that the model was
/// trained at; and its level.
pub fn level_at_fraction(config: &SchedulerConfig, fraction: f64) -> Result<(f64, Level)> {
    let last = config.train_timesteps;
    let t = ((last as f64 * fraction) as usize).clamp(1, last.saturating_sub(1).max(1));
    Ok((t as f64, level_at(config, t as i64)?))
}

/// The fraction of the training steps above which `ᾱ` is at most this; 1 where it never is. What one model does at a timestep another
/// does where it has as much signal.
pub fn fraction_with_signal(config: &SchedulerConfig, alpha_bar: f64) -> Result<f64> {
    let (table, last) = (Table::new(config)?, config.train_timesteps);
    let above = (0..last).find(|t| table.alpha_bar(*t as i64) <= alpha_bar);
    Ok(above.unwrap_or(last) as f64 / last as f64)
}

fn betas(config: &SchedulerConfig) -> Vec<f32> {
    let n = config.train_timesteps;
    match config.beta_schedule {
        BetaSchedule::Linear => linspace_f32(config.beta_start, config.beta_end, n),
        BetaSchedule::ScaledLinear => {
            let mut roots = linspace_f32(config.beta_start.sqrt(), config.beta_end.sqrt(), n);
            roots.iter_mut().for_each(|b| *b *= *b);
            roots
        }
        BetaSchedule::SquaredCosCapV2 => {
            // Nichol & Dhariwal 2021, eq. 17, betas capped at 0.999.
            let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
            let at = |i: usize| i as f64 / n as f64;
            (0..n).map(|i| (1.0 - alpha_bar(at(i + 1)) / alpha_bar(at(i))).min(0.999) as f32).collect()
        }
    }
}

/// `torch.linspace` in f32: from both ends towards the middle.
fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = if n > 1 { (end - start) / (n - 1) as f32 } else { 0.0 };
    (0..n)
        .map(|i| if i < n / 2 || n == 1 { start + step * i as f32 } else { end - step * (n - i - 1) as f32 })
        .collect()
}

/// Lin et al. 2023, algorithm 1: shifts and scales `√ᾱ` so that it ends at 0 and starts where it did.
fn rescale_zero_terminal_snr(betas: &mut [f32]) {
    let mut roots: Vec<f32> = cumulative(betas).into_iter().map(f32::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return };
    let scale = first / (first - last);
    roots.iter_mut().for_each(|r| *r = (*r - last) * scale);
    let mut before = 1.0;
    for (beta, root) in betas.iter_mut().zip(&roots) {
        let alpha_bar = root * root;
        *beta = 1.0 - alpha_bar / before;
        before = alpha_bar;
    }
}

/// `cumprod(1 - betas)`; torch on the CPU accumulates f32 in f64.
fn cumulative(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0f64;
    let step = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(step).collect()
}

/// `count` training steps from noisy to clean, before rounding (Lin et al. 2023, table 2). numpy's arithmetic, digit for digit:
/// where a value ends in .5 its last bit decides which way it rounds. An offset never leads past the last training step.
pub fn spaced(config: &SchedulerConfig, spacing: Spacing, count: usize) -> Vec<f64> {
    let train = config.train_timesteps;
    match spacing {
        Spacing::Linspace => linspace(train, count).into_iter().rev().collect(),
        Spacing::Leading => {
            let ratio = train / count;
            (0..count).rev().map(|i| (i * ratio).saturating_add(config.steps_offset).min(train - 1) as f64).collect()
        }
        Spacing::Trailing => trailing(train, count),
    }
}

/// `numpy.linspace(0, train - 1, count)`.
pub fn linspace(train: usize, count: usize) -> Vec<f64> {
    let end = (train - 1) as f64;
    let step = if count > 1 { end / (count - 1) as f64 } else { 0.0 };
    (0..count).map(|i| if i > 0 && i == count - 1 { end } else { i as f64 * step }).collect()
}

/// `round(numpy.arange(train, 0, -train / count)) - 1`.
pub fn trailing(train: usize, count: usize) -> Vec<f64> {
    let start = train as f64;
    let delta = (start - start / count as f64) - start;
    (0..count).map(|i| (start + i as f64 * delta).round_ties_even() - 1.0).collect()
}

/// `numpy.interp` of a table over its indices.
pub fn interpolate(table: &[f32], at: f64) -> f64 {
    let last = table.len() - 1;
    let low = at.clamp(0.0, last as f64) as usize;
    let (a, b) = (f64::from(table[low]), f64::from(table[(low + 1).min(last)]));
    if low == last { a } else { (b - a) * (at - low as f64) + a }
}

/// `count` ratios from `max` to `min`, evenly spaced in their seventh root (Karras et al. 2022, eq. 5).
pub fn karras(max: f64, min: f64, count: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (from, to) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
    let step = if count > 1 { 1.0 / (count - 1) as f64 } else { 0.0 };
    let ramp = |i: usize| if i > 0 && i == count - 1 { 1.0 } else { i as f64 * step };
    (0..count).map(|i| (from + ramp(i) * (to - from)).powf(RHO)).collect()
}

/// The training step, fractional, at which the table reaches `ratio`: linear in the logarithm, clamped to the table.
pub fn timestep_of(ratio: f64, table: &[f32]) -> f64 {
    let log = |v: f32| f64::from(v).ln() as f32;
    let wanted = ratio.max(1e-10).ln();
    let above = table.partition_point(|&v| f64::from(log(v)) <= wanted);
    let low = above.saturating_sub(1).min(table.len().saturating_sub(2));
    let (Some(&a), Some(&b)) = (table.get(low), table.get(low + 1)) else { return 0.0 };
    let (a, b) = (log(a), log(b));
    let w = ((f64::from(a) - wanted) / f64::from(a - b)).clamp(0.0, 1.0);
    (1.0 - w) * low as f64 + w * (low + 1) as f64
}
