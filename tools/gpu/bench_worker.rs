//! The engine's side of the benchmarks against PyTorch (bench.py): loads a case, says what it costs and what it computes, then runs it as
//! often as it is asked to. Requests come on stdin and answers go to stdout, a line of JSON each.
//!
//! Of several cases in one process each lets go of the one before, but for weights.

use crate::Outcome;
use crate::common::speed::{self, Shape};
use clap::Args;
use rarebit::assets;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::{AHEAD, Cuda, Driver, Emulated, Gpu, Hopper, Settings as Emulation};
use rarebit::exec::{Executor, ProgramId};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::Progress;
use rarebit::pipeline::generate::{Generator, Job, Loaded, Settings};
use rarebit::pipeline::networks::{AddedConditions, Networks, Tensor};
use rarebit::plan::Footprint;
use rarebit::program::DType;
use rarebit::sampler::{self, Rng};
use rarebit::weights::Model;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{BufRead, StdinLock, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Run benchmark cases that are named on stdin.
#[derive(Args)]
pub struct BenchWorker {
    /// cuda:N, emulated or cpu
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// f32, f16 or bf16; the CPU computes in f32
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// A diffusers folder or checkpoint file [default: the embedded model]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// What the kernels for Hopper do: auto, off or always
    #[arg(long, default_value = "auto")]
    hopper: Hopper,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    /// The ops that can be timed.
    Shapes,
    /// One of them, by its place in that list, several times over in each run.
    Op { index: usize, together: usize },
    /// The UNet on `latents`, `timestep`, `context`, and SDXL's on `pooled` and `size_ids` too; with `to` (`latents` or `context`) forward and
    /// backward in one, from a `cotangent`. What it computes is written to a file.
    Unet { inputs: PathBuf, outputs: PathBuf, to: Option<String> },
    /// The VAE's decoder on `latents`.
    Decode { inputs: PathBuf, outputs: PathBuf },
    /// Whole images from prompt to bytes, by DDIM.
    Image { size: usize, batch: usize, steps: usize, guidance: f64 },
    /// What was loaded last, so many times between two readings of the clock.
    Run(usize),
}

pub fn serve(args: &BenchWorker, emulation: impl FnOnce() -> PathBuf) -> Outcome<()> {
    let dtype = match args.dtype.as_str() {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        other => return Err(format!("--dtype: '{other}' is none of f32, f16, bf16").into()),
    };
    let cuda = |driver: Box<dyn Driver>| Box::new(Cuda::new(driver).with_hopper(args.hopper));
    let mut executor: Box<dyn Executor> = match (args.device.as_str(), args.device.strip_prefix("cuda:")) {
        ("cpu", _) => Box::new(Cpu::<f32>::new()),
        ("emulated", _) => cuda(Box::new(Emulated::open(&emulation(), Emulation::default())?)),
        (_, Some(number)) => cuda(Box::new(Gpu::new(number.parse()?)?)),
        (other, None) => return Err(format!("--device: '{other}' is none of cuda:N, emulated, cpu").into()),
    };
    let free = executor.free_memory()?;
    let started = Instant::now();
    let model = match &args.model {
        Some(path) => Model::open(path)?,
        None => assets::shapes()?,
    };
    let pipeline = Pipeline::open(model, None)?;
    let networks = Networks::new(&pipeline, &mut *executor, dtype);
    let opened = started.elapsed().as_secs_f64();
    let mut bench = Bench { pipeline: &pipeline, networks, dtype, free, opened, requests: std::io::stdin().lock() };
    answer(&json!({"ready": true}))?;
    let mut next = bench.next()?;
    while let Some(request) = next {
        next = match bench.load(request) {
            Ok(next) => next,
            Err(error) => {
                answer(&json!({"error": error.to_string()}))?;
                bench.next()?
            }
        };
    }
    Ok(())
}

fn answer(value: &Value) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()
}

struct Bench<'p> {
    pipeline: &'p Pipeline,
    networks: Networks<'p, 'p>,
    dtype: DType,
    /// Bytes of device memory before any weight was loaded.
    free: Option<usize>,
    /// Seconds it took to open the model.
    opened: f64,
    requests: StdinLock<'static>,
}

/// Runs a case this often and returns when all is done.
type Work<'a> = dyn FnMut(usize) -> rarebit::Result<()> + 'a;

