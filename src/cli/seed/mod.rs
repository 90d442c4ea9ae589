//! `rarebit seed`: images of a prompt like a few reference images, by optimising the starting noise (SeedSelect).

pub mod flags;

use crate::Result;
use crate::cli::flags::images::ImageFlags;
use crate::cli::images::finished::Extras;
use crate::cli::images::run;
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::methods::ImageMethod;
use crate::weights::Component;
use flags::SeedFlags;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(mut_arg("steps", |flag| flag.default_value("20")))]
pub struct Seed {
    #[command(flatten)]
    pub images: ImageFlags,
    #[command(flatten)]
    method: SeedFlags,
    /// Write the optimised noise, for `generate --noise`: safetensors; several images get names of their own
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    save_noise: Option<PathBuf>,
    /// Write a JSON line per iteration: loss and its terms, length of noise and gradient, distance moved
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    trace: Option<PathBuf>,
}

pub fn run(args: &Seed) -> Result<()> {
    let mut extras = Extras { save_noise: args.save_noise.clone(), trace: args.trace.clone(), ..Extras::default() };
    let mut paths = Paths::default();
    args.method.references.iter().for_each(|path| paths.input("--references", path));
    args.method.clip.iter().for_each(|path| paths.input("--clip", path));
    let targets = run::targets(&args.images, &extras, paths)?;
    let reporter = Reporter::new(args.images.run.json, args.images.run.quiet);
    let references = args.method.read(args.images.output.strict)?;
    references.unreadable.iter().for_each(|error| reporter.warn(&format!("--references: left out: {error}")));
    let mut pipeline = args.images.run.open()?;
    if let Some(clip) = &args.method.clip {
        pipeline.model.add(Component::Clip, clip)?;
    }
    let method = args.method.seed_select(references, args.images.run.sampling.seed(), args.trace.is_some());
    // A trace is as long as the patience lasts; one line is the least.
    extras.iterations = method.options.iterations.min(1);
    args.method.remarks().iter().for_each(|remark| reporter.warn(remark));
    run::run(&args.images, &pipeline, &method as &dyn ImageMethod, &extras, &targets)
}
