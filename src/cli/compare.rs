//! `rarebit compare`: the same seeds by several methods on one sheet, with what each method cost and what its images are worth.

use crate::Result;
use crate::cli::flags::images::RunFlags;
use crate::cli::flags::method::Context;
use crate::cli::images::comparison::{self, Comparison};
use crate::cli::images::scores::Score;
use crate::cli::paths::Paths;
use crate::cli::registry::Listed;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Compare {
    /// What the images should show
    prompt: String,
    #[command(flatten)]
    methods: Listed,
    /// The sheet
    #[arg(long, value_name = "FILE.png", default_value = "compare.png")]
    out: PathBuf,
    /// What the images are measured in besides what is read from those of the embedded model
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SCORE,...")]
    score: Vec<Score>,
    #[command(flatten)]
    run: RunFlags,
}

impl Compare {
    pub fn threads(&self) -> Option<usize> {
        self.run.threads()
    }
}

pub fn run(args: &Compare) -> Result<()> {
    let mut paths = Paths::default();
    args.run.inputs(&mut paths);
    args.methods.inputs(&mut paths)?;
    paths.output("--out", &args.out)?;
    let pipeline = args.run.open()?;
    let embedded = args.run.model.model.is_none();
    let context = Context { pipeline: &pipeline, embedded, seed: args.run.sampling.seed(), several: true };
    let methods = args.methods.methods(&context)?;
    let (prompt, path) = (args.prompt.as_str(), args.out.as_path());
    let comparison = Comparison { prompt, methods: &methods, path, flag: "--out", ledger: true, scores: &args.score };
    comparison::run(&args.run, &context, &comparison)
}
