//! Noise levels of MinorityPrompt (Um & Ye 2025): where its objective is evaluated, and the tables of its released code.

use crate::models::config::SchedulerConfig;
use crate::sampler::{
    Guide, Level, Method, Needs, Schedule, Settings, Table, check, level_at, level_at_fraction, spaced,
};
use crate::{Error, Result};

/// How the timestep `s` of the second estimate follows from that of the first, `t`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Renoise {
    /// `s = T − t`: the noisier the latents, the less noise is added to their estimate.
    Annealed,
    /// `s = ⌊ratio · T⌋` at every step.
    Fixed(f64),
}

/// Whose tables of noise levels a run follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Convention {
    /// diffusers': the level of timestep `t` is `ᾱ_t`.
    #[default]
    Diffusers,
    /// The released MinorityPrompt's: the level of timestep `t` is `ᾱ_{t−1}`, the image is the estimate of the last step, and the
    /// annealed second timestep is `T − t + stride − 1`.
    Released,
}

/// The tables of the released code (`latent_diffusion.py`, `latent_sdxl.py`): DDIM, plain or CFG++.
pub fn released(config: &SchedulerConfig, settings: &Settings) -> Result<Schedule> {
    check(config, settings)?;
    if settings.method != Method::Ddim || settings.eta > 0.0 {
        let what = format!("the released code samples with ddim without noise, not {}", settings.method);
        return Err(Error::Usage(what));
    }
    let needs = Needs { history: 0, switch: false, noise: false, uncond: settings.cfg_pp || settings.guidance != 1.0 };
    let guide = Guide { prediction: config.prediction, settings, needs };
    let table = Table::new(config)?;
    let times: Vec<i64> = spaced(config, settings.spacing(config), settings.steps)
        .into_iter()
        .map(|t| t.round_ties_even() as i64)
        .collect();
    let stride = (config.train_timesteps / settings.steps) as i64;
    let step = |(index, &t): (usize, &i64)| {
        let last = index + 1 == times.len();
        let to = if last { 1.0 } else { shifted(&table, t - stride) };
        guide.single(t as f64, Level::from_alpha_bar(shifted(&table, t)), to.sqrt(), (1.0 - to).sqrt(), 0.0)
    };
    Ok(Schedule { steps: times.iter().enumerate().map(step).collect(), initial_scale: 1.0, needs })
}

/// `ᾱ_{t−1}`, 1 at `t = 0`.
fn shifted(table: &Table, t: i64) -> f64 {
    if t == 0 { 1.0 } else { table.alpha_bar(t - 1) }
}

