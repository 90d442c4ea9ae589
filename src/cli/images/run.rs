//! Making images from prompts by any method: the flags, targets and files that `generate` and `minority` share.

use crate::cli::flags::{self, DeviceFlags, ModelFlags, SamplingFlags};
use crate::cli::images::targets::{self, Target};
use crate::cli::images::writer::Writer;
use crate::cli::method::{Loaded, Method, Planned};
use crate::cli::progress::Reporter;
use crate::cli::{atomic, machine, tensors};
use crate::data::metadata::{self, Record};
use crate::data::prompts;
use crate::data::textual_inversion;
use crate::exec::Executor;
use crate::pipeline::Iteration;
use crate::pipeline::Pipeline;
use crate::pipeline::Progress;
use crate::pipeline::generate::{Image, Job, Settings};
use crate::plan::show_bytes;
use crate::text::Place;
use crate::weights::{Component, fingerprint};
use crate::{Error, Result};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Prompts, model, sampling and output.
#[derive(clap::Args)]
pub struct ImageFlags {
    /// What the image should show
    #[arg(required_unless_present = "prompts", conflicts_with = "prompts")]
    pub prompt: Option<String>,
    /// Prompts from a file, one per line; images that are already in --out are not made again
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelFlags,
    #[command(flatten)]
    pub device: DeviceFlags,
    #[command(flatten)]
    pub sampling: SamplingFlags,
    /// A learned token (textual inversion): safetensors; prompts name it by the word in the file, else by <FILE>
    #[arg(long, value_name = "FILE")]
    pub token: Vec<PathBuf>,
    /// Starting noise: safetensors, tensor `noise`, f32 [B, C, H/f, W/f], unit variance, one row per image
    #[arg(long, value_name = "FILE")]
    noise: Option<PathBuf>,
    /// Images per prompt [default: 1]
    #[arg(long, allow_negative_numbers = true, value_parser = flags::count)]
    pub count: Option<usize>,
    /// Images sampled together
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = flags::count)]
    pub batch: usize,
    /// The PNG to write, or a folder [default: image.png; images/ for --prompts]
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// Write the final latents of the images made: safetensors, tensor `latents`
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,
    /// Make images again that --prompts finds already made
    #[arg(long)]
    pub overwrite: bool,
    /// Write no text chunks into the PNGs
    #[arg(long)]
    no_metadata: bool,
    /// Stop at the first op whose output is not finite; without, final latents and pixels are looked at, and what made such is
    /// repeated to name the op
    #[arg(long)]
    pub check_finite: bool,
    /// Worker threads, at most 1024 [default: one per core]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// No progress; warnings stay
    #[arg(long)]
    pub quiet: bool,
    /// Events as JSON lines on stdout
    #[arg(long)]
    pub json: bool,
}

impl ImageFlags {
    pub fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// The model, with its learned tokens.
    pub fn open(&self) -> Result<Pipeline> {
        let mut pipeline = self.model.open()?;
        for path in &self.token {
            pipeline.learn(textual_inversion::read(path)?)?;
        }
        Ok(pipeline)
    }

    /// Rows of `--noise`, one per image.
    pub fn noise(&self, pipeline: &Pipeline, settings: &Settings, images: usize) -> Result<Noise> {
        let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
        let shape = [images, pipeline.config.unet.in_channels, height, width];
        self.noise.as_ref().map(|path| tensors::read_noise(path, shape)).transpose()
    }

    fn count(&self) -> usize {
        self.count.unwrap_or(1)
    }

