//! `rarebit minority`: images of a prompt that the model finds unlikely, by MinorityPrompt (Um & Ye 2025).

pub mod flags;

use crate::cli::baselines::{CadsFlags, DdimFlags, NullPromptFlags, SgmsFlags};
use crate::cli::flags::images::ImageFlags;
use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::images::comparison::{self, Comparison};
use crate::cli::images::finished::Extras;
use crate::cli::images::run;
use crate::cli::images::targets::Targets;
use crate::cli::paths::Paths;
use crate::cli::progress::Reporter;
use crate::cli::terminal::print_line;
use crate::methods::baselines::ddim::Ddim;
use crate::methods::minority::MinorityPrompt;
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::pipeline::Pipeline;
use crate::plan::show_bytes;
use crate::sampler;
use crate::{Error, Result};
use flags::{Explained, MinorityFlags, Mode, What};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Minority {
    #[command(flatten)]
    pub images: ImageFlags,
    #[command(flatten)]
    method: MinorityFlags,
    /// Write the learned token as a textual inversion, safetensors; several images get names of their own
    #[arg(long, value_name = "FILE", help_heading = "Token")]
    save_token: Option<PathBuf>,
    /// Write a JSON line per iteration: objective, length of the gradient, distance moved
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print every setting with where it comes from, which steps are optimised, the UNet passes and the memory, and stop
    #[arg(long)]
    explain: bool,
    #[command(flatten, next_help_heading = "Comparison")]
    comparison: CompareFlags,
}

#[derive(clap::Args)]
#[command(
    mut_group("NullPromptFlags", |group| group.requires("compare")),
    mut_group("CadsFlags", |group| group.requires("compare")),
    mut_group("SgmsFlags", |group| group.requires("compare")),
    mut_arg("cads", |flag| flag.hide(true))
)]
struct CompareFlags {
    /// Make the images of --count seeds [default: 4] by plain sampling, null-prompted, CADS, SGMS and this method, and
    /// write them side by side on one sheet; `rarebit compare` has more methods and what each costs
    #[arg(long, value_name = "FILE.png")]
    compare: Option<PathBuf>,
    #[command(flatten)]
    null_prompt: NullPromptFlags,
    #[command(flatten)]
    cads: CadsFlags,
    #[command(flatten)]
    sgms: SgmsFlags,
}

