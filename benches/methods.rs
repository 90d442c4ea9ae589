//! What a method costs beside plain sampling, against the UNet passes it was planned to make: `cargo bench --bench methods [-- MODEL
//! SIDE STEPS]`.
//!
//! One run measures all in turn: a UNet pass forward, forward and backward to the text states, forward and backward to the latents,
//! plain DDIM and MinorityPrompt with their defaults. The prediction is DDIM's time and that of the passes of every iteration.

use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::{Data, Executor, ProgramId, cpu::Cpu};
use rarebit::methods::generate::{self, Generator, Job};
use rarebit::methods::minority::{Minority, Settings};
use rarebit::methods::pipeline::Pipeline;
use rarebit::methods::programs::Sizes;
use rarebit::methods::token::TokenSettings;
use rarebit::methods::variable::{Design, Parameter, Variable};
use rarebit::models::unet::Unet;
use rarebit::plan::plan;
use rarebit::program::{Builder, DType, Program};
use rarebit::sampler::{self, Convention, Method, Rng};
use rarebit::weights::Model;
use rarebit::{Error, Result};
use std::path::Path;
use std::time::Instant;

const PROMPT: &str = "a red star on a dark blue background";
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let model = match args.first() {
        Some(path) => Model::open(Path::new(path))?,
        None => rarebit::assets::shapes()?,
    };
    let pipeline = Pipeline::open(model, None)?;
    if pipeline.config.unet.added.is_some() {
        return Err(Error::Usage("this measurement is for models without pooled text".into()));
    }
    let number = |index: usize, usual: usize| match args.get(index).map(|text| text.parse::<usize>()) {
        None => Ok(usual),
        Some(Ok(number)) => Ok(number),
        Some(Err(_)) => {
            Err(Error::Usage("the arguments are a model, the side of its images in pixels, and steps".into()))
        }
    };
    let (side, steps) = (number(1, pipeline.config.image_size)?, number(2, 50)?);
    let sampler =
        sampler::Settings { method: Method::Ddim, spacing: None, steps, eta: 0.0, guidance: 7.5, cfg_pp: false };
    let images = generate::Settings { width: side, height: side, sampler, rng: Rng::Philox, dtype: DType::F32 };
    let job = || Job { prompt: PROMPT.into(), negative: None, seed: 1, draws: vec![] };

    // An executor each, so that what is measured is loaded once.
    let (mut bare, mut plain, mut guided) = (Cpu::<f32>::new(), Cpu::<f32>::new(), Cpu::<f32>::new());
    let passes = [None, Some("context"), Some("latents")].map(|leaf| pass(&pipeline, side, leaf));
    let passes = passes.into_iter().map(|program| load(&mut bare, program?, &pipeline)).collect::<Result<Vec<_>>>()?;
    let (height, width) = pipeline.latent_size(side, side)?;
    bare.write("latents", Data::F32(&wave(height * width * pipeline.config.unet.in_channels)))?;
    bare.write("context", Data::F32(&wave(pipeline.tokens() * pipeline.config.unet.context_width)))?;
    bare.write("timestep", Data::F32(&[501.0]))?;
    let generator = Generator::plan(&pipeline, &plain, images.clone(), 1)?;
    let mut generator = generator.load(&mut plain)?;
    let minority = Minority::plan(&pipeline, &guided, Settings::of(&pipeline, images)?, &[PROMPT])?;
    let planned = minority.passes();
    let iterations = planned.backward / 2;
    let mut minority = minority.load(&mut guided)?;

    // The text side of an iteration, which the prediction leaves out.
    let variable = Variable::Token(TokenSettings::of(&pipeline, Convention::Diffusers)?);
    let Variable::Token(token) = &variable else { return Ok(()) };
    let prefix = token.place(&pipeline, &[PROMPT])?.prefix;
    let sizes = Sizes { batch: 1, height, width, tokens: pipeline.tokens() };
    let design = Design { pipeline: &pipeline, dtype: DType::F32, sizes, variable: &variable };
    let mut towers = Cpu::<f32>::new();
    let text = [text_gradient(&design, prefix)?, design.update(1.0)?];
    let text = text.into_iter().map(|program| load(&mut towers, program, &pipeline)).collect::<Result<Vec<_>>>()?;

    let mut seconds: [Vec<f64>; 6] = Default::default();
    for _ in 0..ROUNDS {
        let calls = 10;
        for (program, seconds) in passes.iter().zip(&mut seconds) {
            seconds.push(time(|| (0..calls).try_for_each(|_| bare.run(*program)))? / f64::from(calls));
        }
        seconds[3].push(time(|| generator.run(&[job()], &mut |_| Ok(())))?);
        seconds[4].push(time(|| minority.run(&[job()], &[1], &mut |_| Ok(())))?);
        let mut iteration = || text.iter().try_for_each(|program| towers.run(*program));
        seconds[5].push(time(|| (0..calls).try_for_each(|_| iteration()))? / f64::from(calls));
    }
    let [forward, to_context, to_latents, ddim, found, text] = seconds.map(median);
    let predicted = ddim + iterations as f64 * (to_context + to_latents);
    println!("UNet forward                        {:9.3} ms", 1e3 * forward);
    println!("  and backward to the text states   {:9.3} ms", 1e3 * to_context);
    println!("  and backward to the latents       {:9.3} ms", 1e3 * to_latents);
    println!("text towers both ways, and Adam     {:9.3} ms", 1e3 * text);
    println!("DDIM, {steps:3} steps                      {:9.3} ms", 1e3 * ddim);
    println!("MinorityPrompt, {} forwards, {} backwards", planned.forward, planned.backward);
    println!("  predicted                         {:9.3} ms, {:.3} of DDIM", 1e3 * predicted, predicted / ddim);
    println!("  found                             {:9.3} ms, {:.3} of DDIM", 1e3 * found, found / ddim);
    println!("found over predicted                {:9.3}", found / predicted);
    Ok(())
}

