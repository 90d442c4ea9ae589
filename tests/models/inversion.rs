//! Inversions: exact where the network says the same at both ends of a step, as diffusers makes them, and the way back to the image.

use crate::common::golden::{Golden, data_folder, relative_error};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::models::config::{BetaSchedule, Prediction, SchedulerConfig, Spacing};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{self, Generator, Job};
use rarebit::pipeline::inversion::Inversion;
use rarebit::pipeline::networks::{Networks, Tensor};
use rarebit::plan::Footprint;
use rarebit::program::DType;
use rarebit::sampler::{Method, Rng, Schedule, Settings, Step, UPDATE, schedule};
use rarebit::{Error, assets};
use safetensors::SafeTensors;

/// Relative, as for whole sampling runs in `golden.rs`; diffusers embeds its timesteps in f32.
const LIMIT: f64 = 2e-5;
const MODELS: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];

fn sampler(method: Method, steps: usize) -> Settings {
    Settings { method, spacing: Some(Spacing::Leading), steps, eta: 0.0, guidance: 1.0, cfg_pp: false }
}

fn images(pipeline: &Pipeline, steps: usize, dtype: DType) -> generate::Settings {
    let side = pipeline.config.image_size;
    generate::Settings { width: side, height: side, sampler: sampler(Method::Ddim, steps), rng: Rng::Philox, dtype }
}

/// `[on x, on e]` of every step.
fn updates(schedule: &Schedule) -> Vec<[f64; 2]> {
    let update = |step: &Step| {
        let (_, values) = step.buffers().find(|(name, _)| *name == UPDATE).unwrap();
        [values[0], values[1]]
    };
    schedule.steps.iter().map(update).collect()
}

fn stable_diffusion(prediction: Prediction) -> SchedulerConfig {
    SchedulerConfig {
        class: "DDIMScheduler".into(),
        train_timesteps: 1000,
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        prediction,
        spacing: None,
        steps_offset: 1,
        set_alpha_to_one: false,
        rescale_zero_snr: false,
        karras: false,
        unsupported: None,
    }
}

/// Starts from `x` and makes every step with the prediction that `e` makes of step and latents.
fn follow(updates: &[[f64; 2]], x: f64, e: impl Fn(usize, f64) -> f64) -> f64 {
    updates.iter().enumerate().fold(x, |x, (step, [on_x, on_e])| on_x * x + on_e * e(step, x))
}

#[test]
fn exact_where_a_prediction_does_not_depend_on_the_latents() {
    const STEPS: usize = 12;
    for prediction in [Prediction::Epsilon, Prediction::V, Prediction::Sample] {
        for spacing in [Spacing::Leading, Spacing::Linspace, Spacing::Trailing] {
            let settings = Settings { spacing: Some(spacing), ..sampler(Method::Ddim, STEPS) };
            let forward = schedule(&stable_diffusion(prediction), &settings).unwrap();
            let backward = forward.inverted().unwrap();
            let e = |step: usize| 0.3 * (1.0 + step as f64).sin();
            let clean = follow(&updates(&forward), 1.7, |step, _| e(step));
            let noise = follow(&updates(&backward), clean, |step, _| e(STEPS - 1 - step));
            assert!((noise - 1.7).abs() < 1e-11, "{prediction:?}, {spacing:?}: {noise}");
            let of = |schedule: &Schedule| schedule.steps.iter().map(|step| step.timestep).collect::<Vec<_>>();
            assert_eq!(of(&backward), of(&forward).into_iter().rev().collect::<Vec<_>>());
        }
    }
}

/// The timesteps and the first level of the released code of NAO: 50 steps, clean latents at the level of timestep 0.
#[test]
fn the_schedule_of_the_released_code() {
    let forward = schedule(&stable_diffusion(Prediction::Epsilon), &sampler(Method::Ddim, 50)).unwrap();
    let inverted = forward.inverted().unwrap();
    let timesteps: Vec<f64> = inverted.steps.iter().map(|step| step.timestep).collect();
    assert_eq!((timesteps[0], timesteps[1], timesteps[49]), (1.0, 21.0, 981.0));
    let (at_0, at_1) = (0.99915f64, 0.998_296_03_f64);
    let [on_x, on_e] = updates(&inverted)[0];
    assert!((on_x - (at_1 / at_0).sqrt()).abs() < 1e-7, "{on_x}");
    let expected = (1.0 - at_1).sqrt() - (at_1 * (1.0 - at_0) / at_0).sqrt();
    assert!((on_e - expected).abs() < 1e-6, "{on_e}, not {expected}");
}

