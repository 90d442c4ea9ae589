//! `rarebit bench`: how fast images and their gradients are made here, as a table and as JSON that later runs can be held against.

mod images;
mod measure;
mod ops;
mod passes;
mod report;
mod setup;

use crate::cli::atomic;
use crate::cli::flags::device::{Device, DeviceFlags};
use crate::cli::flags::given::Given;
use crate::cli::flags::model::ModelFlags;
use crate::cli::flags::sampling::SamplingFlags;
use crate::cli::flags::values;
use crate::cli::machine;
use crate::cli::paths::Paths;
use crate::cli::terminal::{print_json, print_line, print_text, say};
use crate::exec::cuda::NvmlDevice;
use crate::sampler::Method;
use crate::{Error, Result};
use clap::ValueEnum;
use measure::Plan;
use report::Case;
use serde_json::{Value, json};
use setup::Setup;
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
pub struct Bench {
    /// What is measured, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "latency")]
    mode: Vec<Mode>,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Batch sizes [default: 1; for throughput 1,2,4,8]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_parser = values::count)]
    batch: Vec<usize>,
    /// Timed runs
    #[arg(long, default_value_t = 20, allow_negative_numbers = true, value_parser = values::count)]
    runs: usize,
    /// Untimed runs before them
    #[arg(long, default_value_t = 3, allow_negative_numbers = true, value_parser = values::number_of)]
    warmup: usize,
    /// Write everything as JSON, every single time included
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The same on stdout, in place of the table
    #[arg(long)]
    json: bool,
    /// A report of an earlier run: exit with 3 where a median got worse
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// How much worse a median may be, in per cent
    #[arg(long, value_name = "PERCENT", default_value = "5", value_parser = values::amount, allow_negative_numbers = true)]
    max_regress: f64,
    /// Worker threads, at most 1024 [default: one per core]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Images one at a time, and their stages
    Latency,
    /// Images in batches of growing size
    Throughput,
    /// UNet passes forward and backward
    Grad,
    /// Every kind of op of a sampling step alone
    Kernels,
    /// MinorityPrompt against the passes it is made of
    Methods,
}

impl Bench {
    pub fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// What is measured, in order.
    fn all_cases(&self) -> impl Iterator<Item = (Mode, usize)> {
        self.mode.iter().flat_map(|&mode| self.batches(mode).into_iter().map(move |batch| (mode, batch)))
    }

    /// The sizes a mode runs with.
    fn batches(&self, mode: Mode) -> Vec<usize> {
        match mode {
            Mode::Methods => vec![1],
            _ if !self.batch.is_empty() => self.batch.clone(),
            Mode::Throughput => vec![1, 2, 4, 8],
            Mode::Latency | Mode::Grad | Mode::Kernels => vec![1],
        }
    }
}

/// Of the case that [`measured`] gives.
fn case_name(mode: Mode, batch: usize) -> String {
    match mode {
        Mode::Latency | Mode::Throughput => images::name(batch),
        Mode::Grad => passes::name(batch),
        Mode::Kernels => ops::name(batch),
        Mode::Methods => passes::METHODS.into(),
    }
}