/// One UNet pass on one image, and its gradient to one of its inputs.
fn pass(pipeline: &Pipeline, side: usize, leaf: Option<&str>) -> Result<Program> {
    let (config, (height, width)) = (&pipeline.config.unet, pipeline.latent_size(side, side)?);
    let unet = Unet::new(config);
    let mut b = Builder::new("pass", DType::F32);
    let latents = b.wide_input("latents", &[1, height, width, config.in_channels]);
    let context = b.input("context", &[1, pipeline.tokens(), config.context_width]);
    let timestep = b.wide_input("timestep", &[1]);
    let time = unet.time(&mut b, timestep, None);
    let kv = unet.context_kv(&mut b, context);
    let output = unet.forward(&mut b, latents, kv, time);
    let squares = b.dot(output, output);
    b.output("squares", squares);
    let program = b.finish()?;
    let Some(leaf) = leaf else { return Ok(program) };
    let leaves = program.input(leaf).map(|id| (id, format!("d.{leaf}"))).into_iter().collect();
    differentiate(&program, &Request { objectives: vec![(squares, Cotangent::Ones)], leaves }, None)
}

/// The text towers from the token to the text states and back.
fn text_gradient(design: &Design<'_>, prefix: usize) -> Result<Program> {
    let program = design.forward(prefix)?;
    let objectives = program.outputs.iter().map(|(name, id)| (*id, Cotangent::Input(format!("d.{name}")))).collect();
    let leaf = |p: Parameter| Some((program.input(p.name)?, format!("d.{}", p.name)));
    let leaves = design.parameters().into_iter().filter_map(leaf).collect();
    differentiate(&program, &Request { objectives, leaves }, None)
}

fn load(executor: &mut Cpu<f32>, program: Program, pipeline: &Pipeline) -> Result<ProgramId> {
    let planned = plan(program, |program, node| executor.workspace(program, node));
    executor.load(planned, &pipeline.model)
}

fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn time<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
