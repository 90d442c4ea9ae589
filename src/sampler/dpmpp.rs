//! DPM-Solver++ 2M, midpoint, last step of first order (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

use super::schedule::{Level, interpolate, karras, linspace, timestep_of, trailing};
use super::*;
use crate::models::config::BetaSchedule;

pub fn schedule(config: &SchedulerConfig, table: &Table, spacing: Spacing, mut guide: Guide) -> Schedule {
    guide.needs.history = 1;
    let table = table.ratios();
    let (timesteps, ratios) = match guide.settings.method {
        Method::Dpmpp2mKarras => karras_levels(config, guide.settings.steps, &table),
        _ => {
            let timesteps = timesteps(config, spacing, guide.settings.steps);
            let ratios = timesteps.iter().map(|&t| interpolate(&table, t)).collect();
            (timesteps, ratios)
        }
    };
    let ratios: Vec<f64> = ratios.into_iter().map(|r| f64::from(r as f32)).chain([0.0]).collect();
    let step = |i: usize| {
        let (from, to) = (Level::from_ratio(ratios[i]), Level::from_ratio(ratios[i + 1]));
        // e^-h with h the step in log(alpha / sigma); the last step goes to h = ∞.
        let decay = ratios[i + 1] / ratios[i];
        let gain = to.alpha * (1.0 - decay);
        let bend = if i == 0 { 0.0 } else { midpoint(ratios[i - 1], ratios[i], ratios[i + 1]) };
        let update = vec![to.sigma / from.sigma, gain * (1.0 + bend), -gain * bend];
        guide.multi(timesteps[i], from, from.x0(guide.prediction), update, true)
    };
    Schedule { steps: (0..timesteps.len()).map(step).collect(), initial_scale: 1.0, needs: guide.needs }
}

/// `1 / 2r`, `r` the ratio of this step to the one before in log(alpha / sigma); 0, first order, where a step is empty or infinite.
fn midpoint(before: f64, from: f64, to: f64) -> f64 {
    let (h_before, h) = ((before / from).ln(), (from / to).ln());
    if h_before > 0.0 && h.is_finite() { 0.5 * h / h_before } else { 0.0 }
}

/// This class spaces one step more than it takes and leaves out the cleanest, except for "trailing".
fn timesteps(config: &SchedulerConfig, spacing: Spacing, steps: usize) -> Vec<f64> {
    let train = config.train_timesteps;
    match spacing {
        Spacing::Linspace => linspace(train, steps + 1).into_iter().skip(1).rev().map(f64::round_ties_even).collect(),
        Spacing::Leading => {
            let ratio = train / (steps + 1);
            (1..=steps).rev().map(|i| (i * ratio).saturating_add(config.steps_offset).min(train - 1) as f64).collect()
        }
        Spacing::Trailing => trailing(train, steps),
    }
}

/// Levels over the whole training range; diffusers rounds their timesteps, and cuts them for the cosine schedule.
fn karras_levels(config: &SchedulerConfig, steps: usize, table: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let ratios = karras(table[table.len() - 1].into(), table[0].into(), steps);
    let whole = match config.beta_schedule {
        BetaSchedule::SquaredCosCapV2 => f64::trunc,
        BetaSchedule::Linear | BetaSchedule::ScaledLinear => f64::round_ties_even,
    };
    (ratios.iter().map(|&r| whole(timestep_of(r, table))).collect(), ratios)
}