#[test]
fn what_cannot_be_inverted() {
    let config = stable_diffusion(Prediction::Epsilon);
    let inverted = |config: &SchedulerConfig, settings: Settings| schedule(config, &settings).unwrap().inverted();
    for method in [Method::EulerAncestral, Method::Dpmpp2m, Method::Dpmpp2mKarras, Method::Pndm] {
        assert!(matches!(inverted(&config, sampler(method, 10)), Err(Error::Usage(_))), "{method}");
    }
    assert!(matches!(inverted(&config, Settings { eta: 0.5, ..sampler(Method::Ddim, 10) }), Err(Error::Usage(_))));
    assert!(inverted(&config, sampler(Method::Euler, 10)).is_ok());
    let last_is_clean = SchedulerConfig { set_alpha_to_one: true, ..stable_diffusion(Prediction::Sample) };
    assert!(matches!(inverted(&last_is_clean, sampler(Method::Ddim, 10)), Err(Error::Model(_))));
}

/// Noises `[C, h, w]` of latents.
fn invert(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    settings: generate::Settings,
    refinements: usize,
    prompts: &[&str],
    latents: &[Vec<f32>],
) -> Vec<Vec<f32>> {
    executor.clear();
    let inversion = Inversion::plan(pipeline, executor, &settings, prompts.len(), refinements).unwrap();
    let (mut calls, expected) = (0, inversion.nfe() / prompts.len());
    let mut loaded = inversion.load(executor).unwrap();
    let count = &mut |_: rarebit::pipeline::Progress<'_>| {
        calls += 1;
        Ok(())
    };
    let noises = loaded.run(executor, prompts, latents, count).unwrap();
    assert_eq!(calls, expected, "a UNet call for each that is counted");
    noises
}

#[test]
fn against_a_loop_of_diffusers() {
    let golden = Golden::open("inversion");
    for case in golden.cases("tiny") {
        let pipeline = Golden::open(&case.name).pipeline();
        let tensor = |what: &str| golden.tensor(&format!("{}/{what}", case.name)).unwrap();
        let latents = tensor("latents");
        let images_of = |tensor: &Tensor| -> Vec<Vec<f32>> {
            tensor.data.chunks(tensor.data.len() / tensor.shape[0]).map(<[f32]>::to_vec).collect()
        };
        let prompts = ["a red star on a dark blue background", "a small green circle"];
        for (what, refinements) in [("noise", 0), ("refined", case.number("refinements") as usize)] {
            let settings = images(&pipeline, case.number("steps") as usize, DType::F64);
            let cpu = &mut Cpu::<f64>::new();
            let found = invert(&pipeline, cpu, settings, refinements, &prompts, &images_of(&latents));
            let error = relative_error(&found.concat(), &tensor(what).data);
            println!("{} {what}: {error:.1e}", case.name);
            assert!(error < LIMIT, "{} {what}: {error}", case.name);
        }
        let apart = relative_error(&tensor("refined").data, &tensor("noise").data);
        assert!(apart > 1e-3, "{}: refined or not is no difference", case.name);
    }
}

