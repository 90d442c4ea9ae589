//! MinorityPrompt runs for tests: one way to make them, with every setting in reach.

use rarebit::exec::Executor;
use rarebit::methods::minority::{Convention, Renoise};
use rarebit::methods::minority::{Loaded, Minority, Schedule, Settings};
use rarebit::optimize::objective::{self, Objective, minority};
use rarebit::optimize::variable::Variable;
use rarebit::optimize::variable::token::{Init, PoolAt, TokenSettings};
use rarebit::pipeline::Iteration;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::Progress;
use rarebit::pipeline::generate::{self, Generator, Image, Job};
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};
use rarebit::text::Position;

/// The settings of plain sampling of the same images.
pub fn images(pipeline: &Pipeline, steps: usize, guidance: f64, dtype: DType) -> generate::Settings {
    let side = pipeline.config.image_size;
    let sampler = sampler::Settings { method: Method::Ddim, spacing: None, steps, eta: 0.0, guidance, cfg_pp: false };
    generate::Settings { width: side, height: side, sampler, rng: Rng::Philox, dtype }
}

pub fn token(init: Init) -> TokenSettings {
    TokenSettings { rows: 1, position: Position::End, init, pool_at: PoolAt::Eos }
}

/// The method with little work: 4 steps, of which the first is optimised, twice.
pub fn settings(pipeline: &Pipeline, dtype: DType) -> Settings {
    Settings {
        images: images(pipeline, 4, 3.0, dtype),
        schedule: Schedule {
            iterations: 2,
            lr: 0.002,
            lr_decay: 0.0,
            t_lo: 0.7,
            t_hi: 1.0,
            every: 1,
            base_prompt_after: true,
            renoise: Renoise::Annealed,
            convention: Convention::Diffusers,
        },
        variable: Variable::Token(token(Init::White { scale: 1.0 })),
        objectives: vec![minority(objective::Minority::default())],
        trace: true,
        loss_scale: 1.0,
        budget: None,
    }
}

/// Looks at the first step only: nothing moves.
pub fn looking(pipeline: &Pipeline, dtype: DType, objective: Objective<'static>, variable: Variable) -> Settings {
    let mut settings = settings(pipeline, dtype);
    settings.schedule.iterations = 1;
    settings.schedule.lr = 0.0;
    Settings { objectives: vec![objective], variable, ..settings }
}

pub fn job(prompt: &str, seed: u64) -> Job {
    Job { prompt: prompt.into(), negative: None, seed, draws: vec![] }
}

/// What a run leaves behind.
pub struct Outcome {
    pub iterations: Vec<Iteration>,
    pub images: Vec<Image>,
    pub learned: Vec<Vec<f32>>,
    /// Of the last iteration.
    pub gradient: Vec<Vec<f64>>,
}

pub fn run(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    settings: Settings,
    jobs: &[Job],
    seeds: &[u64],
) -> Outcome {
    run_with(pipeline, executor, settings, jobs, seeds, |_| {})
}

/// `prepare` fills the buffers that an objective declares.
pub fn run_with(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    settings: Settings,
    jobs: &[Job],
    seeds: &[u64],
    prepare: impl FnOnce(&mut Loaded<'_, '_>),
) -> Outcome {
    let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
    executor.clear();
    let planned = Minority::plan(pipeline, executor, settings, &prompts).unwrap();
    let mut loaded = planned.load(executor).unwrap();
    prepare(&mut loaded);
    let mut iterations = Vec::new();
    let images = loaded
        .run(jobs, seeds, &mut |progress| {
            if let Progress::Iteration(Some(report)) = progress {
                iterations.push(report.clone());
            }
            Ok(())
        })
        .unwrap();
    Outcome { iterations, images, learned: loaded.learned().unwrap(), gradient: loaded.gradient().unwrap() }
}

/// Plain sampling.
pub fn plain(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    settings: generate::Settings,
    jobs: &[Job],
) -> Vec<Image> {
    executor.clear();
    let generator = Generator::plan(pipeline, executor, settings, jobs.len()).unwrap();
    generator.load(executor).unwrap().run(jobs, &mut |_| Ok(())).unwrap()
}

pub fn relative(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let error: f64 = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    (error / expected.iter().map(|b| b.powi(2)).sum::<f64>()).sqrt()
}
