//! The promise: every sampler ends where its diffusers scheduler ends, and tables are finite, small and refuse nonsense.

use rarebit::models::config::{BetaSchedule, Prediction, SchedulerConfig, Spacing};
use rarebit::program::{Builder, DType};
use rarebit::sampler::{
    HISTORY, LATENTS, Method, Needs, PUSH, STORE, Schedule, Settings, UPDATE, append_update, schedule,
};
use serde_json::Value;
use std::collections::HashSet;

const SIZE: usize = 16;
const SPACINGS: [(&str, Spacing); 3] =
    [("leading", Spacing::Leading), ("linspace", Spacing::Linspace), ("trailing", Spacing::Trailing)];
const PREDICTIONS: [(&str, Prediction); 3] =
    [("epsilon", Prediction::Epsilon), ("v_prediction", Prediction::V), ("sample", Prediction::Sample)];
const BETAS: [(&str, BetaSchedule); 3] = [
    ("linear", BetaSchedule::Linear),
    ("scaled_linear", BetaSchedule::ScaledLinear),
    ("squaredcos_cap_v2", BetaSchedule::SquaredCosCapV2),
];

fn golden() -> Value {
    serde_json::from_str(include_str!("../data/schedulers.json")).expect("golden file")
}

fn named<T: Copy>(names: &[(&str, T)], name: &Value) -> T {
    names.iter().find(|(n, _)| name == n).unwrap_or_else(|| panic!("{name} is unknown")).1
}

fn stable_diffusion() -> SchedulerConfig {
    SchedulerConfig {
        class: "PNDMScheduler".into(),
        train_timesteps: 1000,
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        prediction: Prediction::Epsilon,
        spacing: None,
        steps_offset: 1,
        set_alpha_to_one: false,
        rescale_zero_snr: false,
        karras: false,
        unsupported: None,
    }
}

fn settings(method: Method, steps: usize) -> Settings {
    Settings { method, spacing: None, steps, eta: 0.0, guidance: 1.0, cfg_pp: false }
}

fn method(name: &Value) -> Method {
    name.as_str().expect("method").parse().expect("method")
}

/// Model and settings of a golden case.
fn read(case: &Value) -> (SchedulerConfig, Settings) {
    let number = |key: &str, default: f64| case[key].as_f64().unwrap_or(default);
    let flag = |key: &str| case[key].as_bool().unwrap_or(false);
    let config = SchedulerConfig {
        beta_start: number("beta_start", f64::NAN),
        beta_end: number("beta_end", f64::NAN),
        beta_schedule: named(&BETAS, &case["beta_schedule"]),
        prediction: named(&PREDICTIONS, &case["prediction"]),
        steps_offset: number("steps_offset", f64::NAN) as usize,
        set_alpha_to_one: flag("set_alpha_to_one"),
        rescale_zero_snr: flag("rescale_zero_snr"),
        karras: flag("karras"),
        ..stable_diffusion()
    };
    let settings = Settings {
        method: method(&case["method"]),
        spacing: Some(named(&SPACINGS, &case["spacing"])),
        steps: case["steps"].as_u64().expect("steps") as usize,
        eta: number("eta", 0.0),
        guidance: number("guidance", 1.0),
        cfg_pp: flag("cfg_pp"),
    };
    (config, settings)
}

type Latents = [f64; SIZE];

fn unit_noise(draw: usize) -> Latents {
    std::array::from_fn(|i| f64::from((1.5 * (1.0 + 1.7 * i as f64 + 12.9898 * draw as f64).sin()) as f32))
}

fn linear(coefficients: &[f64], terms: &[Latents]) -> Latents {
    assert_eq!(coefficients.len(), terms.len());
    std::array::from_fn(|i| coefficients.iter().zip(terms).filter(|(c, _)| **c != 0.0).map(|(c, t)| c * t[i]).sum())
}

