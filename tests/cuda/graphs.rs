//! Programs recorded as graphs, on the emulated driver: the same bits as launch by launch, where the arena lies elsewhere too, and
//! what a sampling step and a whole image ask of the driver.

use crate::common::emulated::cuda;
use crate::common::golden::Golden;
use crate::common::recording_driver::{count, recording};
use rarebit::exec::Executor;
use rarebit::exec::cuda::{Cuda, Settings as Emulation};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::Progress;
use rarebit::pipeline::generate::{Generator, Job, Settings};
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};
use std::rc::Rc;

const STEPS: usize = 4;
const SIDE: usize = 16;

fn settings(method: Method) -> Settings {
    let sampler = sampler::Settings { method, spacing: None, steps: STEPS, eta: 0.0, guidance: 4.0, cfg_pp: false };
    Settings { width: SIDE, height: SIDE, sampler, rng: Rng::Philox, dtype: DType::F16 }
}

fn job(seed: u64) -> Job {
    let prompt = ["a red star", "a small green heart"][seed as usize % 2];
    Job { prompt: prompt.into(), negative: None, seed, draws: vec![] }
}

/// Latents and pixels of images, one after the other.
fn images(pipeline: &Pipeline, executor: &mut Cuda) -> Vec<(Vec<f32>, Vec<u8>)> {
    let generator = Generator::plan(pipeline, executor, settings(Method::EulerAncestral), 1).unwrap();
    let mut loaded = generator.load(executor).unwrap();
    (0..3)
        .map(|seed| loaded.run(&[job(seed)], &mut |_| Ok(())).unwrap().remove(0))
        .map(|i| (i.latents, i.rgb))
        .collect()
}

#[test]
fn replays_have_the_bits_of_their_launches() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let mut eager = cuda(Emulation::default().workers(2)).with_graphs(false);
    let mut recorded = cuda(Emulation::default().workers(2));
    let expected = images(&pipeline, &mut eager);
    assert!(expected[0] != expected[1], "inputs are read anew by every run");
    assert_eq!(images(&pipeline, &mut recorded), expected);
}

#[test]
fn a_larger_program_moves_the_arena_and_graphs_are_made_anew() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let calls = Rc::default();
    let mut moved = recording(&calls, None);
    let small = Generator::plan(&pipeline, &moved, settings(Method::Ddim), 1).unwrap();
    let mut small_alone = cuda(Emulation::default().workers(2));
    let planned = Generator::plan(&pipeline, &small_alone, settings(Method::Ddim), 1).unwrap();
    let expected = planned.load(&mut small_alone).unwrap().run(&[job(0)], &mut |_| Ok(())).unwrap();

    // A small program, recorded; then one that needs a larger arena.
    let text = moved.load(small.programs().text.clone(), &pipeline.model).unwrap();
    for _ in 0..3 {
        moved.run(text).unwrap();
    }
    assert_eq!((count(&calls, "record"), count(&calls, "replay")), (1, 2));
    moved.load(small.programs().step.clone(), &pipeline.model).unwrap();
    assert_eq!(count(&calls, "forget"), 1, "its addresses hold no longer");
    moved.run(text).unwrap();
    let found = small.load(&mut moved).unwrap().run(&[job(0)], &mut |_| Ok(())).unwrap();
    assert_eq!(found[0].latents, expected[0].latents);
    moved.clear();
    assert_eq!(count(&calls, "record"), count(&calls, "forget"), "every recording is given back");
}

#[test]
fn a_step_is_one_replay_and_waits_for_nothing() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let calls = Rc::default();
    let mut executor = recording(&calls, None);
    let generator = Generator::plan(&pipeline, &executor, settings(Method::Ddim), 1).unwrap();
    let mut loaded = generator.load(&mut executor).unwrap();
    loaded.run(&[job(0)], &mut |_| Ok(())).unwrap();
    let mut steps: Vec<Vec<&str>> = vec![];
    calls.borrow_mut().clear();
    let observe = &mut |progress: Progress<'_>| {
        if let Progress::Step { .. } = progress {
            steps.push(calls.take());
        }
        Ok(())
    };
    loaded.run(&[job(1)], observe).unwrap();
    assert_eq!(steps.len(), STEPS);
    for step in &steps[1..] {
        // The step's number and its coefficients, then all launches at once.
        assert_eq!(*step, ["stage", "stage", "replay"]);
    }
}

#[test]
fn a_step_ends_in_one_kernel_that_writes_the_latents() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    for method in [Method::Ddim, Method::EulerAncestral] {
        let calls = Rc::default();
        let mut executor = recording(&calls, None).with_graphs(false);
        let generator = Generator::plan(&pipeline, &executor, settings(method), 2).unwrap();
        let step = executor.load(generator.programs().step.clone(), &pipeline.model).unwrap();
        let kernels: Vec<&str> = executor.launches(step).flatten().map(|launch| launch.kernel.as_str()).collect();
        let [.., before, last] = kernels[..] else { panic!("{kernels:?}") };
        assert!(before.starts_with("conv2d") || before.starts_with("gemm"), "{before}");
        assert_eq!(last, "combine_f16_f32", "predictions cast, guided and stepped by");
        executor.run(step).unwrap();
        assert_eq!(count(&calls, "copy"), 0, "{method}: the latents lie where the next step reads them");
    }
}

#[test]
fn an_image_stays_on_the_device_until_it_is_made() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let calls = Rc::default();
    let mut executor = recording(&calls, None);
    let generator = Generator::plan(&pipeline, &executor, settings(Method::Ddim), 2).unwrap();
    let mut loaded = generator.load(&mut executor).unwrap();
    let mut run = |seeds: [u64; 2]| {
        calls.borrow_mut().clear();
        loaded.run(&seeds.map(job), &mut |_| Ok(())).unwrap();
        calls.take()
    };
    run([0, 0]);
    run([0, 1]);
    // The other way round: one prompt is encoded, and the unconditional rows' conditioning is there.
    let (image, decode) = (["stage", "stage", "replay"].repeat(STEPS), ["copy", "replay"]);
    let text = ["stage", "replay", "copy"];
    let condition = ["stage", "replay"];
    let latents = ["stage"];
    let expected = |rows: &[&'static str]| {
        let first = [rows, &condition, &latents, &image, &decode, &["read", "read"]].concat();
        [&first[..], &decode, &["read"]].concat()
    };
    // Each image's latents are entered once, and read once beside its pixels; nothing else is waited for.
    assert_eq!(run([1, 1]), expected(&["copy"]), "a prompt that the other row holds");
    assert_eq!(run([0, 1]), expected(&text), "a new prompt");
    assert_eq!(run([2, 3]), expected(&[]), "the same prompts");
    assert_eq!(run([1, 0]), expected(&[&["copy"][..], &text].concat()), "exchanged");
}
