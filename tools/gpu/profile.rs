//! `gpu_check profile`: what each kind of op of the real programs takes alone, and what the whole programs take: where the time goes.
//!
//! A line of JSON for each op is in the file before the next one begins, which a `begin` names; those come first that the peak rates
//! give most time. Alone an op finds its inputs and weights where the last run left them, so the parts need not add up to the whole;
//! how far they do not is reported.

use crate::Outcome;
use crate::device::Choice;
use crate::measure::{Bench, Lines, To, dtype, read};
use clap::Args;
use rarebit::exec::cuda::{Cuda, Hopper, PEAKS, Peak, explain};
use rarebit::exec::{Data, Executor, ProgramId};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::Networks;
use rarebit::plan::{Planned, plan};
use rarebit::program::{DType, Kind, Origin, Program};
use rarebit::weights::Model;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Time every kind of op of the UNet, its gradient and the decoder
#[derive(Args)]
pub struct Profile {
    /// cuda:N, or emulated
    #[arg(long, default_value = "cuda:0")]
    device: Choice,
    /// A diffusers folder or checkpoint file [default: the embedded model]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Programs and their batches: unet, gradient (of the UNet to its latents), decode
    #[arg(long, value_name = "PROGRAM:BATCH", value_delimiter = ',', default_value = "unet:2")]
    what: Vec<What>,
    /// Width and height of images [default: the model's]
    #[arg(long)]
    size: Option<usize>,
    /// f32, f16 or bf16
    #[arg(long, default_value = "bf16", value_parser = dtype)]
    dtype: DType,
    /// What the kernels for Hopper do: auto, off or always
    #[arg(long, default_value = "auto")]
    hopper: Hopper,
    #[command(flatten)]
    to: To,
    /// The GPU whose peak rates bound the times [default: the one it is, else h200]
    #[arg(long)]
    peak: Option<Peak>,
    /// Seconds
    #[arg(long, default_value_t = 60.0)]
    time_limit: f64,
}

/// A program of a model.
#[derive(Clone, Copy, PartialEq)]
enum Network {
    Unet,
    Gradient,
    Decode,
}

#[derive(Clone, PartialEq)]
struct What {
    name: String,
    network: Network,
    batch: usize,
}

impl FromStr for What {
    type Err = String;

    fn from_str(text: &str) -> Result<What, String> {
        let (network, batch) = text.split_once(':').ok_or("give PROGRAM:BATCH, as unet:2")?;
        let network = match network {
            "unet" => Network::Unet,
            "gradient" => Network::Gradient,
            "decode" => Network::Decode,
            _ => return Err("one of unet, gradient, decode".into()),
        };
        match batch.parse() {
            Ok(batch) if batch > 0 => Ok(What { name: text.into(), network, batch }),
            _ => Err(format!("'{batch}' is no batch")),
        }
    }
}

impl What {
    fn program(&self, pipeline: &Pipeline, dtype: DType, size: usize) -> rarebit::Result<Program> {
        let (h, w) = pipeline.latent_size(size, size)?;
        let config = &pipeline.config.unet;
        let shape = [self.batch, config.in_channels, h, w];
        let context = self.batch * pipeline.tokens() * config.context_width;
        let mut planner = rarebit::exec::cuda::Planner { hopper: Hopper::Auto };
        let networks = Networks::new(pipeline, &mut planner, dtype);
        let with_added = config.added.is_some();
        match self.network {
            Network::Unet => networks.unet_program(shape, context, with_added),
            Network::Gradient => {
                networks.unet_gradient_program(shape, context, with_added, &[rarebit::sampler::LATENTS])
            }
            Network::Decode => networks.decoder_program([self.batch, pipeline.config.vae.latent_channels, h, w]),
        }
    }
}

/// Of the time that is left the ops of a program take so much, so that the whole is not missed.
const OF_OPS: f64 = 0.7;