/// Runs a schedule as a step program would, with the analytic network of the dump.
fn simulate(schedule: &Schedule) -> Latents {
    let needs = schedule.needs;
    let mut x = unit_noise(0).map(|v| v * schedule.initial_scale);
    let mut history = vec![[f64::NAN; SIZE]; needs.history];
    for (k, step) in schedule.steps.iter().enumerate() {
        let buffer = |name: &str| step.buffers().find(|(n, _)| *n == name).map(|(_, c)| c).unwrap_or(&[]);
        let t = step.timestep / 100.0;
        let mut terms = vec![x, x.map(|v| (0.7 * v).tanh() + 0.1 * t.sin())];
        if needs.uncond {
            terms.push(x.map(|v| (0.5 * v).tanh() - 0.1 * t.cos()));
        }
        if needs.noise {
            terms.push(unit_noise(k + 1));
        }
        if needs.history == 0 {
            x = linear(buffer(UPDATE), &terms);
            continue;
        }
        let stored = linear(buffer(STORE), &terms);
        x = linear(buffer(UPDATE), &[&[x, stored], &history[..]].concat());
        if !needs.switch || buffer(PUSH) == [1.0, 0.0] {
            history.insert(0, stored);
            history.pop();
        } else {
            assert_eq!(buffer(PUSH), [0.0, 1.0]);
        }
    }
    x
}

/// Of the largest latent: what f32 rounding leaves of twenty steps of diffusers.
const TOLERANCE: f64 = 1e-5;

/// Equal in f32, except where they come from f32 logarithms, whose last bit depends on numpy's build.
fn same_timesteps(case: &Value, got: &[f64], expected: &[f64]) -> bool {
    let slack = if case["method"] == "euler" && case["karras"] == true { 1e-6 } else { 0.0 };
    let same = |(a, b): (&f64, &f64)| *a as f32 == *b as f32 || (a - b).abs() <= slack * b.abs();
    got.len() == expected.len() && got.iter().zip(expected).all(same)
}

#[test]
fn every_case_ends_where_diffusers_ends() {
    let golden = golden();
    let mut failures = vec![];
    let mut worst: f64 = 0.0;
    for case in golden["cases"].as_array().expect("cases") {
        let (config, settings) = read(case);
        let schedule = schedule(&config, &settings).expect("schedule");
        let timesteps: Vec<f64> = schedule.steps.iter().map(|s| s.timestep).collect();
        let expected: Vec<f64> = serde_json::from_value(case["timesteps"].clone()).expect("timesteps");
        let latents: Vec<f64> = serde_json::from_value(case["latents"].clone()).expect("latents");
        let scale = latents.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let got = simulate(&schedule);
        let error = got.iter().zip(&latents).fold(0.0f64, |m, (a, b)| m.max((a - b).abs() / scale));
        if !same_timesteps(case, &timesteps, &expected) || error.is_nan() || error > TOLERANCE {
            failures.push(format!("{} error {error:.2e} timesteps {timesteps:?}", serde_json::json!(case)));
        }
        worst = worst.max(error);
    }
    assert!(failures.is_empty(), "{} cases differ:\n{}", failures.len(), failures.join("\n"));
    println!("worst relative error {worst:.2e}");
}

#[test]
fn golden_file_is_complete() {
    let golden = golden();
    let cases = golden["cases"].as_array().expect("cases");
    let key = |m: &Value, p: &Value, s: &Value, n: u64| format!("{m} {p} {s} {n}");
    let have: HashSet<String> = cases
        .iter()
        .map(|c| key(&c["method"], &c["prediction"], &c["spacing"], c["steps"].as_u64().expect("steps")))
        .collect();
    for m in Method::ALL {
        for (p, prediction) in PREDICTIONS {
            // diffusers has no "sample" for these two.
            if prediction == Prediction::Sample && matches!(m, Method::EulerAncestral | Method::Pndm) {
                continue;
            }
            for (s, _) in SPACINGS {
                for n in [1, 2, 5, 10, 20] {
                    let wanted = key(&m.name().into(), &p.into(), &s.into(), n);
                    assert!(have.contains(&wanted), "golden file lacks {wanted}");
                }
            }
        }
    }
    assert_eq!(cases.len(), CASES, "golden file has lost cases");
}

