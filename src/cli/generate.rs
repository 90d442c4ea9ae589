//! `rarebit generate`: prompts to PNG files, by plain sampling or one of the samplers that methods are compared with.

use crate::Result;
use crate::cli::flags::images::ImageFlags;
use crate::cli::flags::method::Context;
use crate::cli::images::finished::Extras;
use crate::cli::images::run;
use crate::cli::paths::Paths;
use crate::cli::registry::Switched;

#[derive(clap::Args)]
pub struct Generate {
    #[command(flatten)]
    pub images: ImageFlags,
    #[command(flatten)]
    method: Switched,
}

pub fn run(args: &Generate) -> Result<()> {
    let extras = Extras::default();
    let targets = run::targets(&args.images, &extras, Paths::default())?;
    let pipeline = args.images.run.open()?;
    let embedded = args.images.run.model.model.is_none();
    let context = Context { pipeline: &pipeline, embedded, seed: args.images.run.sampling.seed(), several: false };
    let method = args.method.method(&context)?;
    run::run(&args.images, &pipeline, &*method, &extras, &targets)
}
