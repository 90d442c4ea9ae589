//! A method of one's own in one file: guidance in a limited interval (Kynkäänniemi et al. 2024, arXiv 2404.07724), which leaves out
//! classifier-free guidance at the noisiest and the last steps, for more diverse images.
//!
//! `cargo run --release --example method -- "a red star"` writes interval.png.

use rarebit::Result;
use rarebit::data::metadata::write_png;
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::methods::sampling_loop::SamplingLoop;
use rarebit::methods::{ImageMethod, PlannedMethod, Request};
use rarebit::pipeline::generate::{Generator, Image, Job, Loaded, Settings};
use rarebit::pipeline::{Observer, Pipeline};
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};
use serde_json::{Value, json};

/// Guidance at timesteps within these two shares of the training steps.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    pub from: f64,
    pub to: f64,
}

/// The loop: every step has guidance or the weight 1, which is the prompt's branch alone.
fn run(images: &mut Loaded<'_, '_>, weights: &[f64], jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
    images.begin(jobs)?;
    for (step, weight) in weights.iter().enumerate() {
        images.guide(step, *weight);
        images.step(step, observe)?;
    }
    images.finish(observe)
}

impl ImageMethod for Interval {
    fn name(&self) -> &'static str {
        "interval"
    }

    fn title(&self) -> String {
        "interval".into()
    }

    fn options(&self) -> Value {
        json!({"from": self.from, "to": self.to})
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        let generator = Generator::plan(pipeline, executor, request.settings.clone(), request.batch)?;
        let [from, to] = [self.from, self.to].map(|share| share * pipeline.config.scheduler.train_timesteps as f64);
        Ok(Box::new(SamplingLoop::new(generator, move |images, jobs, observe| {
            let guided = images.guidance();
            let weight = |t: f64| if (from..=to).contains(&t) { guided } else { 1.0 };
            let weights: Vec<f64> = images.timesteps().into_iter().map(weight).collect();
            run(images, &weights, jobs, observe)
        })))
    }
}

/// One image of the embedded model, 64x64 pixels.
pub fn make(method: &dyn ImageMethod, prompt: &str, seed: u64, guidance: f64) -> Result<Image> {
    let pipeline = Pipeline::open(rarebit::assets::shapes()?, None)?;
    let sampler =
        sampler::Settings { method: Method::Ddim, spacing: None, steps: 20, eta: 0.0, guidance, cfg_pp: false };
    let settings = Settings { width: 64, height: 64, sampler, rng: Rng::Philox, dtype: DType::F32 };
    let mut cpu = Cpu::<f32>::new();
    let request = Request { settings: &settings, batch: 1, prompts: &[prompt], memory: None };
    let mut loaded = method.plan(&pipeline, &cpu, &request)?.load(&mut cpu)?;
    let job = Job { prompt: prompt.into(), negative: None, seed, draws: vec![] };
    Ok(loaded.run_checked(&[job], &mut |_| Ok(()))?.remove(0))
}

pub fn main() -> Result<()> {
    let prompt = std::env::args().nth(1).unwrap_or("a red star".into());
    let image = make(&Interval { from: 0.2, to: 0.8 }, &prompt, 7, 4.0)?;
    let failed = || rarebit::Error::io("write", "interval.png");
    let mut file = std::fs::File::create("interval.png").map_err(failed())?;
    write_png(&mut file, image.width, image.height, &image.rgb, None).map_err(failed())
}