impl Minority {
    /// The flags of what is written of single images, and whether they are given.
    fn outputs(&self) -> [(&'static str, bool); 7] {
        let output = &self.images.output;
        [
            ("--out", output.out.is_some()),
            ("--latents-out", output.latents_out.is_some()),
            ("--overwrite", output.overwrite),
            ("--strict", output.strict),
            ("--no-metadata", output.no_metadata),
            ("--save-token", self.save_token.is_some()),
            ("--trace", self.trace.is_some()),
        ]
    }

    /// Refuses what a comparison would silently leave out. Not clap's conflicts: those would also lift what needs --compare.
    fn check_comparison(&self) -> Result<()> {
        let others = [("--prompts", self.images.prompts.is_some()), ("--explain", self.explain)];
        match others.iter().chain(&self.outputs()).find(|(_, given)| *given) {
            Some((flag, _)) => Err(Error::Usage(format!("--compare writes one sheet of one prompt, without {flag}"))),
            None => Ok(()),
        }
    }
}

/// What a command is for.
enum Asked<'a> {
    Images(Targets),
    Sheet(&'a Path),
}

pub fn run(mut args: Minority) -> Result<()> {
    if args.method.mode == Mode::Released {
        // The released code has no other.
        args.images.run.sampling.sampler.get_or_insert(sampler::Method::Ddim);
    }
    if args.save_token.is_some() && args.method.variable() != What::Token {
        return Err(Error::Usage("--save-token: there is a token only with --variable token".into()));
    }
    if args.comparison.compare.is_some() {
        args.check_comparison()?;
    }
    let mut extras = Extras { save_token: args.save_token.clone(), trace: args.trace.clone(), ..Extras::default() };
    let mut paths = Paths::default();
    args.method.inputs(&mut paths);
    let asked = match &args.comparison.compare {
        None => Asked::Images(run::targets(&args.images, &extras, paths)?),
        Some(sheet) => {
            args.images.inputs(&mut paths);
            paths.output("--compare", sheet)?;
            Asked::Sheet(sheet)
        }
    };
    let pipeline = args.images.run.open()?;
    let embedded = args.images.run.model.model.is_none();
    let context = Context { pipeline: &pipeline, embedded, seed: args.images.run.sampling.seed(), several: false };
    let (method, explained) = args.method.minority(&context)?;
    let reporter = Reporter::new(args.images.run.json, args.images.run.quiet);
    if args.explain {
        let unused = args.outputs().into_iter().filter(|(_, given)| *given);
        unused.for_each(|(flag, _)| reporter.warn(&format!("{flag}: --explain makes no image")));
        return explain(&args.images, &pipeline, &method, &explained);
    }
    let targets = match asked {
        Asked::Images(targets) => targets,
        Asked::Sheet(path) => return compare(&args, path, &context, method),
    };
    let method = MinorityPrompt { trace: args.trace.is_some(), ..method };
    extras.iterations = method.iterations(&pipeline, &args.images.run.settings(&pipeline)?)?;
    if extras.iterations == 0 {
        reporter.warn("nothing is optimised: no step lies between --t-lo and --t-hi, or --iterations is 0");
    }
    run::run(&args.images, &pipeline, &method, &extras, &targets)
}

fn compare(args: &Minority, path: &Path, context: &Context<'_>, method: MinorityPrompt) -> Result<()> {
    let flags = &args.comparison;
    let baselines: [&dyn MethodFlags; 4] = [&DdimFlags {}, &flags.null_prompt, &flags.cads, &flags.sgms];
    let mut methods: Vec<_> = baselines.iter().map(|flags| flags.method(context)).collect::<Result<_>>()?;
    methods.push(Box::new(method));
    let prompt = args.images.prompt.as_deref().unwrap_or_default();
    let comparison = Comparison { prompt, methods: &methods, path, flag: "--compare", ledger: false, scores: &[] };
    comparison::run(&args.images.run, context, &comparison)
}

/// What a run would do, without doing it.
fn explain(args: &ImageFlags, pipeline: &Pipeline, method: &MinorityPrompt, explained: &[Explained]) -> Result<()> {
    let settings = args.run.settings(pipeline)?;
    let executor = args.run.device.executor(false)?;
    let prompts = vec![args.prompt.as_deref().unwrap_or_default(); args.run.batch];
    let memory = args.run.device.memory_limit;
    let request = Request { settings: &settings, batch: args.run.batch, prompts: &prompts, memory };
    let planned = method.plan_within(pipeline, &*executor, &request)?;
    let plain = Ddim.plan(pipeline, &*executor, &request)?;
    let (nfe, sampling) = (planned.nfe(), plain.nfe().forward);
    let steps: Vec<String> =
        planned.levels().map(|(step, levels)| format!("{step} (t {} s {})", levels.t1, levels.t2)).collect();
    for (name, value, source) in explained {
        print_line(&format!("{name:<17} {value:<12} {source}"))?;
    }
    let s = &method.schedule;
    let lines = [
        format!("optimised steps   {}: {}", steps.len(), steps.join(", ")),
        format!("iterations        {} each, learning rate {:.3e}", s.iterations, s.lr),
        format!("UNet forwards     {}, of them {sampling} for sampling alone", nfe.forward),
        format!("UNet backwards    {}", nfe.backward),
        format!("batch             {}; passes count images", args.run.batch),
        format!("memory            {}", show_bytes(planned.footprint().total())),
    ];
    lines.iter().try_for_each(|line| print_line(line))
}