pub fn run(args: Bench, given: &Given) -> Result<()> {
    given.warn_of(|flag| flag == "negative", "of what is measured");
    given.warn_of(|flag| flag == "max_regress" && args.baseline.is_none(), "without --baseline");
    let only_methods = args.mode.iter().all(|mode| *mode == Mode::Methods);
    given.warn_of(|flag| flag == "batch" && only_methods, "in --mode methods, which makes one image");
    let mut paths = Paths::default();
    args.model.inputs(&mut paths);
    args.baseline.iter().for_each(|path| paths.input("--baseline", path));
    args.out.iter().try_for_each(|path| paths.output("--out", path))?;
    // What cannot be written is not found out after an hour.
    args.out.as_deref().map_or(Ok(()), atomic::probe)?;
    let baseline = args.baseline.as_deref().map(report::read).transpose()?;
    let opened = Instant::now();
    let pipeline = args.model.open()?;
    let opened = opened.elapsed().as_secs_f64();
    let settings = args.sampling.settings(&pipeline, args.device.program_dtype()?)?;
    let nvml = match args.device.device {
        Device::Cuda(ordinal) => NvmlDevice::of(ordinal)?,
        Device::Auto | Device::Cpu => NvmlDevice::none(),
    };
    let executor = args.device.executor(false)?;
    let mut setup = Setup {
        pipeline: &pipeline,
        open_s: opened,
        free: executor.free_memory()?,
        executor,
        settings,
        device: args.device,
        seed: args.sampling.seed(),
        plan: Plan { runs: args.runs, warmup: args.warmup },
    };
    let mut report = header(&args, &setup, &nvml)?;
    if let (Some(baseline), Some(path)) = (&baseline, &args.baseline) {
        let names: Vec<String> = args.all_cases().map(|(mode, batch)| case_name(mode, batch)).collect();
        let missing = report::comparable(path, baseline, &report, &names)?;
        missing.iter().for_each(|name| say(&format!("rarebit: {}: does not have '{name}'", path.display())));
    }
    if !args.json {
        print_line(&headline(&args, &setup))?;
    }
    let mut cases = vec![];
    for (mode, batch) in args.all_cases() {
        let case = measured(&mut setup, &nvml, mode, batch)?;
        if !args.json {
            print_text(&case.text())?;
        }
        cases.push(case.json());
    }
    report["cases"] = Value::Array(cases);
    // Clocks and temperature under load.
    report["gpu"] = nvml.json();
    if args.json {
        print_json(&report)?;
    }
    if let Some(path) = &args.out {
        let text = serde_json::to_string_pretty(&report).map_err(|error| Error::file(path, error.to_string()))?;
        atomic::write(path, |file| std::io::Write::write_all(file, (text + "\n").as_bytes()))?;
    }
    let Some(baseline) = baseline else { return Ok(()) };
    let worse = report::regressions(&baseline, &report, args.max_regress / 100.0);
    worse.iter().for_each(|line| say(line));
    match worse.len() {
        0 => Ok(()),
        n => Err(Error::Regression(format!("{n} medians are more than {} % above the baseline's", args.max_regress))),
    }
}

fn measured(setup: &mut Setup<'_>, nvml: &NvmlDevice, mode: Mode, batch: usize) -> Result<Case> {
    match mode {
        Mode::Latency | Mode::Throughput => images::run(setup, nvml, batch),
        Mode::Grad => passes::gradients(setup, batch),
        Mode::Kernels => ops::run(setup, batch),
        Mode::Methods => passes::methods(setup),
    }
}

/// What was measured, on what.
fn header(args: &Bench, setup: &Setup<'_>, nvml: &NvmlDevice) -> Result<Value> {
    let s = &setup.settings;
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(json!({
        "schema": report::SCHEMA,
        "version": env!("CARGO_PKG_VERSION"),
        "time": time,
        "host": {"cpu": machine::processor(), "threads": rayon::current_num_threads()},
        "case": {
            "model": args.model.name(), "model_hash": setup.pipeline.model.fingerprint()?, "family": format!("{:?}", setup.pipeline.config.family).to_lowercase(),
            "device": format!("{:?}", args.device.device).to_lowercase(), "width": s.width, "height": s.height,
            "dtype": s.dtype.to_string(), "sampler": s.sampler.method.to_string(), "steps": s.sampler.steps,
            "guidance": s.sampler.guidance, "seed": setup.seed,
        },
        "gpu": nvml.json(),
        "flop_model": "products of gemm, convolution and attention, two per multiply-accumulate",
        "warmup": setup.plan.warmup,
        "runs": setup.plan.runs,
    }))
}

fn headline(args: &Bench, setup: &Setup<'_>) -> String {
    let s = &setup.settings;
    let method: Method = s.sampler.method;
    let device = match args.device.device {
        Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
        Device::Auto | Device::Cpu => format!("{}, {} threads", machine::processor(), rayon::current_num_threads()),
    };
    format!(
        "model {} {}x{} {}  sampler {method} {}  guidance {}  runs {} (+{} warm-up)  {device}",
        args.model.name(),
        s.width,
        s.height,
        s.dtype,
        s.sampler.steps,
        s.sampler.guidance,
        setup.plan.runs,
        setup.plan.warmup
    )
}
