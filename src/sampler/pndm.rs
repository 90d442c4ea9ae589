//! PLMS: pseudo linear multi-step of order four (Liu et al. 2022, arXiv 2202.09778), warmed up by one repeated step.

use super::schedule::{Level, spaced};
use super::*;

/// Adams–Bashforth weights of `[d, history…]` by the number of earlier predictions.
const WEIGHTS: [[f64; 4]; 4] = [
    [1.0, 0.0, 0.0, 0.0],
    [3.0 / 2.0, -1.0 / 2.0, 0.0, 0.0],
    [23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0, 0.0],
    [55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];

pub fn schedule(config: &SchedulerConfig, table: &Table, spacing: Spacing, mut guide: Guide) -> Schedule {
    guide.needs.history = 3;
    guide.needs.switch = true;
    let stride = (config.train_timesteps / guide.settings.steps) as i64;
    let mut timesteps: Vec<i64> =
        spaced(config, spacing, guide.settings.steps).into_iter().map(|t| t.round_ties_even() as i64).collect();
    if let Some(&second) = timesteps.get(1) {
        timesteps.insert(1, second);
    }
    let step = |(i, &t): (usize, &i64)| {
        let (level, store) = (Level::from_alpha_bar(table.alpha_bar(t)), [0.0, 1.0]);
        if i == 1 {
            return guide.multi(
                t as f64,
                level,
                store,
                repeat(table, guide.prediction, timesteps[0], t, stride),
                false,
            );
        }
        let [on_x, on_d] = transfer(table, guide.prediction, t, t - stride);
        let weights = WEIGHTS[i.saturating_sub(1).min(3)].map(|w| on_d * w);
        guide.multi(t as f64, level, store, [&[on_x], &weights[..]].concat(), true)
    };
    let steps = timesteps.iter().enumerate().map(step).collect();
    Schedule { steps, initial_scale: 1.0, needs: guide.needs }
}

/// The second call redoes the first step with the mean of both predictions. Its starting latents are gone, but the first step
/// was `x = a x_start + b h₁`, so they come back as `(x - b h₁) / a` and need no buffer of their own.
fn repeat(table: &Table, prediction: Prediction, first: i64, t: i64, stride: i64) -> Vec<f64> {
    let [a, b] = transfer(table, prediction, first, first - stride);
    // diffusers restarts from t + stride, which is not quite `first` where the spacing is uneven.
    let [on_start, on_mean] = transfer(table, prediction, t + stride, t);
    vec![on_start / a, on_mean / 2.0, on_mean / 2.0 - on_start * b / a, 0.0, 0.0]
}

/// Equation 9: from one training step to another with prediction `d`, as coefficients of `[x, d]`.
fn transfer(table: &Table, prediction: Prediction, from: i64, to: i64) -> [f64; 2] {
    let (from, to) = (table.alpha_bar(from), table.alpha_bar(to));
    let on_x = (to / from).sqrt();
    let on_eps = -(to - from) / (from * (1.0 - to).sqrt() + (from * (1.0 - from) * to).sqrt());
    let [x, d] = Level::from_alpha_bar(from).eps(prediction);
    [on_x + on_eps * x, on_eps * d]
}
