//! The command line: one file per subcommand, flags defined once, errors turned into one line and an exit code here.

mod atomic;
mod baselines;
mod bench;
mod compare;
mod flags;
mod generate;
mod images;
mod inspect;
mod machine;
mod minority;
mod paths;
mod progress;
mod registry;
mod report;
mod score;
mod search;
mod seed;
mod tensors;
mod terminal;

use crate::{Error, Result};
use clap::{FromArgMatches, Parser};
use flags::given::Given;
use std::process::ExitCode;

/// Rare, diverse and better images out of a frozen Stable Diffusion model.
#[derive(Parser)]
#[command(name = "rarebit", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make images from prompts.
    Generate(Box<generate::Generate>),
    /// Make images of a prompt that the model finds unlikely, by optimising a token while sampling (MinorityPrompt).
    Minority(Box<minority::Minority>),
    /// Make images of a prompt like a few reference images, by optimising the starting noise (SeedSelect).
    Seed(Box<seed::Seed>),
    /// Make the same seeds by several methods, side by side on one sheet, with what each method costs.
    ///
    /// UNet calls are counted per image; an equivalent is a forward, and a backward counts as two forwards. Seconds are those of
    /// sampling, without loading; memory is what is planned: weights, buffers and arena.
    Compare(Box<compare::Compare>),
    /// Show what a model holds and needs, or how an image was made.
    Inspect(Box<inspect::Inspect>),
    /// Measure images.
    Score(Box<score::Score>),
    /// Measure how fast images and gradients are made here.
    Bench(Box<bench::Bench>),
}

/// The flags of all subcommands, for tests that go through them.
#[doc(hidden)]
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Parses, runs, reports: 0 done, 1 failed, 2 bad usage, 3 slower than a baseline.
pub fn main() -> ExitCode {
    let parsed = command().try_get_matches();
    let parsed = parsed.and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, Given::of(&matches))));
    let (cli, given) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return usage(error),
    };
    if let Err(error) = machine::check_start() {
        terminal::say(&format!("rarebit: {error}"));
        return ExitCode::from(error.exit_code());
    }
    let outcome = match cli.command {
        Command::Generate(args) => in_pool(args.images.run.threads(), || generate::run(&args)),
        Command::Minority(args) => in_pool(args.images.run.threads(), move || minority::run(*args)),
        Command::Seed(args) => in_pool(args.images.run.threads(), move || seed::run(*args)),
        Command::Compare(args) => in_pool(args.threads(), || compare::run(&args)),
        Command::Inspect(args) => in_pool(None, || inspect::run(&args, &given)),
        Command::Score(args) => in_pool(args.threads(), || score::run(&args)),
        Command::Bench(args) => in_pool(args.threads(), move || bench::run(*args, &given)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has closed the pipe.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Err(error) => {
            terminal::say(&format!("rarebit: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Help and version as clap prints them; a mistake as one line.
fn usage(error: clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print(); // Nothing is left to be said where stderr is closed.
        return ExitCode::from(2);
    }
    let text = error.to_string();
    let message: Vec<&str> = text.split("\n\n").next().unwrap_or("bad usage").lines().map(str::trim).collect();
    terminal::say(&format!("rarebit: {}; see --help", message.join(" ").trim_start_matches("error: ")));
    ExitCode::from(2)
}

/// Runs `work` as a task of a pool of `threads`, so that parallel ops start without a hand-over.
fn in_pool(threads: Option<usize>, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .build()
        .map_err(|error| Error::Usage(format!("cannot start the worker threads: {error}")))?;
    pool.install(work)
}