const CASES: usize = 347;

#[test]
fn timesteps_of_every_step_count() {
    let golden = golden();
    let rows = golden["checksums"].as_array().expect("checksums");
    assert_eq!(rows.len(), 12);
    for row in rows {
        let sums: Vec<u64> = serde_json::from_value(row["sums"].clone()).expect("sums");
        assert_eq!(sums.len(), 256);
        for (i, expected) in sums.iter().enumerate() {
            let config = SchedulerConfig { spacing: Some(named(&SPACINGS, &row["spacing"])), ..stable_diffusion() };
            let schedule = schedule(&config, &settings(method(&row["method"]), i + 1)).expect("schedule");
            let bits = schedule.steps.iter().map(|s| u64::from((s.timestep as f32).to_bits()));
            let sum = bits.enumerate().fold(0, |sum, (i, b)| (sum + (i as u64 + 1) * b) % ((1 << 31) - 1));
            assert_eq!(sum, *expected, "{} {} {} steps", row["method"], row["spacing"], i + 1);
        }
    }
}

/// Whatever the model and the settings, no coefficient is infinite or not a number.
#[test]
fn coefficients_are_finite() {
    for m in Method::ALL {
        for (_, beta_schedule) in BETAS {
            for (_, prediction) in PREDICTIONS {
                for (_, spacing) in SPACINGS {
                    for rescale_zero_snr in [false, true] {
                        for steps in [1, 2, 3, 17, 333, 999, 1000] {
                            let config =
                                SchedulerConfig { beta_schedule, prediction, rescale_zero_snr, ..stable_diffusion() };
                            let s = Settings { spacing: Some(spacing), guidance: 7.5, ..settings(m, steps) };
                            if m == Method::Pndm && (rescale_zero_snr || prediction == Prediction::Sample) {
                                assert!(schedule(&config, &s).is_err());
                                continue;
                            }
                            assert_finite(&schedule(&config, &s).expect("schedule"), &format!("{s:?} {config:?}"));
                        }
                    }
                }
            }
        }
    }
}

fn assert_finite(schedule: &Schedule, what: &str) {
    assert!(schedule.initial_scale.is_finite() && schedule.initial_scale > 0.0, "{what}");
    for step in &schedule.steps {
        let scalars = [step.timestep, step.alpha, step.sigma, step.denoised[0], step.denoised[1]];
        assert!(scalars.iter().all(|v| v.is_finite()), "{what}: {step:?}");
        assert!((step.alpha.powi(2) + step.sigma.powi(2) - 1.0).abs() < 1e-6, "{what}: {step:?}");
        assert!((0.0..=999.0).contains(&step.timestep), "{what}: {step:?}");
        for (_, c) in step.buffers() {
            assert!(c.iter().all(|v| (*v as f32).is_finite()), "{what}: {step:?}");
        }
    }
}

/// The step program declares exactly the buffers a step writes and carries its state under the same names.
#[test]
fn fragments_fit_their_tables() {
    for m in Method::ALL {
        for guidance in [1.0, 7.5] {
            let table = schedule(&stable_diffusion(), &Settings { guidance, ..settings(m, 8) }).expect("schedule");
            let mut b = Builder::new("step", DType::F32);
            let shape = [2, 4, 4, 4];
            let x = b.input(LATENTS, &shape);
            let e_cond = b.input("e_cond", &shape);
            let e_uncond = table.needs.uncond.then(|| b.input("e_uncond", &shape));
            append_update(&mut b, table.needs, x, e_cond.into(), e_uncond.map(Into::into));
            let program = b.finish().expect("program");
            let inputs: Vec<(String, usize)> = program
                .inputs
                .iter()
                .map(|&id| match &program.value(id).origin {
                    rarebit::program::Origin::Input(name) => (name.clone(), program.value(id).len()),
                    other => panic!("{other:?}"),
                })
                .collect();
            for step in &table.steps {
                for (name, c) in step.buffers() {
                    assert!(inputs.contains(&(name.to_string(), c.len())), "{m}: {name} {c:?} in {inputs:?}");
                }
            }
            let outputs: Vec<&str> = program.outputs.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(outputs.len(), 1 + table.needs.history);
            assert!(outputs.contains(&LATENTS));
            assert!(HISTORY[..table.needs.history].iter().all(|h| outputs.contains(h)));
            let coefficients = inputs.iter().filter(|(name, _)| name.starts_with("sampler.")).count();
            assert_eq!(coefficients, table.steps[0].buffers().count());
        }
    }
}