impl Bench<'_> {
    fn next(&mut self) -> Outcome<Option<Request>> {
        next(&mut self.requests)
    }

    /// Loads and serves a case; the request that ended it.
    fn load(&mut self, request: Request) -> Outcome<Option<Request>> {
        match request {
            Request::Shapes => {
                let describe = |shape: &Shape| {
                    let program = shape.program(self.dtype, 1);
                    let bytes: usize = program.nodes.iter().map(|node| program.bytes_of(node)).sum();
                    let (family, name) = (shape.family(), shape.name());
                    json!({"shape": shape, "family": family, "name": name, "flops": program.flops(), "bytes": bytes})
                };
                answer(&Value::Array(speed::shapes().iter().map(describe).collect()))?;
                self.next()
            }
            Request::Op { index, together } => self.op(index, together),
            Request::Unet { inputs, outputs, to } => self.unet(&inputs, &outputs, to.as_deref()),
            Request::Decode { inputs, outputs } => self.decode(&inputs, &outputs),
            Request::Image { size, batch, steps, guidance } => self.images(size, batch, steps, guidance),
            Request::Run(_) => Err("nothing is loaded".into()),
        }
    }

    fn op(&mut self, index: usize, together: usize) -> Outcome<Option<Request>> {
        let shape = *speed::shapes().get(index).ok_or("there is no such op")?;
        self.networks.clear();
        let executor = self.networks.executor();
        let id = speed::load(shape.program(self.dtype, together), executor)?;
        // Started launch by launch, then recorded, then replayed.
        run(executor, id, 3)?;
        rounds(&mut self.requests, &json!({"together": together}), &mut |runs| run(executor, id, runs))
    }

    fn unet(&mut self, inputs: &Path, outputs: &Path, to: Option<&str>) -> Outcome<Option<Request>> {
        let bytes = std::fs::read(inputs)?;
        let file = SafeTensors::deserialize(&bytes)?;
        let (latents, context) = (tensor(&file, "latents")?, tensor(&file, "context")?);
        let timestep = f64::from(tensor(&file, "timestep")?.data[0]);
        let added = match (tensor(&file, "pooled"), tensor(&file, "size_ids")) {
            (Ok(pooled), Ok(ids)) => Some(AddedConditions { pooled: pooled.data, size_ids: ids.data }),
            _ => None,
        };
        let (networks, added) = (&mut self.networks, added.as_ref());
        networks.clear();
        let started = Instant::now();
        let seconds = match to {
            None => {
                let prediction = networks.unet(&latents, timestep, &context.data, added)?;
                let seconds = started.elapsed().as_secs_f64();
                save(outputs, vec![("prediction", prediction)])?;
                seconds
            }
            Some(leaf) => {
                let cotangent = tensor(&file, "cotangent")?;
                let found = networks.unet_gradient(&latents, timestep, &context.data, added, &cotangent)?;
                let seconds = started.elapsed().as_secs_f64();
                let d_context = Tensor { shape: context.shape.clone(), data: found.context };
                save(outputs, vec![("d_latents", found.latents), ("d_context", d_context)])?;
                let shape: [usize; 4] = latents.shape.clone().try_into().map_err(|_| "latents are no images")?;
                networks.clear();
                networks.load_unet_gradient(shape, context.data.len(), added.is_some(), &[leaf])?;
                networks.write_unet(&latents, timestep, &context.data, added, Some(&cotangent))?;
                seconds
            }
        };
        self.network(seconds)
    }

    fn decode(&mut self, inputs: &Path, outputs: &Path) -> Outcome<Option<Request>> {
        let bytes = std::fs::read(inputs)?;
        let latents = tensor(&SafeTensors::deserialize(&bytes)?, "latents")?;
        self.networks.clear();
        let started = Instant::now();
        let image = self.networks.decode(&latents)?;
        let seconds = started.elapsed().as_secs_f64();
        save(outputs, vec![("image", image)])?;
        self.network(seconds)
    }

    /// Serves the network that was loaded last; `load_seconds` from there to its first result.
    fn network(&mut self, load_seconds: f64) -> Outcome<Option<Request>> {
        let (id, footprint) = self.networks.loaded().cloned().ok_or("nothing is loaded")?;
        let executor = self.networks.executor();
        run(executor, id, 3)?;
        let started = Instant::now();
        (0..AHEAD).try_for_each(|_| executor.run(id))?;
        let host = started.elapsed().as_secs_f64() / AHEAD as f64;
        executor.wait()?;
        let mut facts = memory(&footprint, self.free, executor.free_memory()?);
        facts["load_s"] = json!(self.opened + load_seconds);
        facts["host_us"] = json!(1e6 * host);
        facts["flops"] = json!(footprint.lines.iter().map(|line| 2 * line.macs).sum::<u64>());
        rounds(&mut self.requests, &facts, &mut |runs| run(executor, id, runs))
    }

    fn images(&mut self, size: usize, batch: usize, steps: usize, guidance: f64) -> Outcome<Option<Request>> {
        let method = sampler::Method::Ddim;
        let sampler = sampler::Settings { method, spacing: None, steps, eta: 0.0, guidance, cfg_pp: false };
        let settings = Settings { width: size, height: size, sampler, rng: Rng::Philox, dtype: self.dtype };
        self.networks.clear();
        let executor = self.networks.executor();
        let started = Instant::now();
        let plan = |executor: &dyn Executor| Generator::plan(self.pipeline, executor, settings.clone(), batch);
        let generator = plan(&*executor)?;
        let footprint = generator.footprint();
        let mut images = Images { loaded: generator.load(&mut *executor)?, batch, made: 0, between: vec![] };
        images.make(1)?;
        let load = self.opened + started.elapsed().as_secs_f64();
        images.between.clear();
        images.make(2)?;
        let mut between = images.between;
        between.sort_by(f64::total_cmp);
        let mut facts = memory(&footprint, self.free, executor.free_memory()?);
        facts["load_s"] = json!(load);
        facts["host_us"] = json!(between.get(between.len() / 2).map(|seconds| 1e6 * seconds));
        executor.clear();
        let loaded = plan(&*executor)?.load(&mut *executor)?;
        let mut images = Images { loaded, batch, made: 0, between: vec![] };
        images.make(2)?;
        rounds(&mut self.requests, &facts, &mut |runs| images.make(runs))
    }
}