    /// The record images of this run carry; prompt, seed and row of `noise` are the target's.
    fn record(&self, job: &Work<'_>, noise: &Noise, target: &Target) -> Record {
        let Work { pipeline, settings, method } = job;
        let scheduler = &pipeline.config.scheduler;
        let row = noise.as_ref().map(|rows| &rows[target.index]);
        let hash = |row: &Vec<f32>| format!("{:016x}", fingerprint(row.iter().flat_map(|x| x.to_le_bytes())));
        Record {
            version: env!("CARGO_PKG_VERSION").into(),
            method: method.name().into(),
            options: method.options(),
            model: self.model.name(),
            model_hash: pipeline.model.fingerprint().to_string(),
            prompt: target.prompt.clone(),
            negative: self.sampling.negative.clone(),
            seed: target.seed,
            rng: settings.rng.to_string(),
            noise: row.map(hash),
            steps: settings.sampler.steps,
            sampler: settings.sampler.method.to_string(),
            spacing: settings.sampler.spacing(scheduler).to_string(),
            eta: settings.sampler.eta,
            guidance: settings.sampler.guidance,
            cfg_pp: settings.sampler.cfg_pp,
            prediction: format!("{:?}", scheduler.prediction).to_lowercase(),
            width: settings.width,
            height: settings.height,
            dtype: settings.dtype.to_string(),
        }
    }

    fn out(&self) -> Out {
        let is_png = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
        match (&self.out, &self.prompts) {
            (Some(path), None) if is_png(path) => Out::File(path.clone()),
            (Some(path), _) => Out::Folder(path.clone()),
            (None, None) => Out::File("image.png".into()),
            (None, Some(_)) => Out::Folder("images".into()),
        }
    }

    fn targets(&self) -> Result<Vec<Target>> {
        let (seed, count) = (self.sampling.seed, self.count());
        Ok(match (&self.prompts, self.out()) {
            (Some(file), Out::Folder(out) | Out::File(out)) => {
                let prompts = prompts::read(file)?;
                if prompts.len() * count > MOST_IMAGES {
                    return Err(Error::Usage(format!("--count {count}: more than {MOST_IMAGES} images in all")));
                }
                targets::for_file(&prompts, seed, count, &out)
            }
            (None, out) => {
                let prompt = self.prompt.as_deref().unwrap_or_default();
                let file = match out {
                    Out::File(file) => file,
                    Out::Folder(folder) => folder.join("image.png"),
                };
                targets::for_prompt(prompt, seed, count, &file)
            }
        })
    }
}

/// Most images of one command: each has a path and a prompt in memory.
const MOST_IMAGES: usize = 10_000_000;

/// Starting noise from a file, a row per image.
pub type Noise = Option<Vec<Vec<f32>>>;

/// What `--out` names: a PNG, or a folder that is made where there is none.
enum Out {
    File(PathBuf),
    Folder(PathBuf),
}

/// What stays the same for all images of a command.
pub struct Work<'a> {
    pub pipeline: &'a Pipeline,
    pub settings: &'a Settings,
    pub method: &'a Method,
}

impl<'a> Work<'a> {
    /// Plans what makes batches like these targets, and refuses what does not fit the memory.
    pub fn plan(&self, device: &DeviceFlags, executor: &dyn Executor, batch: &[Target]) -> Result<Planned<'a>> {
        let prompts: Vec<&str> = batch.iter().map(|target| target.prompt.as_str()).collect();
        let (limit, free) = (device.memory_limit, executor.free_memory()?);
        let planned = self.method.plan(self.pipeline, executor, self.settings, &prompts, limit.or(free))?;
        machine::check_memory(limit, free, &planned.footprint(), flags::smaller_plan(batch.len()))?;
        Ok(planned)
    }
}

/// Whole batches share one set of programs; a smaller last batch gets its own. None is empty.
pub fn groups(targets: &[Target], batch: usize) -> impl Iterator<Item = std::slice::Chunks<'_, Target>> {
    let whole = targets.len() - targets.len() % batch;
    let groups = [&targets[..whole], &targets[whole..]].into_iter().filter(|group| !group.is_empty());
    groups.map(move |group| group.chunks(batch))
}