#[test]
fn a_missing_branch_is_an_error() {
    let needs = Needs { history: 0, switch: false, noise: false, uncond: true };
    let mut b = Builder::new("step", DType::F32);
    let x = b.input(LATENTS, &[1, 2, 2, 4]);
    append_update(&mut b, needs, x, x.into(), None);
    assert!(b.finish().is_err());
}

#[test]
fn nonsense_is_refused_in_one_line() {
    let config = stable_diffusion();
    let base = settings(Method::Ddim, 10);
    let bad = [
        Settings { steps: 0, ..base },
        Settings { steps: 1001, ..base },
        Settings { guidance: f64::NAN, ..base },
        Settings { eta: -0.1, ..base },
        Settings { eta: 1.1, ..base },
        Settings { eta: f64::NAN, ..base },
        Settings { eta: 0.5, method: Method::Euler, ..base },
        Settings { cfg_pp: true, guidance: 0.0, ..base },
        Settings { cfg_pp: true, guidance: 7.5, ..base },
        Settings { cfg_pp: true, guidance: 0.5, method: Method::Pndm, ..base },
    ];
    for settings in bad {
        let error = schedule(&config, &settings).expect_err("refused");
        assert_eq!(error.exit_code(), 2, "{settings:?}");
        assert!(!error.to_string().contains('\n'));
    }
    let models = [
        SchedulerConfig { beta_start: 0.0, ..stable_diffusion() },
        SchedulerConfig { beta_end: f64::NAN, ..stable_diffusion() },
        SchedulerConfig { beta_start: 0.5, beta_end: 0.9, ..stable_diffusion() },
        SchedulerConfig { beta_start: 1e-12, ..stable_diffusion() },
        SchedulerConfig { train_timesteps: usize::MAX, ..stable_diffusion() },
    ];
    for config in models {
        assert_eq!(schedule(&config, &base).expect_err("refused").exit_code(), 1, "{config:?}");
    }
    assert!("heun".parse::<Method>().is_err());
    assert!(Method::ALL.iter().all(|m| m.to_string().parse::<Method>().ok() == Some(*m)));
}

/// Without CFG++ a weight of 1 leaves the unconditional branch out; with it the noise still comes from that branch.
#[test]
fn cfg_pp_runs_both_branches_even_at_one() {
    for m in [Method::Ddim, Method::Euler] {
        let s = Settings { cfg_pp: true, ..settings(m, 10) };
        assert!(schedule(&stable_diffusion(), &s).expect("schedule").needs.uncond);
        let plain = Settings { cfg_pp: false, ..s };
        assert!(!schedule(&stable_diffusion(), &plain).expect("schedule").needs.uncond);
    }
}

/// Without a word from the user or the model's file, each sampler spreads its timesteps as its diffusers class does.
#[test]
fn spacing_falls_back_to_the_sampler() {
    for method in Method::ALL {
        let usual = match method {
            Method::Ddim | Method::Pndm => Spacing::Leading,
            _ => Spacing::Linspace,
        };
        let asked = Settings { spacing: Some(usual), ..settings(method, 7) };
        assert_eq!(
            schedule(&stable_diffusion(), &settings(method, 7)).unwrap(),
            schedule(&stable_diffusion(), &asked).unwrap(),
            "{method}"
        );
        let model = SchedulerConfig { spacing: Some(Spacing::Trailing), ..stable_diffusion() };
        let trailing = Settings { spacing: Some(Spacing::Trailing), ..settings(method, 7) };
        assert_eq!(schedule(&model, &settings(method, 7)).unwrap(), schedule(&model, &trailing).unwrap(), "{method}");
    }
}
