//! `rarebit seed`: images of a prompt like a few reference images, by optimising the starting noise (SeedSelect); and images between two
//! starting noises.

mod cache;
mod equal_compute;
pub mod flags;
mod interpolation;
mod watch;

use crate::cli::atomic;
use crate::cli::flags::images::ImageFlags;
use crate::cli::images::finished::Extras;
use crate::cli::images::run;
use crate::cli::images::state::StateFiles;
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::methods::ImageMethod;
use crate::weights::Component;
use crate::{Error, Result};
use equal_compute::Again;
use flags::{SeedFlags, Start};
use interpolation::InterpolationFlags;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use watch::WatchFlags;

#[derive(clap::Args)]
#[command(
    mut_arg("steps", |flag| flag.default_value("20")),
    mut_group("SeedFlags", |group| group.conflicts_with("interpolate")),
    mut_group("WatchFlags", |group| group.conflicts_with("interpolate"))
)]
pub struct Seed {
    #[command(flatten)]
    pub images: ImageFlags,
    #[command(flatten)]
    method: SeedFlags,
    #[command(flatten)]
    interpolation: InterpolationFlags,
    /// Write the optimised noise, for `generate --noise`: safetensors; several images get names of their own
    #[arg(long, value_name = "FILE", conflicts_with = "interpolate", help_heading = "Optimisation")]
    save_noise: Option<PathBuf>,
    /// Go on where a run of the same command was cut short: after every iteration its state is kept beside the image, until that is
    /// finished
    #[arg(long, conflicts_with = "interpolate", help_heading = "Optimisation")]
    resume: bool,
    #[command(flatten)]
    watch: WatchFlags,
}

pub fn run(args: Seed) -> Result<()> {
    args.interpolation.check()?;
    match args.interpolation.interpolate.is_empty() {
        true => optimise(&args),
        false => interpolate(args),
    }
}

fn optimise(args: &Seed) -> Result<()> {
    check(args)?;
    let flags = &args.images.run;
    let mut extras =
        Extras { save_noise: args.save_noise.clone(), trace: args.watch.trace.clone(), ..Extras::default() };
    let mut paths = Paths::default();
    args.method.references.iter().for_each(|path| paths.input("--references", path));
    args.method.other.iter().for_each(|path| paths.input("--other", path));
    args.method.clip.iter().for_each(|path| paths.input("--clip", path));
    args.watch.inputs(&mut paths);
    args.watch.outputs(&mut paths)?;
    (extras.previews, extras.report) = (args.watch.previews(), args.watch.report.clone());
    let targets = Arc::new(run::targets(&args.images, &extras, paths)?);
    let reporter = Reporter::new(flags.json, flags.quiet);
    let read = args.method.read(args.images.output.strict)?;
    let others = read.1.iter().map(|other| ("--other", other));
    for (flag, references) in std::iter::once(("--references", &read.0)).chain(others) {
        references.unreadable.iter().for_each(|error| reporter.warn(&format!("{flag}: left out: {error}")));
    }
    let mut pipeline = flags.open()?;
    if let Some(clip) = &args.method.clip {
        pipeline.model.add(Component::Clip, clip)?;
    }
    let mut method = args.method.seed_select(read, flags.sampling.seed());
    method.trace = args.watch.traces();
    method.watch = args.watch.watch(&mut pipeline, &targets, &flags.device)?;
    method.checkpoints = Some(Arc::new(StateFiles { targets: Arc::clone(&targets), resume: args.resume }));
    (extras.keeps_state, extras.resume) = (true, args.resume);
    let iterations = method.options.iterations + method.options.bootstrap.unwrap_or(0);
    // A trace is as long as the patience lasts; one line is the least.
    extras.iterations = iterations.min(1);
    if flags.batch > 1 && args.method.bootstrap.is_some() {
        reporter.warn("--bootstrap: every row of a batch finds the noise that all share; --batch 1 costs least");
    }
    let remarks = [args.method.remarks(), args.watch.remarks(args.method.clip.as_deref(), iterations)];
    remarks.iter().flatten().for_each(|remark| reporter.warn(remark));
    let (account, done) = run::run_accounted(&args.images, &pipeline, &method, &extras, &targets);
    let Some(path) = &args.watch.report else { return done };
    if !matches!(done, Ok(()) | Err(Error::Incomplete(_) | Error::Interrupted)) {
        return done;
    }
    let again =
        Again { args: &args.images, pipeline: &pipeline, method: &method, targets: &targets, account: &account };
    report(path, &again, args.watch.equal_compute && done.is_ok())?;
    done
}

/// Refuses what does not go together.
fn check(args: &Seed) -> Result<()> {
    let Seed { method, watch, .. } = args;
    let has_noise = args.images.run.noise.is_some();
    let wrong = if has_noise && (method.start != Start::Noise || method.bootstrap.is_some()) {
        "--noise: --start nao|lol and --bootstrap make the starting noises themselves; leave it out"
    } else if has_noise && watch.equal_compute {
        "--equal-compute: draws other noises than --noise has; leave one of them out"
    } else if watch.equal_compute && !method.other.is_empty() {
        "--equal-compute: chooses by the references alone, not by --other and --contrast; leave it out"
    } else {
        return watch.check();
    };
    Err(Error::Usage(wrong.into()))
}

/// Writes what a run took, and what as many seeds as cost the same come to.
fn report(path: &Path, again: &Again<'_>, equal_compute: bool) -> Result<()> {
    let mut report = again.account.json();
    report["options"] = again.method.options();
    if equal_compute {
        report["equal_compute"] = again.run()?;
    }
    let text = serde_json::to_string_pretty(&report).map_err(|error| Error::file(path, error.to_string()))?;
    atomic::write(path, |out| out.write_all((text + "\n").as_bytes()))
}

fn interpolate(mut args: Seed) -> Result<()> {
    let images = &mut args.images;
    for (flag, given) in [
        ("--count", images.run.count.is_some()),
        ("--noise", images.run.noise.is_some()),
        ("--prompts", images.prompts.is_some()),
    ] {
        if given {
            return Err(Error::Usage(format!("{flag}: --interpolate makes the --frames of one prompt; leave it out")));
        }
    }
    images.run.count = Some(args.interpolation.frames().into());
    let mut paths = Paths::default();
    args.interpolation.inputs(&mut paths);
    let targets = run::targets(images, &Extras::default(), paths)?;
    let pipeline = images.run.open()?;
    let noises = args.interpolation.noises(&images.run, &pipeline)?;
    let extras = Extras { noise: Some(noises), ..Extras::default() };
    run::run(images, &pipeline, &args.interpolation.method(), &extras, &targets)
}
