//! DDIM (Song et al. 2020, eq. 12 and 16), with CFG++ renoising where asked.

use super::schedule::spaced;
use super::*;

pub fn schedule(config: &SchedulerConfig, table: &Table, spacing: Spacing, guide: Guide) -> Schedule {
    let Settings { steps, eta, .. } = *guide.settings;
    let stride = (config.train_timesteps / steps) as i64;
    let step = |t: f64| {
        let t = t.round_ties_even();
        let (from, to) = (table.alpha_bar(t as i64), table.alpha_bar(t as i64 - stride));
        let variance = ((1.0 - to) / (1.0 - from) * (1.0 - from / to)).max(0.0);
        let std = eta * variance.sqrt();
        let direction = (1.0 - to - std * std).max(0.0).sqrt();
        guide.single(t, Level::from_alpha_bar(from), to.sqrt(), direction, std)
    };
    let steps = spaced(config, spacing, steps).into_iter().map(step).collect();
    Schedule { steps, initial_scale: 1.0, needs: guide.needs }
}
