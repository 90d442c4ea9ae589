//! Making images from prompts by any method, and the files that `generate` and `minority` write.

use crate::cli::flags::images::{ImageFlags, Noise};
use crate::cli::images::account::Account;
use crate::cli::images::failures::Failures;
use crate::cli::images::finished::{self, Chosen, Extras, Found};
use crate::cli::images::preview;
use crate::cli::images::record::record;
use crate::cli::images::state;
use crate::cli::images::stopwatch::Stopwatch;
use crate::cli::images::targets::{Target, Targets};
use crate::cli::images::trace::{self, Trace};
use crate::cli::images::work::{self, Part, Work, job};
use crate::cli::images::writer::Writer;
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::cli::{atomic, machine, tensors};
use crate::data::{metadata, prompts, textual_inversion};
use crate::methods::{self, ImageMethod, LoadedMethod};
use crate::pipeline::generate::{Image, Job, Settings};
use crate::pipeline::{Pipeline, Progress};
use crate::plan::show_bytes;
use crate::weights::Component;
use crate::{Error, Result};
use serde_json::json;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

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

/// Every image the flags ask for, once no file of the command is in the way of another. Nothing is written yet.
/// `paths` may hold inputs of the method.
pub fn targets(args: &ImageFlags, extras: &Extras, mut paths: Paths) -> Result<Targets> {
    let (seed, count) = (args.run.sampling.seed(), args.run.count.unwrap_or(1));
    args.inputs(&mut paths);
    args.output.out.iter().try_for_each(|out| metadata::check_name("--out", out))?;
    let out = out(args);
    let (Out::File(named) | Out::Folder(named)) = &out;
    let named = named.clone();
    paths.output("--out", &named)?;
    let beside = [("--save-token", &extras.save_token), ("--save-noise", &extras.save_noise)];
    let single =
        [("--latents-out", &args.output.latents_out), ("--trace", &extras.trace), ("--report", &extras.report)];
    for (flag, path) in single.into_iter().chain(beside) {
        path.iter().try_for_each(|path| paths.output(flag, path))?;
    }
    let targets = match (&args.prompts, out) {
        (Some(file), Out::Folder(out) | Out::File(out)) => Targets::for_file(prompts::read(file)?, seed, count, &out)?,
        (None, out) => {
            let prompt = args.prompt.as_deref().unwrap_or_default();
            let file = match out {
                Out::File(file) => file,
                Out::Folder(folder) => folder.join("image.png"),
            };
            Targets::for_prompt(prompt, seed, count, &file)?
        }
    };
    for target in targets.iter().filter(|target| target.path != named) {
        paths.numbered_output("--out", &target.path)?;
    }
    for target in targets.iter().filter(|_| extras.previews) {
        paths.numbered_output("--preview", &preview::beside(&target))?;
    }
    for (flag, path) in beside.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?))) {
        let files = targets.iter().map(|target| targets.beside(path, &target));
        files.filter(|file| file != path).try_for_each(|file| paths.numbered_output(flag, &file))?;
    }
    Ok(targets)
}

/// Makes what the flags ask for by `method`.
pub fn run(
    args: &ImageFlags,
    pipeline: &Pipeline,
    method: &dyn ImageMethod,
    extras: &Extras,
    targets: &Targets,
) -> Result<()> {
    run_accounted(args, pipeline, method, extras, targets).1
}

/// The same; what was asked for in a report is there however it ends.
pub fn run_accounted(
    args: &ImageFlags,
    pipeline: &Pipeline,
    method: &dyn ImageMethod,
    extras: &Extras,
    targets: &Targets,
) -> (Account, Result<()>) {
    let mut account = Account::default();
    let done = make_all(args, pipeline, method, (extras, targets), &mut account);
    (account, done)
}