pub fn run(args: &Profile, emulation: impl FnOnce() -> PathBuf) -> Outcome<bool> {
    let deadline = Instant::now() + Duration::from_secs_f64(args.time_limit);
    let (cuda, bench) = Bench::open(&args.device, emulation)?;
    let model = match &args.model {
        Some(path) => Model::open(path)?,
        None => rarebit::assets::shapes()?,
    };
    let pipeline = Pipeline::open(model, None)?;
    let size = args.size.unwrap_or(pipeline.config.image_size);
    let peak = args.peak.unwrap_or_else(|| peak(&bench.facts));
    let cuda = cuda.with_hopper(args.hopper);
    let mut first = bench.facts.clone();
    let model = args.model.as_ref().map_or("embedded".into(), |path| path.display().to_string());
    first["profile"] = json!({"model": model, "size": size, "dtype": args.dtype.to_string(), "peak": peak.name});
    let (lines, known) = Lines::open(&args.to, &first)?;
    let mut run = Run { cuda, bench, lines, known, model: &pipeline.model, peak, failed: 0 };
    for (number, what) in args.what.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now()) / (args.what.len() - number) as u32;
        let program = what.program(&pipeline, args.dtype, size)?;
        run.ops(&what.name, &program, Instant::now() + left.mul_f64(OF_OPS))?;
        if Instant::now() < deadline {
            run.whole(&what.name, program)?;
        }
    }
    let failed = run.failed;
    print!("{}", page(run.lines.path())?);
    Ok(failed == 0)
}

/// The peak rates of the device, by its name.
fn peak(facts: &Value) -> Peak {
    let name = facts["device"].as_str().unwrap_or_default().to_lowercase().replace(' ', "");
    let found = PEAKS.into_iter().filter(|peak| name.contains(peak.name)).max_by_key(|peak| peak.name.len());
    found.unwrap_or_else(|| PEAKS.into_iter().find(|peak| peak.name == "h200").unwrap_or(PEAKS[0]))
}

struct Run<'m> {
    cuda: Cuda,
    bench: Bench,
    lines: Lines,
    /// Measurements that are in the file.
    known: HashSet<String>,
    model: &'m Model,
    peak: Peak,
    failed: usize,
}

impl Run<'_> {
    fn plan(&self, program: Program) -> Planned {
        plan(program, |program, node| self.cuda.workspace(program, node))
    }

    /// Every kind of op alone.
    fn ops(&mut self, what: &str, program: &Program, deadline: Instant) -> Outcome<()> {
        let mut kinds: Vec<(Kind<'_>, Value, f64)> = vec![];
        for kind in program.kinds() {
            let explained = explain(&self.plan(program.single_op(kind.node, 1)), self.peak, self.cuda.hopper())?;
            let row = &explained.rows[0];
            let kernels: Vec<&str> = row.launches.iter().map(|(launch, _)| launch.kernel.as_str()).collect();
            let line = json!({
                "what": what, "op": kind.name, "count": kind.count, "kernels": kernels, "bytes": row.bytes,
                "flops": row.flops, "least_ms": 1e3 * row.seconds, "memory_bound": row.memory_bound,
            });
            let least = row.seconds * kind.count as f64;
            kinds.push((kind, line, least));
        }
        kinds.sort_by(|(_, _, a), (_, _, b)| b.total_cmp(a));
        let count = kinds.len();
        for (number, (kind, mut line, least)) in kinds.into_iter().enumerate() {
            if Instant::now() >= deadline {
                eprintln!("{what}: {} of {count} kinds of ops not reached", count - number);
                break;
            }
            // About two milliseconds, of what takes twice its least time; what a start takes is then little of it.
            let times =
                if self.bench.is_gpu { (1e-3 * kind.count as f64 / least).clamp(4.0, 50.0) as usize } else { 1 };
            let name = json!({"what": what, "op": kind.name});
            if self.known.contains(&name.to_string()) {
                continue;
            }
            self.cuda.clear();
            self.lines.write(&json!({"begin": name}))?;
            let timed = self.load(program.single_op(kind.node, times));
            match timed.and_then(|id| self.bench.time(&mut self.cuda, id)) {
                Ok((ms, mhz)) => {
                    line["ms"] = json!(ms / times as f64);
                    line["mhz"] = json!(mhz);
                }
                Err(error) => self.fail(&mut line, &error),
            }
            self.write(&line)?;
        }
        Ok(())
    }

    /// The program as it is run, by its graph.
    fn whole(&mut self, what: &str, program: Program) -> Outcome<()> {
        let name = json!({"what": what, "ops": program.nodes.len()});
        if self.known.contains(&name.to_string()) {
            return Ok(());
        }
        self.cuda.clear();
        let explained = explain(&self.plan(program.clone()), self.peak, self.cuda.hopper())?;
        let launches: usize = explained.rows.iter().map(|row| row.launches.len()).sum();
        let mut line = json!({
            "what": what, "ops": program.nodes.len(), "launches": launches, "flops": program.flops(),
            "least_ms": 1e3 * explained.seconds(),
        });
        self.lines.write(&json!({"begin": name}))?;
        match self.load(program).and_then(|id| self.bench.time(&mut self.cuda, id)) {
            Ok((ms, mhz)) => {
                line["ms"] = json!(ms);
                line["mhz"] = json!(mhz);
            }
            Err(error) => self.fail(&mut line, &error),
        }
        self.write(&line)
    }

    /// With numbers of real scale in its buffers: zeros run faster on a GPU.
    fn load(&mut self, program: Program) -> rarebit::Result<ProgramId> {
        let inputs: Vec<_> = program.inputs.iter().map(|id| program.value(*id).clone()).collect();
        let planned = self.plan(program);
        let id = self.cuda.load(planned, self.model)?;
        for value in inputs {
            if let (Origin::Input(name), true) = (&value.origin, value.dtype != DType::I32) {
                self.cuda.write(name, Data::F32(&crate::common::speed::noise(value.len())))?;
            }
        }
        Ok(id)
    }

    fn fail(&mut self, line: &mut Value, error: &rarebit::Error) {
        self.failed += 1;
        line["error"] = json!(error.to_string());
    }

    /// Fails where the device does nothing more for this process.
    fn write(&mut self, line: &Value) -> Outcome<()> {
        self.lines.write(line)?;
        Ok(self.cuda.wait()?)
    }
}

