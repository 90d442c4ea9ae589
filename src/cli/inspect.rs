//! `rarebit inspect`: what a model holds and needs, or how an image was made.

use crate::cli::flags::device::{self, Device, DeviceFlags};
use crate::cli::flags::given::Given;
use crate::cli::flags::model::ModelFlags;
use crate::cli::flags::sampling::SamplingFlags;
use crate::cli::flags::values;
use crate::cli::machine::check_memory;
use crate::cli::terminal::{print_json, print_line, print_text};
use crate::data::{images, metadata};
use crate::exec::cuda::{self, Explained, Peak, explain};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Generator;
use crate::plan::{Footprint, show_bytes};
use crate::sampler::Method;
use crate::weights::Component;
use crate::{Error, Result, input};
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Inspect {
    /// A model (folder or .safetensors) or a PNG [default: the embedded model]
    #[arg(value_name = "MODEL|IMAGE.png", conflicts_with = "model")]
    path: Option<PathBuf>,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Print the memory plan of every program for these sampling flags
    #[arg(long)]
    plan: bool,
    /// Print every op of every program
    #[arg(long)]
    ops: bool,
    /// Print each op's kernels, grids, memory and FLOPs, and the least time a GPU could take: a100, l4, l40s, rtx4090, h100,
    /// h200, b200 or rtx5090
    #[arg(long, value_name = "GPU")]
    explain: Option<Peak>,
    /// Images sampled together, for the plan
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = values::count)]
    batch: usize,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

impl Inspect {
    fn is_planned(&self) -> bool {
        self.plan || self.ops || self.explain.is_some() || self.device.memory_limit.is_some()
    }
}

/// Flags that a description needs.
const MODEL: [&str; 5] = ["path", "model", "unet", "prediction", "json"];
/// Flags that no plan depends on.
const NOT_PLANNED: [&str; 3] = ["seed", "rng", "negative"];

pub fn run(args: &Inspect, given: &Given) -> Result<()> {
    match &args.path {
        Some(path) if is_png(path)? => {
            given.warn_of(|flag| !["path", "json"].contains(&flag), "for an image");
            inspect_image(path, args.json)
        }
        path => {
            match args.is_planned() {
                true => given.warn_of(|flag| NOT_PLANNED.contains(&flag), "in a plan"),
                false => given.warn_of(|flag| !MODEL.contains(&flag), "without --plan"),
            }
            let mut model = args.model.clone();
            model.model = path.clone().or(model.model);
            inspect_model(args, &model)
        }
    }
}

fn is_png(path: &Path) -> Result<bool> {
    if path.is_dir() {
        return Ok(false);
    }
    let mut start = Vec::new();
    input::open(path)?.take(8).read_to_end(&mut start).map_err(Error::io("read", path))?;
    Ok(start == metadata::SIGNATURE)
}

/// Text that cannot be read is the error at the end.
fn inspect_image(path: &Path, json: bool) -> Result<()> {
    let bytes = input::read(path, images::MOST_BYTES)?;
    let (mut texts, mut wrong) = (Vec::new(), None);
    for (key, text) in metadata::texts(path, &bytes, |_| true)? {
        match text {
            Ok(text) => texts.push((key, text)),
            Err(error) => wrong = wrong.or(Some(error)),
        }
    }
    if json {
        // The record is JSON itself; other chunks are strings.
        let chunk = |(key, text): (String, String)| {
            let value = if key == metadata::RECORD { serde_json::from_str(&text).ok() } else { None };
            (key, value.unwrap_or(Value::String(text)))
        };
        print_json(&Value::Object(texts.into_iter().map(chunk).collect()))?;
    } else if texts.is_empty() && wrong.is_none() {
        print_line("no text chunks")?;
    } else {
        texts.iter().try_for_each(|(key, text)| print_line(&format!("{key}: {text}")))?;
    }
    wrong.map_or(Ok(()), Err)
}

fn inspect_model(args: &Inspect, model: &ModelFlags) -> Result<()> {
    let pipeline = model.open()?;
    let limit = args.device.memory_limit;
    let plan = match args.is_planned() {
        true => Some(plan(args, &pipeline)?),
        false => None,
    };
    let explained = match (&plan, args.explain) {
        (Some(plan), Some(peak)) => {
            plan.programs().all().iter().map(|planned| explain(planned, peak, hopper(args))).collect::<Result<_>>()?
        }
        (None, _) | (_, None) => vec![],
    };
    show_model(args, &pipeline, plan.as_ref(), &explained)?;
    // A plan may be made for another machine; only a limit that was given is held against it.
    match (plan, limit) {
        (Some(plan), Some(limit)) => {
            check_memory(Some(limit), None, &plan.footprint(), device::smaller_plan(args.batch))
        }
        (None, _) | (_, None) => Ok(()),
    }
}

fn show_model(
    args: &Inspect,
    pipeline: &Pipeline,
    plan: Option<&Generator<'_>>,
    explained: &[Explained],
) -> Result<()> {
    if args.json {
        let mut report = describe_json(pipeline);
        if let Some(plan) = plan {
            report["plan"] = plan_json(&plan.footprint());
        }
        if !explained.is_empty() {
            report["explain"] = explained.iter().map(explain_json).collect();
        }
        return print_json(&report);
    }
    describe(pipeline)?;
    let Some(plan) = plan else { return Ok(()) };
    if args.ops {
        for planned in plan.programs().all() {
            print_text(&planned.program.to_string())?;
        }
    }
    for explained in explained {
        print_text(&explained.to_string())?;
    }
    print_text(&plan.footprint().to_string())
}