fn make_all(
    args: &ImageFlags,
    pipeline: &Pipeline,
    method: &dyn ImageMethod,
    (extras, targets): (&Extras, &Targets),
    account: &mut Account,
) -> Result<()> {
    let started = Instant::now();
    let settings = args.run.settings(pipeline)?;
    let noise = match &extras.noise {
        Some(_) => extras.noise.clone(),
        None => args.run.noise(pipeline, &settings, targets.len())?,
    };
    prepare_output(args, extras, targets)?;
    let work = Work { pipeline, settings: &settings, method };
    let chosen = finished::choose(args, extras, &work, &noise, targets)?;
    let selection = &chosen.selection;
    let reporter = Reporter::new(args.run.json, args.run.quiet);
    work::check(method, selection.len(), args.run.batch)?;
    let negative = method.negative(args.run.sampling.negative.as_deref());
    work::warn_of_learned_tokens(pipeline, targets.prompts().chain(negative), &reporter)?;
    work::warn_of_cut_tokens(&work, selection.distinct_prompts(), negative, &reporter)?;
    let remarks =
        [args.run.remarks(pipeline, targets.len()), method.remarks(&settings), remarks_on_outputs(args, &chosen)];
    remarks.iter().flatten().for_each(|remark| reporter.warn(remark));

    let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
    let shape = [selection.len(), pipeline.config.unet.in_channels, height, width];
    if args.output.latents_out.is_some() {
        // The numbers, and the file made of them.
        let bytes = shape.iter().try_fold(2 * size_of::<f32>(), |product, side| product.checked_mul(*side));
        machine::check_host_memory(args.run.device.memory_limit, bytes, "what --latents-out holds until the end")?;
    }
    let interrupt = machine::catch_interrupt()?;
    account.interrupt = Arc::clone(&interrupt);
    let failures = Failures::new(args.output.strict || selection.len() == 1, reporter.clone());
    let mut run = Run {
        args,
        work,
        extras,
        targets,
        noise,
        interrupt,
        reporter,
        failures,
        trace: None,
        previewed: HashSet::new(),
        writer: None,
        account,
    };
    let latents = run.make(&chosen, started)?;
    if let (Some(path), false) = (&args.output.latents_out, selection.is_empty()) {
        match run.failures.count() {
            0 => tensors::write_latents(path, shape, &latents)?,
            _ => run.reporter.warn("--latents-out is not written: images are missing"),
        }
    }
    if selection.is_empty() {
        run.reporter.note("all images are already there");
    }
    run.reporter.event(json!({"event": "done", "images": selection.len() - run.failures.count()}))?;
    run.failures.result(selection.len())
}

/// What the user may not expect of the outputs.
fn remarks_on_outputs(args: &ImageFlags, chosen: &Chosen<'_>) -> Vec<String> {
    let mut remarks = Vec::new();
    let (made, all) = (chosen.selection.len(), chosen.selection.targets.len());
    if args.output.overwrite && args.prompts.is_none() {
        remarks.push("--overwrite: without --prompts every image is made anyway".to_string());
    }
    if args.output.latents_out.is_some() && made == 0 {
        remarks.push("--latents-out is not written: all images are already there".to_string());
    } else if args.output.latents_out.is_some() && made < all {
        remarks.push(format!("--latents-out holds the {made} images of this run, not the {} of before", all - made));
    }
    if chosen.unsigned > 0 {
        let what = "images are there that do not say how they were made (--no-metadata): taken as made";
        remarks.push(format!("{} {what}", chosen.unsigned));
    }
    remarks
}

struct Run<'a> {
    args: &'a ImageFlags,
    work: Work<'a>,
    extras: &'a Extras,
    targets: &'a Targets,
    noise: Noise,
    interrupt: Arc<AtomicBool>,
    reporter: Reporter,
    failures: Failures,
    trace: Option<Trace>,
    /// Images of which there is a preview.
    previewed: HashSet<usize>,
    account: &'a mut Account,
    /// Once there is something to write.
    writer: Option<Writer>,
}

