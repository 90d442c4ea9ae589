//! Same seed, same bits: twice, in a batch or alone, with one thread or two, with guidance or without.

use crate::common::golden::Golden;
use rarebit::exec::cpu::Cpu;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{Generator, Image, Job, Settings};
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};

fn settings(pipeline: &Pipeline, guidance: f64, method: Method) -> Settings {
    let size = 16 * pipeline.config.vae.factor();
    Settings {
        width: size,
        height: size,
        sampler: sampler::Settings { method, spacing: None, steps: 4, eta: 0.0, guidance, cfg_pp: false },
        rng: Rng::Philox,
        dtype: DType::F32,
    }
}

fn job(seed: u64) -> Job {
    let prompts = ["a red star", "a blue circle on a white background", "a small green heart", ""];
    Job { prompt: prompts[seed as usize % 4].into(), negative: None, seed, draws: vec![] }
}

fn images(pipeline: &Pipeline, settings: &Settings, seeds: &[u64], batch: usize, threads: usize) -> Vec<Image> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut executor = Cpu::<f32>::new();
        let generator = Generator::plan(pipeline, &executor, settings.clone(), batch).unwrap();
        let mut generator = generator.load(&mut executor).unwrap();
        let jobs: Vec<Job> = seeds.iter().map(|&seed| job(seed)).collect();
        jobs.chunks(batch).flat_map(|jobs| generator.run(jobs, &mut |_| Ok(())).unwrap()).collect()
    })
}

fn assert_same(a: &[Image], b: &[Image], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (a, b) in a.iter().zip(b) {
        assert!(a.latents.iter().all(|x| x.is_finite()), "{what}");
        assert_eq!(a.latents, b.latents, "{what}");
        assert_eq!(a.rgb, b.rgb, "{what}");
    }
}

#[test]
fn batches_threads_and_runs_agree() {
    let mut pipelines: Vec<(&str, Pipeline)> =
        ["tiny-sd1", "tiny-sd2", "tiny-sdxl"].map(|name| (name, Golden::open(name).pipeline())).into();
    pipelines.push(("shapes", Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap()));
    for (name, pipeline) in &pipelines {
        for (guidance, method) in [(7.5, Method::EulerAncestral), (1.0, Method::Pndm)] {
            let settings = settings(pipeline, guidance, method);
            let seeds = [11, 12, 13, 14];
            let alone = images(pipeline, &settings, &seeds, 1, 1);
            assert_ne!(alone[0].latents, alone[1].latents, "{name}: seeds do not matter");
            assert_same(&alone, &images(pipeline, &settings, &seeds, 1, 1), &format!("{name} {method}: two runs"));
            assert_same(&alone, &images(pipeline, &settings, &seeds, 4, 2), &format!("{name} {method}: batch of 4"));
            assert_same(&alone, &images(pipeline, &settings, &seeds, 2, 3), &format!("{name} {method}: 3 threads"));
        }
    }
}