/// What a method is asked for.
pub fn job(target: &Target, negative: Option<&str>, noise: &Noise) -> Job {
    Job {
        prompt: target.prompt.clone(),
        negative: negative.map(str::to_string),
        seed: target.seed,
        draws: noise.iter().map(|rows| rows[target.index].clone()).collect(),
    }
}

/// Makes what the flags ask for by `method`; `also` sees every image with what was learned for it.
pub fn run(args: &ImageFlags, pipeline: &Pipeline, method: &Method, extras: &Extras) -> Result<()> {
    let started = Instant::now();
    let targets = args.targets()?;
    let settings = args.sampling.settings(pipeline, args.device.program_dtype()?)?;
    let noise = args.noise(pipeline, &settings, targets.len())?;
    prepare_output(args, extras, &targets)?;
    let work = Work { pipeline, settings: &settings, method };
    let missing = missing(args, &work, &noise, targets)?;
    let reporter = Reporter::new(args.json, args.quiet);
    groups(&missing, args.batch).flatten().try_for_each(|batch| method.check(batch.len()))?;
    let prompts = missing.iter().map(|target| target.prompt.as_str());
    warn_of_cut_tokens(&work, prompts, args.sampling.negative.as_deref(), &reporter)?;
    args.sampling.remarks(pipeline).iter().for_each(|remark| reporter.warn(remark));

    let trace = extras.trace.as_ref().map(|path| Trace::create(path)).transpose()?;
    let interrupt = machine::catch_interrupt()?;
    let mut run = Run { args, work, extras, noise, interrupt, reporter, trace, writer: None };
    let latents = run.make(&missing, started)?;
    if let (Some(path), false) = (&args.latents_out, missing.is_empty()) {
        let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
        let shape = [missing.len(), pipeline.config.unet.in_channels, height, width];
        tensors::write_latents(path, shape, &latents)?;
    }
    if missing.is_empty() {
        run.reporter.note("all images are already there");
    }
    run.trace.map_or(Ok(()), Trace::finish)?;
    run.reporter.event(json!({"event": "done", "images": missing.len()}))
}

/// What only some methods write.
#[derive(Default)]
pub struct Extras {
    /// Learned tokens, one file per image.
    pub save_token: Option<PathBuf>,
    /// JSON lines, one per iteration.
    pub trace: Option<PathBuf>,
}

struct Run<'a> {
    args: &'a ImageFlags,
    work: Work<'a>,
    extras: &'a Extras,
    noise: Noise,
    interrupt: Arc<AtomicBool>,
    reporter: Reporter,
    trace: Option<Trace>,
    /// Once there is something to write.
    writer: Option<Writer>,
}