/// Latents of renders of the `shapes` world, means of the encoder's posterior at the UNet's scale.
fn scenes(pipeline: &Pipeline, count: usize) -> Vec<Vec<f32>> {
    let bytes = std::fs::read(data_folder("shapes").join("reader.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let scenes = file.tensor("scenes").unwrap();
    let [height, width, channels] = scenes.shape()[1..] else { panic!("{:?}", scenes.shape()) };
    let vae = &pipeline.config.vae;
    let mut cpu = Cpu::<f32>::new();
    let mut networks = Networks::new(pipeline, &mut cpu, DType::F32);
    let encode = |scene: &[u8]| {
        let pixels: Vec<f32> = scene.iter().map(|&x| f32::from(x) / 127.5 - 1.0).collect();
        let data = generate::to_channels_first(&pixels, channels);
        let (means, _) = networks.encode(&Tensor { shape: vec![1, channels, height, width], data }).unwrap();
        let scaled = |x: &f32| ((f64::from(*x) - vae.shift_factor) * vae.scaling_factor) as f32;
        means.data.iter().map(scaled).collect()
    };
    scenes.data().chunks(height * width * channels).take(count).map(encode).collect()
}

/// The way there and back at guidance 1 ends the closer to where it began the shorter the steps, and the more often each is refined.
#[test]
fn there_and_back() {
    let pipeline = Pipeline::open(assets::shapes().unwrap(), None).unwrap();
    let latents = scenes(&pipeline, 2);
    let prompts = ["a circle"; 2];
    let error = |steps: usize, refinements: usize| {
        let settings = images(&pipeline, steps, DType::F32);
        let mut cpu = Cpu::<f32>::new();
        let noises = invert(&pipeline, &mut cpu, settings.clone(), refinements, &prompts, &latents);
        let job = |noise: Vec<f32>| Job { prompt: prompts[0].into(), negative: None, seed: 0, draws: vec![noise] };
        let jobs: Vec<Job> = noises.into_iter().map(job).collect();
        cpu.clear();
        let generator = Generator::plan(&pipeline, &cpu, settings, jobs.len()).unwrap();
        let images = generator.load(&mut cpu).unwrap().run(&jobs, &mut |_| Ok(())).unwrap();
        let made: Vec<f32> = images.into_iter().flat_map(|image| image.latents).collect();
        relative_error(&made, &latents.concat())
    };
    let found = [error(5, 0), error(20, 0), error(20, 2)];
    println!("relative error of the latents: {found:?}");
    assert!(found[1] < 0.85 * found[0] && found[2] < 0.2 * found[1], "{found:?}");
}

#[test]
fn a_batch_gives_the_bits_of_its_images_alone() {
    for name in MODELS {
        let pipeline = Golden::open(name).pipeline();
        let stored = Golden::open("inversion").tensor(&format!("{name}/latents")).unwrap();
        let latents: Vec<Vec<f32>> = stored.data.chunks(stored.data.len() / 2).map(<[f32]>::to_vec).collect();
        let of = |prompts: &[&str], latents: &[Vec<f32>]| {
            invert(&pipeline, &mut Cpu::<f32>::new(), images(&pipeline, 3, DType::F32), 1, prompts, latents)
        };
        let together = of(&["a red star", "a blue ring"], &latents);
        assert!(of(&["a blue ring"], &latents[1..])[0] == together[1], "{name}");
    }
}

/// An inversion and a run of another batch, number of steps and guidance on one executor leave each other alone.
#[test]
fn goes_beside_what_samples() {
    let pipeline = Golden::open("tiny-sdxl").pipeline();
    let stored = Golden::open("inversion").tensor("tiny-sdxl/latents").unwrap();
    let latents = vec![stored.data[..stored.data.len() / 2].to_vec()];
    let settings = images(&pipeline, 3, DType::F32);
    let prompts = ["a red star"];
    let alone = invert(&pipeline, &mut Cpu::<f32>::new(), settings.clone(), 0, &prompts, &latents);

    let sampler = Settings { guidance: 4.0, ..sampler(Method::Ddim, 2) };
    let sampling = generate::Settings { sampler, ..settings.clone() };
    let job = |seed: u64| Job { prompt: "a blue ring".into(), negative: None, seed, draws: vec![] };
    let jobs = [job(1), job(2)];
    let mut cpu = Cpu::<f32>::new();
    let plan = |cpu: &Cpu<f32>| Generator::plan(&pipeline, cpu, sampling.clone(), 2).unwrap();
    let images = plan(&cpu).load(&mut cpu).unwrap().run(&jobs, &mut |_| Ok(())).unwrap();

    cpu.clear();
    let inversion = Inversion::plan(&pipeline, &cpu, &settings, 1, 0).unwrap();
    let generator = plan(&cpu);
    let both = [&inversion.programs()[..], &generator.programs().all()].concat();
    let (footprint, parts) = (Footprint::of(&both), [inversion.footprint(), generator.footprint()]);
    assert_eq!(footprint.buffer_bytes, parts[0].buffer_bytes + parts[1].buffer_bytes, "no buffer is shared");
    assert_eq!(footprint.weight_bytes, parts[1].weight_bytes, "all weights are, and the decoder is not its");
    assert!(parts[0].weight_bytes < parts[1].weight_bytes);
    let mut inversion = inversion.load(&mut cpu).unwrap();
    let mut generator = generator.load(&mut cpu).unwrap();
    for _ in 0..2 {
        let noises = inversion.run(generator.executor(), &prompts, &latents, &mut |_| Ok(())).unwrap();
        assert_eq!(noises, alone);
        let again = generator.run(&jobs, &mut |_| Ok(())).unwrap();
        assert!(again.iter().zip(&images).all(|(a, b)| a.latents == b.latents && a.rgb == b.rgb));
    }
}

#[test]
fn what_does_not_fit() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let mut cpu = Cpu::<f32>::new();
    let inversion = Inversion::plan(&pipeline, &cpu, &images(&pipeline, 2, DType::F32), 1, 0).unwrap();
    let mut loaded = inversion.load(&mut cpu).unwrap();
    let mut refused = |prompts: &[&str], latents: &[Vec<f32>]| {
        assert!(matches!(loaded.run(&mut cpu, prompts, latents, &mut |_| Ok(())), Err(Error::Usage(_))));
    };
    refused(&["a star"], &[vec![0.0; 7]]);
    refused(&["a star"], &[]);
    refused(&["a star", "a ring"], &[vec![0.0; 256], vec![0.0; 256]]);
    let spoilt = loaded.run(&mut cpu, &["a star"], &[vec![f32::NAN; 256]], &mut |_| Ok(()));
    assert!(matches!(spoilt, Err(Error::NotFinite(_))));
}
