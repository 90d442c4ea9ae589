//! `rarebit seed`: images of a prompt like a few reference images, by optimising the starting noise (SeedSelect); and images between two
//! starting noises.

pub mod flags;
mod interpolation;

use crate::cli::flags::images::ImageFlags;
use crate::cli::images::finished::Extras;
use crate::cli::images::run;
use crate::cli::images::state::StateFiles;
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::weights::Component;
use crate::{Error, Result};
use flags::{SeedFlags, Start};
use interpolation::InterpolationFlags;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
#[command(
    mut_arg("steps", |flag| flag.default_value("20")),
    mut_group("SeedFlags", |group| group.conflicts_with("interpolate"))
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
    /// Write a JSON line per iteration: loss and its terms, length of noise and gradient, distance moved
    #[arg(long, value_name = "FILE", conflicts_with = "interpolate", help_heading = "Optimisation")]
    trace: Option<PathBuf>,
    /// Go on where a run of the same command was cut short: after every iteration its state is kept beside the image, until that is
    /// finished
    #[arg(long, conflicts_with = "interpolate", help_heading = "Optimisation")]
    resume: bool,
}

pub fn run(args: Seed) -> Result<()> {
    args.interpolation.check()?;
    match args.interpolation.interpolate.is_empty() {
        true => optimise(&args),
        false => interpolate(args),
    }
}

fn optimise(args: &Seed) -> Result<()> {
    let flags = &args.images.run;
    if flags.noise.is_some() && (args.method.start != Start::Noise || args.method.bootstrap.is_some()) {
        let what = "--start nao|lol and --bootstrap make the starting noises themselves; leave it out";
        return Err(Error::Usage(format!("--noise: {what}")));
    }
    let mut extras = Extras { save_noise: args.save_noise.clone(), trace: args.trace.clone(), ..Extras::default() };
    let mut paths = Paths::default();
    args.method.references.iter().for_each(|path| paths.input("--references", path));
    args.method.other.iter().for_each(|path| paths.input("--other", path));
    args.method.clip.iter().for_each(|path| paths.input("--clip", path));
    let targets = Arc::new(run::targets(&args.images, &extras, paths)?);
    let reporter = Reporter::new(args.images.run.json, args.images.run.quiet);
    let read = args.method.read(args.images.output.strict)?;
    let others = read.1.iter().map(|other| ("--other", other));
    for (flag, references) in std::iter::once(("--references", &read.0)).chain(others) {
        references.unreadable.iter().for_each(|error| reporter.warn(&format!("{flag}: left out: {error}")));
    }
    let mut pipeline = args.images.run.open()?;
    if let Some(clip) = &args.method.clip {
        pipeline.model.add(Component::Clip, clip)?;
    }
    let mut method = args.method.seed_select(read, args.images.run.sampling.seed());
    method.trace = args.trace.is_some();
    method.checkpoints = Some(Arc::new(StateFiles { targets: Arc::clone(&targets), resume: args.resume }));
    (extras.keeps_state, extras.resume) = (true, args.resume);
    // A trace is as long as the patience lasts; one line is the least.
    extras.iterations = method.options.iterations.max(method.options.bootstrap.unwrap_or(0)).min(1);
    if flags.batch > 1 && args.method.bootstrap.is_some() {
        reporter.warn("--bootstrap: every row of a batch finds the noise that all share; --batch 1 costs least");
    }
    args.method.remarks().iter().for_each(|remark| reporter.warn(remark));
    run::run(&args.images, &pipeline, &method, &extras, &targets)
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