/// Runs a program so often, and waits.
fn run(executor: &mut dyn Executor, id: ProgramId, runs: usize) -> rarebit::Result<()> {
    (0..runs).try_for_each(|_| executor.run(id))?;
    executor.wait()
}

struct Images<'p, 'e> {
    loaded: Loaded<'p, 'e>,
    batch: usize,
    made: usize,
    /// Seconds from one of the first steps to the next, as the host starts them.
    between: Vec<f64>,
}

impl Images<'_, '_> {
    /// Makes so many batches, each of another prompt: the states of the last would not be computed again.
    fn make(&mut self, batches: usize) -> rarebit::Result<()> {
        for _ in 0..batches {
            self.made += 1;
            let job = |i| Job {
                prompt: format!("a red star on a dark blue background, {}", self.made),
                negative: None,
                seed: (self.made * self.batch + i) as u64,
                draws: vec![],
            };
            let jobs: Vec<Job> = (0..self.batch).map(job).collect();
            let mut last = None;
            self.loaded.run(&jobs, &mut |progress| {
                if let Progress::Step { done, .. } = progress {
                    let now = Instant::now();
                    if let Some(last) = last.replace(now).filter(|_| done <= AHEAD) {
                        self.between.push((now - last).as_secs_f64());
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn next(requests: &mut StdinLock<'_>) -> Outcome<Option<Request>> {
    let mut line = String::new();
    match requests.read_line(&mut line)? {
        0 => Ok(None),
        _ => Ok(Some(serde_json::from_str(&line)?)),
    }
}

/// Tells what is known of a case and runs it until another is asked for.
fn rounds(requests: &mut StdinLock<'_>, facts: &Value, work: &mut Work<'_>) -> Outcome<Option<Request>> {
    answer(facts)?;
    loop {
        match next(requests)? {
            Some(Request::Run(runs)) => {
                let started = Instant::now();
                work(runs)?;
                answer(&json!({"ms": 1e3 * started.elapsed().as_secs_f64() / runs as f64}))?;
            }
            other => return Ok(other),
        }
    }
}

/// Planned and held bytes of a case.
fn memory(footprint: &Footprint, before: Option<usize>, after: Option<usize>) -> Value {
    json!({
        "planned": footprint.total(), "weights": footprint.weight_bytes,
        "held": before.zip(after).map(|(before, after)| before.saturating_sub(after)),
    })
}

fn tensor(file: &SafeTensors<'_>, name: &str) -> Outcome<Tensor> {
    let found = file.tensor(name)?;
    if found.dtype() != Dtype::F32 {
        return Err(format!("{name} is not F32").into());
    }
    let data = found.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Ok(Tensor { shape: found.shape().to_vec(), data })
}

fn save(path: &Path, tensors: Vec<(&str, Tensor)>) -> Outcome<()> {
    let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, t)| (name, t.shape, t.data.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), data)?)));
    Ok(std::fs::write(path, safetensors::serialize(views.collect::<Outcome<Vec<_>>>()?, None)?)?)
}
