//! Making images from prompts by any method, and the files that `generate` and `minority` write.

use crate::cli::flags::images::{ImageFlags, Noise};
use crate::cli::images::record::record;
use crate::cli::images::targets::{self, Target};
use crate::cli::images::work::{self, Part, Work, job};
use crate::cli::images::writer::Writer;
use crate::cli::progress::Reporter;
use crate::cli::{atomic, machine, tensors};
use crate::data::textual_inversion;
use crate::data::{metadata, prompts};
use crate::methods::{ImageMethod, LoadedMethod};
use crate::pipeline::generate::{Image, Job};
use crate::pipeline::{Iteration, Pipeline, Progress};
use crate::plan::show_bytes;
use crate::weights::Component;
use crate::{Error, Result};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Most images of one command: each has a path and a prompt in memory.
const MOST_IMAGES: usize = 10_000_000;

/// What `--out` names: a PNG, or a folder that is made where there is none.
enum Out {
    File(PathBuf),
    Folder(PathBuf),
}

fn out(args: &ImageFlags) -> Out {
    let is_png = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    match (&args.output.out, &args.prompts) {
        (Some(path), None) if is_png(path) => Out::File(path.clone()),
        (Some(path), _) => Out::Folder(path.clone()),
        (None, None) => Out::File("image.png".into()),
        (None, Some(_)) => Out::Folder("images".into()),
    }
}

/// Every image the flags ask for.
fn all_targets(args: &ImageFlags) -> Result<Vec<Target>> {
    let (seed, count) = (args.run.sampling.seed, args.run.count.unwrap_or(1));
    Ok(match (&args.prompts, out(args)) {
        (Some(file), Out::Folder(out) | Out::File(out)) => {
            let prompts = prompts::read(file)?;
            if prompts.len() * count > MOST_IMAGES {
                return Err(Error::Usage(format!("--count {count}: more than {MOST_IMAGES} images in all")));
            }
            targets::for_file(&prompts, seed, count, &out)
        }
        (None, out) => {
            let prompt = args.prompt.as_deref().unwrap_or_default();
            let file = match out {
                Out::File(file) => file,
                Out::Folder(folder) => folder.join("image.png"),
            };
            targets::for_prompt(prompt, seed, count, &file)
        }
    })
}

/// Makes what the flags ask for by `method`.
pub fn run(args: &ImageFlags, pipeline: &Pipeline, method: &dyn ImageMethod, extras: &Extras) -> Result<()> {
    let started = Instant::now();
    let targets = all_targets(args)?;
    let settings = args.run.settings(pipeline)?;
    let noise = args.run.noise(pipeline, &settings, targets.len())?;
    prepare_output(args, extras, &targets)?;
    let work = Work { pipeline, settings: &settings, method };
    let reporter = Reporter::new(args.run.json, args.run.quiet);
    let prompts = targets.iter().map(|target| target.prompt.as_str()).chain(args.run.sampling.negative.as_deref());
    work::warn_of_learned_tokens(pipeline, prompts, &reporter)?;
    let missing = missing(args, &work, &noise, targets)?;
    work::check(method, &missing, args.run.batch)?;
    let prompts = missing.iter().map(|target| target.prompt.as_str());
    work::warn_of_cut_tokens(&work, prompts, args.run.sampling.negative.as_deref(), &reporter)?;
    args.run.sampling.remarks(pipeline).iter().for_each(|remark| reporter.warn(remark));

    let trace = extras.trace.as_ref().map(|path| Trace::create(path)).transpose()?;
    let interrupt = machine::catch_interrupt()?;
    let mut run = Run { args, work, extras, noise, interrupt, reporter, trace, writer: None };
    let latents = run.make(&missing, started)?;
    if let (Some(path), false) = (&args.output.latents_out, missing.is_empty()) {
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
        let (mut latents, flags) = (Vec::new(), &self.args.run);
        let mut executor = flags.device.executor(flags.check_finite)?;
        let parts = self.work.plan(&flags.device, &*executor, targets, flags.batch)?;
        let largest = parts.iter().map(|part| part.planned.footprint().total()).max().unwrap_or_default();
        let units = parts.iter().map(|part| part.planned.progress_units() * part.batches.len()).sum();
        for (index, Part { planned, batches }) in parts.into_iter().enumerate() {
            executor.clear();
            let before = machine::disk_bytes();
            let mut loaded = planned.load(&mut *executor)?;
            if index == 0 {
                let from_disk = machine::disk_bytes().saturating_sub(before);
                self.report_load(started.elapsed().as_secs_f64(), from_disk, largest)?;
                self.reporter.start("step", units);
            }
            for targets in batches {
                latents.extend(self.make_batch(&mut *loaded, targets)?);
            }
        }
        Ok(latents)
    }

    fn make_batch(&mut self, loaded: &mut dyn LoadedMethod, targets: &[Target]) -> Result<Vec<f32>> {
        let started = Instant::now();
        let negative = self.args.run.sampling.negative.as_deref();
        let jobs: Vec<Job> = targets.iter().map(|target| job(target, negative, &self.noise)).collect();
        let mut trace = self.trace.take();
        let images = loaded.run_checked(&jobs, &mut |progress| {
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
                let alone = self.args.prompts.is_none() && self.args.run.count.unwrap_or(1) == 1;
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
        let kept = images.into_iter().filter(|_| self.args.output.latents_out.is_some());
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
        let record = record(&self.args.run, &self.work, &self.noise, target);
        let (with_record, reporter) = (!self.args.output.no_metadata, self.reporter.clone());
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
fn inversion_file(path: &Path, target: &Target, alone: bool, loaded: &dyn LoadedMethod, index: usize) -> Result<()> {
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
    args.output.out.iter().try_for_each(|out| metadata::check_name("--out", out))?;
    if let Out::Folder(folder) = out(args) {
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    }
    for target in targets {
        if target.path.is_dir() {
            return Err(Error::Usage(format!("{}: is a folder, not a file to write", target.path.display())));
        }
        if args.output.latents_out.as_ref() == Some(&target.path) {
            return Err(Error::Usage(format!("{}: --latents-out would overwrite the image", target.path.display())));
        }
    }
    targets
        .iter()
        .map(|t| &t.path)
        .take(1)
        .chain(&args.output.latents_out)
        .chain(&extras.save_token)
        .try_for_each(|path| atomic::probe(path))
}

/// Targets that are not made yet; without a prompt file every image is made.
fn missing(args: &ImageFlags, work: &Work<'_>, noise: &Noise, targets: Vec<Target>) -> Result<Vec<Target>> {
    if args.prompts.is_none() || args.output.overwrite {
        return Ok(targets);
    }
    let mut missing = Vec::new();
    for target in targets {
        if !targets::is_finished(&target.path, &record(&args.run, work, noise, &target))? {
            missing.push(target);
        }
    }
    Ok(missing)
}