impl Run<'_> {
    /// Makes and saves the chosen; returns the latents of all. Whatever happens, images that are finished are written.
    fn make(&mut self, chosen: &Chosen<'_>, started: Instant) -> Result<Vec<f32>> {
        let made = self.make_batches(chosen, started);
        let written = self.written();
        self.reporter.finish();
        written.and(made)
    }

    fn make_batches(&mut self, chosen: &Chosen<'_>, started: Instant) -> Result<Vec<f32>> {
        let (mut latents, flags, selection) = (Vec::new(), &self.args.run, &chosen.selection);
        let mut executor = flags.device.executor(flags.check_finite)?;
        if self.extras.report.is_some() {
            executor = Box::new(Stopwatch::new(executor, self.account.times.clone()));
        }
        let parts = self.work.plan(&flags.device, &*executor, selection, flags.batch)?;
        let largest = parts.iter().map(|part| part.planned.footprint().total()).max().unwrap_or_default();
        let units = parts.iter().map(Part::progress_units).fold(0, usize::saturating_add);
        // Not before the plan is known to fit: the trace of an earlier run ends here.
        self.trace =
            self.extras.trace.as_ref().map(|path| Trace::open(path, chosen.trace_end, chosen.traced)).transpose()?;
        for (index, Part { planned, batches }) in parts.into_iter().enumerate() {
            executor.clear();
            let before = machine::disk_bytes();
            let mut loaded = planned.load(&mut *executor)?;
            if index == 0 {
                // Of what was loaded, not of what the files hold when the first image is saved.
                self.work.pipeline.model.fingerprint()?;
                let from_disk = machine::disk_bytes().saturating_sub(before);
                let seconds = started.elapsed().as_secs_f64();
                (self.account.load_seconds, self.account.planned_bytes) = (seconds, largest);
                self.report_load(seconds, from_disk, largest)?;
                self.reporter.start("step", units);
            }
            for positions in batches.iter() {
                latents.extend(self.make_batch(&mut *loaded, &selection.targets(positions))?);
            }
        }
        Ok(latents)
    }

    fn make_batch(&mut self, loaded: &mut dyn LoadedMethod, targets: &[Target]) -> Result<Vec<f32>> {
        let started = Instant::now();
        let negative = self.args.run.sampling.negative.as_deref();
        let jobs: Vec<Job> = targets.iter().map(|target| job(target, negative, &self.noise)).collect();
        let mut saved = vec![false; targets.len()];
        let made = loaded.run(&jobs, &mut |progress| {
            if let Progress::Image { index, .. } = progress {
                saved[index] = true;
            }
            self.observe(progress, targets, started)
        });
        self.account.seconds += started.elapsed().as_secs_f64();
        for index in (0..targets.len()).filter(|index| saved[*index]) {
            if self.extras.report.is_some() {
                self.account.image(&targets[index]).noise = loaded.noise(index);
            }
            self.save_extras(&targets[index], loaded, index)?;
            if self.previewed.remove(&targets[index].index) || self.extras.previews && self.extras.resume {
                let target = targets[index].clone();
                self.later(move || preview::remove(&target))?;
            }
        }
        if let (Ok(_), true) = (&made, self.extras.keeps_state) {
            let first = targets[0].clone();
            // After the images of the batch, which are written in this order.
            self.later(move || state::remove(&first))?;
        }
        match made {
            // Only --latents-out needs them; a long run must not pile them up.
            Ok(_) if self.args.output.latents_out.is_none() => Ok(vec![]),
            Ok(images) => Ok(images.into_iter().flat_map(|image| image.latents).collect()),
            // One image does not spoil the others; a full disk, say, would.
            Err(error @ (Error::NotFinite(_) | Error::Numeric(_))) => {
                let error = loaded.locate(error, &jobs, &mut |progress| self.observe(progress, targets, started));
                let lost = targets.iter().zip(&saved).filter(|(_, saved)| !**saved).map(|(target, _)| &*target.path);
                self.failures.add(&lost.collect::<Vec<_>>(), error)?;
                Ok(vec![])
            }
            Err(error) => Err(error),
        }
    }

    fn observe(&mut self, progress: Progress<'_>, targets: &[Target], started: Instant) -> Result<()> {
        match progress {
            Progress::Step { .. } => self.reporter.step(),
            Progress::Again => {}
            Progress::Preview { index, image } => {
                let (target, size, rgb) = (targets[index].clone(), [image.width, image.height], image.rgb.clone());
                self.previewed.insert(target.index);
                self.later(move || preview::write(&target, size, &rgb))?;
            }
            Progress::Remark { index, text } => {
                self.reporter.warn(&format!("{}: {text}", targets[index].path.display()))
            }
            Progress::Iteration(report) => {
                self.reporter.step();
                if let (Some(_), Some(report)) = (&self.extras.report, report) {
                    self.account.iteration(targets, report);
                }
                if let (Some(trace), Some(report)) = (&mut self.trace, report) {
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
    }

    /// What belongs to image `index` of the batch that was made.
    fn save_extras(&mut self, target: &Target, loaded: &dyn LoadedMethod, index: usize) -> Result<()> {
        if let Some(path) = &self.extras.save_token {
            let path = self.targets.beside(path, target);
            let token = loaded.learned(index, &textual_inversion::word_of(&path))?;
            let bytes = textual_inversion::bytes(&token)?;
            self.write_beside(target, move || atomic::write(&path, |out| out.write_all(&bytes)))?;
        }
        if let (Some(path), Some(noise)) = (&self.extras.save_noise, loaded.noise(index)) {
            let path = self.targets.beside(path, target);
            let Settings { width, height, .. } = self.work.settings;
            let (height, width) = self.work.pipeline.latent_size(*width, *height)?;
            let shape = [1, self.work.pipeline.config.unet.in_channels, height, width];
            self.write_beside(target, move || tensors::write_noise(&path, shape, &noise))?;
        }
        let Some(chosen) = loaded.chosen(index) else { return Ok(()) };
        let path = target.path.display().to_string();
        let methods::Chosen { candidate, seed, score } = chosen;
        let what = seed.map_or(format!("candidate {candidate}"), |seed| format!("seed {seed}"));
        let note = format!("{path}: {what}, score {score:.4}");
        let event = json!({"event": "chosen", "path": path, "candidate": candidate, "seed": seed, "score": score});
        let reporter = self.reporter.clone();
        self.later(move || {
            reporter.note(&note);
            reporter.event(event)
        })
    }

    /// Writes a file that belongs to an image, unless the image there is another run's: then so is its file.
    fn write_beside(&mut self, target: &Target, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let (image, failures) = (target.path.clone(), self.failures.clone());
        self.later(move || if failures.has(&image) { Ok(()) } else { write() })
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
        let record = record(&self.args.run, &self.work, &self.noise, target)?;
        let (with_record, reporter, failures) =
            (!self.args.output.no_metadata, self.reporter.clone(), self.failures.clone());
        let (path, is_new, width, height) = (target.path.clone(), target.is_new, image.width, image.height);
        let rgb = image.rgb.clone();
        self.later(move || {
            let chunks = with_record.then_some(&record);
            let png = |out: &mut dyn std::io::Write| metadata::write_png(out, width, height, &rgb, chunks);
            let is_written = match is_new {
                true => atomic::create(&path, png)?,
                false => atomic::write(&path, png).map(|()| true)?,
            };
            if !is_written && finished::examine(&path, &record)? != Found::Image {
                let what = "appeared while this run made it with other settings; it is kept";
                return failures.add(&[&path], Error::file(&path, what));
            }
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

/// Output folders exist and can be written to before the first image is computed.
fn prepare_output(args: &ImageFlags, extras: &Extras, targets: &Targets) -> Result<()> {
    extras.report.as_deref().map_or(Ok(()), atomic::probe)?;
    if let Some(path) = &extras.trace {
        atomic::check(path)?;
        trace::check(path)?;
    }
    if let Out::Folder(folder) = out(args) {
        if folder.exists() && !folder.is_dir() {
            return Err(Error::Usage(format!(
                "--out {}: is not a folder; one image is written to a name that ends in .png",
                folder.display()
            )));
        }
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    }
    let first = targets.get(0);
    let [token, noise] =
        [&extras.save_token, &extras.save_noise].map(|path| path.as_ref().map(|path| targets.beside(path, &first)));
    let preview = extras.previews.then(|| preview::beside(&first));
    let files = [Some(&first.path), args.output.latents_out.as_ref(), token.as_ref(), noise.as_ref(), preview.as_ref()];
    files.into_iter().flatten().try_for_each(|path| atomic::probe(path))
}
