//! Euler and Euler ancestral steps over `sigma / alpha` (Karras et al. 2022; k-diffusion), written for variance-preserving latents.

use super::schedule::{Level, interpolate, karras, spaced, timestep_of};
use super::*;

pub fn schedule(config: &SchedulerConfig, table: &Table, spacing: Spacing, guide: Guide) -> Schedule {
    let ancestral = guide.settings.method == Method::EulerAncestral;
    let table = table.ratios();
    // diffusers keeps these timesteps in f32 and does not round them.
    let mut timesteps: Vec<f64> =
        spaced(config, spacing, guide.settings.steps).into_iter().map(|t| f64::from(t as f32)).collect();
    let mut ratios: Vec<f64> = timesteps.iter().map(|&t| interpolate(&table, t)).collect();
    if config.karras && !ancestral {
        ratios = karras(ratios[0], ratios[ratios.len() - 1], ratios.len());
        timesteps = ratios.iter().map(|&r| f64::from(timestep_of(r, &table) as f32)).collect();
    }
    let ratios: Vec<f64> = ratios.into_iter().map(|r| f64::from(r as f32)).chain([0.0]).collect();
    let step = |(&t, pair): (&f64, &[f64])| {
        let (from, to) = (pair[0], pair[1]);
        let up = if ancestral { (to * to * (from * from - to * to) / (from * from)).max(0.0).sqrt() } else { 0.0 };
        let down = (to * to - up * up).max(0.0).sqrt();
        let alpha = Level::from_ratio(to).alpha;
        guide.single(t, Level::from_ratio(from), alpha, alpha * down, alpha * up)
    };
    let steps = timesteps.iter().zip(ratios.windows(2)).map(step).collect();
    // `init_noise_sigma` times the first alpha: "leading" draws from the marginal of all noise levels, the others do not.
    let initial_scale = if spacing == Spacing::Leading { 1.0 } else { Level::from_ratio(ratios[0]).sigma };
    Schedule { steps, initial_scale, needs: guide.needs }
}