/// The timestep and the level of the second estimate after a first one at timestep `t`.
///
/// Diffusers' convention keeps `s` within `1 ..= T − 1`, the timesteps that have noise and that the model was trained at.
/// `Error::Usage` where the released code would read beyond its tables: `s > T`, at the last steps of a run of many.
pub fn renoise(
    config: &SchedulerConfig,
    steps: usize,
    convention: Convention,
    rule: Renoise,
    t: f64,
) -> Result<(f64, Level)> {
    let last = config.train_timesteps;
    Ok(match (convention, rule) {
        (_, Renoise::Fixed(fraction)) => level_at_fraction(config, fraction)?,
        (Convention::Diffusers, Renoise::Annealed) => {
            let s = (last as f64 - t).clamp(1.0, (last - 1) as f64);
            (s, level_at(config, s.round_ties_even() as i64)?)
        }
        (Convention::Released, Renoise::Annealed) => {
            let s = last as f64 - t + (last / steps) as f64 - 1.0;
            if s > last as f64 {
                return Err(Error::Usage(format!(
                    "the released code has no noise level for the second estimate at timestep {t}: {s} of {last}; \
                     optimise fewer steps or leave released mode"
                )));
            }
            (s, Level::from_alpha_bar(shifted(&Table::new(config)?, s as i64)))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::config::{BetaSchedule, Prediction, Spacing};
    use crate::sampler::{Step, UPDATE, fraction_with_signal};

    fn config(spacing: Spacing) -> SchedulerConfig {
        SchedulerConfig {
            class: "DDIMScheduler".into(),
            train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction: Prediction::Epsilon,
            spacing: Some(spacing),
            steps_offset: 1,
            set_alpha_to_one: false,
            rescale_zero_snr: false,
            karras: false,
            unsupported: None,
        }
    }

    fn settings(steps: usize) -> Settings {
        Settings { method: Method::Ddim, spacing: None, steps, eta: 0.0, guidance: 7.5, cfg_pp: false }
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-6, "{found}, not {expected}");
    }

    /// Timesteps and levels of the released code, computed from its formulas.
    #[test]
    fn released_tables() {
        let many = released(&config(Spacing::Leading), &settings(50)).unwrap();
        let times: Vec<f64> = many.steps.iter().map(|step| step.timestep).collect();
        assert_eq!(times, (0..50).map(|i| f64::from(981 - 20 * i)).collect::<Vec<_>>());
        for (index, alpha_bar) in [(0, 0.0058437838), (1, 0.0073652446), (4, 0.0141511420), (49, 0.99915)] {
            close(many.steps[index].alpha.powi(2), alpha_bar);
        }
        let few = released(&config(Spacing::Trailing), &settings(4)).unwrap();
        for (step, (t, alpha_bar)) in few.steps.iter().zip([
            (999.0, 0.0047166989),
            (749.0, 0.0570799704),
            (499.0, 0.2790099565),
            (249.0, 0.6770708151),
        ]) {
            assert_eq!(step.timestep, t);
            close(step.alpha.powi(2), alpha_bar);
        }
        for (steps, times) in
            [(2, vec![999.0, 499.0]), (8, vec![999.0, 874.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0])]
        {
            let found = released(&config(Spacing::Trailing), &settings(steps)).unwrap();
            assert_eq!(found.steps.iter().map(|step| step.timestep).collect::<Vec<_>>(), times);
        }
    }

    #[test]
    fn released_second_levels() {
        let annealed = |steps: usize, t: f64| {
            renoise(&config(Spacing::Leading), steps, Convention::Released, Renoise::Annealed, t)
        };
        let many = [
            (981.0, 38.0, 0.9649),
            (961.0, 58.0, 0.9441),
            (941.0, 78.0, 0.9218),
            (921.0, 98.0, 0.8979),
            (901.0, 118.0, 0.8726),
        ];
        let few = [(999.0, 250.0, 0.6754), (749.0, 500.0, 0.2777), (499.0, 750.0, 0.0566), (249.0, 1000.0, 0.00466)];
        for (steps, t, s, alpha_bar) in
            many.map(|(t, s, a)| (50, t, s, a)).into_iter().chain(few.map(|(t, s, a)| (4, t, s, a)))
        {
            let (found, level) = annealed(steps, t).unwrap();
            assert_eq!(found, s);
            assert!((level.alpha.powi(2) - alpha_bar).abs() < 6e-5, "{s}: {}", level.alpha.powi(2));
        }
        let error = annealed(50, 1.0).unwrap_err().to_string();
        assert!(error.contains("1018 of 1000"), "{error}");
        let (s, level) =
            renoise(&config(Spacing::Leading), 50, Convention::Released, Renoise::Fixed(0.75), 981.0).unwrap();
        assert_eq!(s, 750.0);
        close(level.alpha.powi(2), 0.05616985);
    }

    /// CFG++ at weight 1: x₀ from the prompt's branch, renoised with the other; plain DDIM where the branches agree.
    #[test]
    fn cfg_pp_renoises_with_the_unconditional_branch() {
        let settings = |guidance, cfg_pp| Settings { guidance, cfg_pp, ..settings(50) };
        let plus = released(&config(Spacing::Leading), &settings(1.0, true)).unwrap();
        let plain = released(&config(Spacing::Leading), &settings(1.0, false)).unwrap();
        let plain_steps = &plain.steps;
        let update = |step: &Step| step.buffers().find(|(name, _)| *name == UPDATE).unwrap().1.to_vec();
        for (index, (plus, plain)) in plus.steps.iter().zip(plain_steps).enumerate() {
            // The last step leads to the estimate itself.
            let next = plain_steps.get(index + 1).map_or(1.0, |next| next.alpha.powi(2));
            let next = Level::from_alpha_bar(next);
            let [x, with, without] = update(plus)[..] else { panic!("three coefficients") };
            close(x, next.alpha / plus.alpha);
            close(with, -next.alpha * plus.sigma / plus.alpha);
            close(without, next.sigma);
            assert_eq!(update(plain).len(), 2);
            close(with + without, update(plain)[1]);
            close(x, update(plain)[0]);
        }
    }

    #[test]
    fn shares_have_the_signal_asked_for() {
        let fraction = |alpha_bar| fraction_with_signal(&config(Spacing::Leading), alpha_bar).unwrap();
        assert_eq!([fraction(0.0141512), fraction(1.0), fraction(0.0046)], [0.9, 0.0, 1.0]);
        let noisier = SchedulerConfig { beta_end: 0.025, ..config(Spacing::Leading) };
        let fraction = fraction_with_signal(&noisier, 0.0141512).unwrap();
        assert!((0.6..0.8).contains(&fraction), "{fraction}");
    }

    #[test]
    fn second_levels_stay_in_the_table() {
        let at = |t: f64| renoise(&config(Spacing::Leading), 50, Convention::Diffusers, Renoise::Annealed, t).unwrap();
        assert_eq!([at(981.0).0, at(501.0).0, at(1.0).0, at(0.0).0], [19.0, 499.0, 999.0, 999.0]);
        let (s, level) = at(999.9);
        assert_eq!(s, 1.0);
        assert!(level.sigma > 0.0);
    }
}