/// A plan needs no device: what runs on a GPU is planned as for one.
fn plan<'p>(args: &Inspect, pipeline: &'p Pipeline) -> Result<Generator<'p>> {
    let device = if args.explain.is_some() { Device::Cuda(0) } else { args.device.device };
    let device = DeviceFlags { device, ..args.device };
    let settings = args.sampling.settings(pipeline, device.program_dtype()?)?;
    match device.device {
        Device::Cuda(_) => Generator::plan(pipeline, &cuda::Planner { hopper: hopper(args) }, settings, args.batch),
        Device::Auto | Device::Cpu => Generator::plan(pipeline, &*device.executor(false)?, settings, args.batch),
    }
}

/// What the kernels for Hopper do on the GPU that is planned for, which is one if none is named.
fn hopper(args: &Inspect) -> cuda::Hopper {
    args.explain.map_or(args.device.hopper, |peak| peak.hopper(args.device.hopper))
}

fn explain_json(explained: &Explained) -> Value {
    let launch = |(launch, registers): &(cuda::Launch, Option<u32>)| {
        json!({"kernel": launch.kernel, "grid": launch.grid, "block": launch.block, "shared": launch.shared,
               "registers": registers})
    };
    let row = |row: &cuda::Row| {
        let launches: Vec<Value> = row.launches.iter().map(launch).collect();
        json!({"op": row.op, "bytes": row.bytes, "flops": row.flops, "seconds": row.seconds, "launches": launches})
    };
    let rows: Vec<Value> = explained.rows.iter().map(row).collect();
    json!({"program": explained.program, "gpu": explained.peak.name, "seconds": explained.seconds(), "ops": rows})
}

/// Tensors, parameters, bytes and stored types of a component.
struct Contents {
    tensors: usize,
    parameters: usize,
    bytes: usize,
    dtypes: Vec<String>,
}

fn contents(pipeline: &Pipeline, component: Component) -> Contents {
    let model = &pipeline.model;
    let mut contents = Contents { tensors: 0, parameters: 0, bytes: 0, dtypes: vec![] };
    for key in model.keys(component) {
        let (Some(shape), Some(dtype)) = (model.shape(component, key), model.dtype(component, key)) else { continue };
        let parameters: usize = shape.iter().product();
        contents.tensors += 1;
        contents.parameters += parameters;
        contents.bytes += parameters * dtype.bitsize() / 8;
        contents.dtypes.push(dtype.to_string());
    }
    contents.dtypes.sort();
    contents.dtypes.dedup();
    contents
}

fn describe(pipeline: &Pipeline) -> Result<()> {
    let config = &pipeline.config;
    print_line(&format!("model       {}", pipeline.model.path().display()))?;
    print_line(&format!(
        "layout      {}",
        if pipeline.model.is_single_file() { "single file" } else { "diffusers folder" }
    ))?;
    print_line(&format!("family      {:?}, predicts {:?}", config.family, config.scheduler.prediction).to_lowercase())?;
    print_line(&format!("image       {0}x{0}, {1} prompt tokens", config.image_size, pipeline.tokens()))?;
    let sampler = Method::of(&config.scheduler).map_or("not here; ddim is used".to_string(), |m| m.to_string());
    print_line(&format!("scheduler   {} ({sampler})", config.scheduler.class))?;
    for component in Component::ALL.into_iter().filter(|&c| pipeline.model.has(c)) {
        let c = contents(pipeline, component);
        print_line(&format!(
            "{:<15} {:>5} tensors {:>14} parameters {:>10} {}",
            component.name(),
            c.tensors,
            c.parameters,
            show_bytes(c.bytes),
            c.dtypes.join("+")
        ))?;
    }
    Ok(())
}

fn describe_json(pipeline: &Pipeline) -> Value {
    let config = &pipeline.config;
    let lower = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    let components: serde_json::Map<String, Value> = Component::ALL
        .into_iter()
        .filter(|&c| pipeline.model.has(c))
        .map(|component| {
            let c = contents(pipeline, component);
            let value = json!({"tensors": c.tensors, "parameters": c.parameters, "bytes": c.bytes, "dtypes": c.dtypes});
            (component.name().to_string(), value)
        })
        .collect();
    json!({
        "model": pipeline.model.path().display().to_string(),
        "layout": if pipeline.model.is_single_file() { "single file" } else { "diffusers folder" },
        "family": lower(&config.family),
        "prediction": lower(&config.scheduler.prediction),
        "image_size": config.image_size,
        "tokens": pipeline.tokens(),
        "scheduler": config.scheduler.class,
        "components": components,
    })
}

fn plan_json(footprint: &Footprint) -> Value {
    let programs: Vec<Value> = footprint
        .lines
        .iter()
        .map(|line| {
            json!({
                "program": line.program, "ops": line.ops, "macs": line.macs, "arena_bytes": line.arena_bytes,
                "live_bytes": line.live_bytes, "peak_op": line.peak_op
            })
        })
        .collect();
    json!({
        "total_bytes": footprint.total(), "weight_bytes": footprint.weight_bytes,
        "buffer_bytes": footprint.buffer_bytes, "arena_bytes": footprint.arena_bytes, "programs": programs
    })
}