impl Run<'_> {
    /// Makes and saves the targets; returns the latents of all. Whatever happens, images that are finished are written.
    fn make(&mut self, targets: &[Target], started: Instant) -> Result<Vec<f32>> {
        let made = self.make_batches(targets, started);
        let written = self.written();
        self.reporter.finish();
        written.and(made)
    }

    fn make_batches(&mut self, targets: &[Target], started: Instant) -> Result<Vec<f32>> {
        let mut latents = Vec::new();
        let mut executor = self.args.device.executor(self.args.check_finite)?;
        for (part, group) in groups(targets, self.args.batch).enumerate() {
            executor.clear();
            let first = group.clone().next().unwrap_or_default();
            let planned = self.work.plan(&self.args.device, &*executor, first)?;
            let (footprint, ticks) = (planned.footprint(), planned.ticks());
            let before = machine::disk_bytes();
            let mut loaded = planned.load(&mut *executor)?;
            if part == 0 {
                let from_disk = machine::disk_bytes().saturating_sub(before);
                self.report_load(started.elapsed().as_secs_f64(), from_disk, footprint.total())?;
                self.reporter.start("step", targets.len().div_ceil(self.args.batch) * ticks);
            }
            for targets in group {
                latents.extend(self.make_batch(&mut loaded, targets)?);
            }
        }
        Ok(latents)
    }

    fn make_batch(&mut self, loaded: &mut Loaded<'_, '_>, targets: &[Target]) -> Result<Vec<f32>> {
        let started = Instant::now();
        let negative = self.args.sampling.negative.as_deref();
        let jobs: Vec<Job> = targets.iter().map(|target| job(target, negative, &self.noise)).collect();
        let mut trace = self.trace.take();
        let images = loaded.run(&jobs, &mut |progress| {
            match progress {
                Progress::Step { .. } => self.reporter.step(),
                Progress::Again => {}
                Progress::Iteration(report) => {
                    self.reporter.step();
                    if let (Some(trace), Some(report)) = (trace.as_mut(), report) {
                        trace.write(targets, report)?;
                    }
                }
                Progress::Image { index, image } => {
                    let seconds = started.elapsed().as_secs_f64() / targets.len() as f64;
                    return self.save(&targets[index], image, seconds);
                }
            }
            if self.writer.as_ref().is_some_and(Writer::has_failed) {
                self.written()?;
            }
            if self.interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
        })?;
        self.trace = trace;
        for (index, target) in targets.iter().enumerate() {
            if let Some(path) = &self.extras.save_token {
                let alone = self.args.prompts.is_none() && self.args.count() == 1;
                inversion_file(path, target, alone, loaded, index)?;
            }
            if let Some(chosen) = loaded.chosen(index) {
                let path = target.path.display().to_string();
                let note = format!("{path}: seed {}, score {:.4}", chosen.seed, chosen.score);
                let event = json!({"event": "chosen", "path": path, "seed": chosen.seed, "score": chosen.score});
                let reporter = self.reporter.clone();
                self.later(move || {
                    reporter.note(&note);
                    reporter.event(event)
                })?;
            }
        }
        // Only --latents-out needs them; a long run must not pile them up.
        let kept = images.into_iter().filter(|_| self.args.latents_out.is_some());
        Ok(kept.flat_map(|image| image.latents).collect())
    }

    /// A load is cold when most of the stored weights had to come from the disk, warm when the system still held them.
    fn report_load(&self, seconds: f64, from_disk: u64, planned: usize) -> Result<()> {
        let stored: usize = Component::PIPELINE.iter().map(|&c| self.work.pipeline.model.bytes(c)).sum();
        let state = if 2 * from_disk > stored as u64 { "cold" } else { "warm" };
        self.reporter.note(&format!("loaded in {seconds:.2} s ({state}), {} planned", show_bytes(planned)));
        self.reporter.event(json!({
            "event": "load", "seconds": seconds, "state": state, "disk_bytes": from_disk, "stored_bytes": stored,
            "planned_bytes": planned
        }))
    }

    /// Encodes, writes and reports an image while the next one is made.
    fn save(&mut self, target: &Target, image: &Image, seconds: f64) -> Result<()> {
        let record = self.args.record(&self.work, &self.noise, target);
        let (with_record, reporter) = (!self.args.no_metadata, self.reporter.clone());
        let (path, width, height, rgb) = (target.path.clone(), image.width, image.height, image.rgb.clone());
        self.later(move || {
            let chunks = with_record.then_some(&record);
            atomic::write(&path, |out| metadata::write_png(out, width, height, &rgb, chunks))?;
            let event =
                json!({"event": "image", "path": path.display().to_string(), "seconds": seconds, "record": record});
            reporter.image(&path, event)
        })
    }

    /// Does something beside the sampling, after all that was put off before: what is said of images keeps its order.
    fn later(&mut self, task: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => Writer::start()?,
        };
        let accepted = writer.add(task);
        self.writer = Some(writer);
        if accepted { Ok(()) } else { self.written() }
    }

    /// Waits for what was put off; its first failure.
    fn written(&mut self) -> Result<()> {
        self.writer.take().map_or(Ok(()), Writer::finish)
    }
}