/// What a file of this program says, in Markdown: for each program the whole and the sum of its parts, the share of each family, and the
/// ops that take most.
pub fn page(path: &Path) -> Outcome<String> {
    const MOST: usize = 15;
    let (lines, _) = read(path)?;
    let ms = |line: &Value| line["ms"].as_f64();
    let all = |line: &Value| ms(line).unwrap_or(0.0) * line["count"].as_f64().unwrap_or(0.0);
    let mut page = String::new();
    let mut names: Vec<&str> = lines.iter().filter_map(|line| line["what"].as_str()).collect();
    names.dedup();
    for name in names {
        let of = || lines.iter().filter(|line| line["what"] == name);
        let mut parts: Vec<&Value> = of().filter(|line| line["op"].is_string() && ms(line).is_some()).collect();
        parts.sort_by(|a, b| all(b).total_cmp(&all(a)));
        let sum: f64 = parts.iter().map(|line| all(line)).sum();
        let whole = of().find(|line| line["ops"].is_number());
        let _ = writeln!(page, "## {name}\n");
        let time = |ms: Option<f64>| ms.map_or("not measured".into(), |ms| format!("{ms:.3} ms"));
        let least = whole.and_then(|line| line["least_ms"].as_f64());
        let _ = writeln!(
            page,
            "Whole: {}; its parts: {sum:.3} ms; the least that peak rates allow: {}.",
            time(whole.and_then(ms)),
            time(least)
        );
        for line in of().filter(|line| line["error"].is_string()) {
            let _ = writeln!(page, "\nFailed: {}: {}", line["op"].as_str().unwrap_or("whole"), line["error"]);
        }
        let mut families: HashMap<&str, (usize, f64)> = HashMap::new();
        for line in &parts {
            let family = families.entry(line["op"].as_str().and_then(|op| op.split(' ').next()).unwrap_or_default());
            let (count, time) = family.or_default();
            (*count, *time) = (*count + line["count"].as_u64().unwrap_or(0) as usize, *time + all(line));
        }
        let mut families: Vec<_> = families.into_iter().collect();
        families.sort_by(|(a, (_, x)), (b, (_, y))| y.total_cmp(x).then(a.cmp(b)));
        page += "\n| family | ops | ms | share |\n|---|---|---|---|\n";
        for (family, (count, time)) in families {
            let _ = writeln!(page, "| {family} | {count} | {time:.3} | {:.1} % |", 100.0 * time / sum);
        }
        page += "\n| op | times | ms of one | ms of all | over the least | TFLOP/s | GB/s | kernels |\n|---|---|---|---|---|---|---|---|\n";
        for line in parts.iter().take(MOST) {
            let one = ms(line).unwrap_or(f64::NAN);
            let number = |name: &str| line[name].as_f64().unwrap_or(f64::NAN);
            let kernels: Vec<&str> =
                line["kernels"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let _ = writeln!(
                page,
                "| {} | {} | {one:.4} | {:.3} | {:.1} | {:.1} | {:.0} | {} |",
                line["op"].as_str().unwrap_or_default(),
                line["count"],
                all(line),
                one / number("least_ms"),
                number("flops") / one / 1e9,
                number("bytes") / one / 1e6,
                kernels.join(", ")
            );
        }
        page += "\n";
    }
    Ok(page)
}