/// Writes what was learned for one image; several images get their seed before the extension, those of a prompt file the image's
/// name.
fn inversion_file(path: &Path, target: &Target, alone: bool, loaded: &Loaded<'_, '_>, index: usize) -> Result<()> {
    let path = if alone { path.to_path_buf() } else { targets::beside(path, &target.path) };
    let token = loaded.learned(index, &textual_inversion::word_of(&path))?;
    let bytes = textual_inversion::bytes(&token)?;
    atomic::write(&path, |out| out.write_all(&bytes))
}

/// A file of JSON lines that grows while images are made, and is whole lines at any time.
struct Trace {
    path: PathBuf,
    out: std::io::LineWriter<std::fs::File>,
}

impl Trace {
    fn create(path: &Path) -> Result<Trace> {
        let out = std::fs::File::create(path).map_err(Error::io("create", path))?;
        Ok(Trace { path: path.to_path_buf(), out: std::io::LineWriter::new(out) })
    }

    fn write(&mut self, targets: &[Target], report: &Iteration) -> Result<()> {
        let mut line = json!(report);
        line["seeds"] = json!(targets.iter().map(|target| target.seed).collect::<Vec<_>>());
        line["images"] = json!(targets.iter().map(|target| target.index).collect::<Vec<_>>());
        writeln!(self.out, "{line}").map_err(Error::io("write", &self.path))
    }

    fn finish(mut self) -> Result<()> {
        self.out.flush().map_err(Error::io("write", &self.path))
    }
}

/// Output folders exist and can be written to before the first image is computed.
fn prepare_output(args: &ImageFlags, extras: &Extras, targets: &[Target]) -> Result<()> {
    args.out.iter().try_for_each(|out| metadata::check_name("--out", out))?;
    if let Out::Folder(folder) = args.out() {
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    }
    for target in targets {
        if target.path.is_dir() {
            return Err(Error::Usage(format!("{}: is a folder, not a file to write", target.path.display())));
        }
        if args.latents_out.as_ref() == Some(&target.path) {
            return Err(Error::Usage(format!("{}: --latents-out would overwrite the image", target.path.display())));
        }
    }
    targets
        .iter()
        .map(|t| &t.path)
        .take(1)
        .chain(&args.latents_out)
        .chain(&extras.save_token)
        .try_for_each(|path| atomic::probe(path))
}

/// Targets that are not made yet; without a prompt file every image is made.
fn missing(args: &ImageFlags, work: &Work<'_>, noise: &Noise, targets: Vec<Target>) -> Result<Vec<Target>> {
    if args.prompts.is_none() || args.overwrite {
        return Ok(targets);
    }
    let mut missing = Vec::new();
    for target in targets {
        if !targets::is_finished(&target.path, &args.record(work, noise, &target))? {
            missing.push(target);
        }
    }
    Ok(missing)
}

pub fn warn_of_cut_tokens<'a>(
    work: &Work<'_>,
    prompts: impl Iterator<Item = &'a str>,
    negatives: impl IntoIterator<Item = &'a str>,
    reporter: &Reporter,
) -> Result<()> {
    let (pipeline, reserved) = (work.pipeline, work.method.reserved_tokens());
    // The unconditional branch holds no learnable token.
    let negatives = negatives.into_iter().map(|negative| (negative, 0));
    let mut texts: Vec<(&str, usize)> = prompts.map(|prompt| (prompt, reserved)).chain(negatives).collect();
    texts.dedup();
    for (prompt, reserved) in texts {
        let cut = pipeline.frame(prompt, reserved, Place::End)?.swap_remove(0).0.cut;
        if !cut.is_empty() {
            let kept = (pipeline.tokens() - 2).saturating_sub(reserved);
            reporter.warn(&format!("'{prompt}': only {kept} tokens fit, cut: {}", cut.join(" ")));
            reporter.event(json!({"event": "cut", "prompt": prompt, "tokens": cut}))?;
        }
    }
    Ok(())
}
