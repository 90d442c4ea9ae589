//! `rarebit minority`: images of a prompt that the model finds unlikely, by MinorityPrompt (Um & Ye 2025).

use crate::cli::compare::{self, CompareFlags};
use crate::cli::images::run::{self, Extras, ImageFlags};
use crate::cli::method::Method;
use crate::cli::{flags, machine};
use crate::data::textual_inversion;
use crate::methods::minority::{self, Convention, Renoise, Schedule};
use crate::optimize::objective::loss_scale;
use crate::optimize::objective::{self, Objective};
use crate::optimize::variable::Variable;
use crate::optimize::variable::token::{Init, PoolAt, TokenSettings};
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::Branch;
use crate::pipeline::generate::Settings;
use crate::plan::show_bytes;
use crate::sampler;
use crate::text::Place;
use crate::{Error, Result};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Minority {
    #[command(flatten)]
    pub images: ImageFlags,
    /// default follows the paper and mends the released code; released follows that code, its schedule, defaults and quirks
    #[arg(long, value_enum, default_value = "default", help_heading = "Optimisation")]
    mode: Mode,
    /// What is raised, one after the other: minority, repulsion (needs --batch 2 or more)
    #[arg(long, value_enum, value_delimiter = ',', default_value = "minority", help_heading = "Optimisation")]
    objective: Vec<Kind>,
    /// What is optimised: a token beside the prompt, all states of the prompt, or those of the negative prompt
    #[arg(long, value_enum, default_value = "token", help_heading = "Optimisation")]
    variable: What,
    /// Adam steps at each optimised sampling step [default: 10]
    #[arg(long, value_name = "K", allow_negative_numbers = true, help_heading = "Optimisation")]
    iterations: Option<usize>,
    /// Learning rate [default: a share of the spread of the model's token embeddings; released 0.01]
    #[arg(long, value_parser = flags::amount, allow_negative_numbers = true, help_heading = "Optimisation")]
    lr: Option<f64>,
    /// The learning rate at step i is LR (1 - i DECAY)
    #[arg(
        long,
        value_name = "DECAY",
        value_parser = flags::number,
        allow_negative_numbers = true,
        default_value_t = 0.0,
        help_heading = "Optimisation"
    )]
    lr_decay: f64,
    /// Optimise while the timestep is above this share of the training steps [default: 0.9 for Stable Diffusion, and where other
    /// models have as much signal left; released 0.9]
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = flags::number,
        allow_negative_numbers = true,
        help_heading = "Optimisation"
    )]
    t_lo: Option<f64>,
    /// Optimise while the timestep is at most this share of the training steps [default: 1 for Stable Diffusion, and where other
    /// models have as much signal left; released 1]
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = flags::number,
        allow_negative_numbers = true,
        help_heading = "Optimisation"
    )]
    t_hi: Option<f64>,
    /// Optimise every so many steps
    #[arg(
        long,
        value_name = "N",
        value_parser = flags::count,
        allow_negative_numbers = true,
        default_value_t = 1,
        help_heading = "Optimisation"
    )]
    every: usize,
    /// What steps that are not optimised read [default: prompt; released: learned]
    #[arg(long, value_enum, help_heading = "Optimisation")]
    after: Option<After>,
    /// Seed of the optimiser's noise and first embeddings; image i uses OPT_SEED+i [default: --seed]
    #[arg(long, allow_negative_numbers = true, help_heading = "Optimisation")]
    opt_seed: Option<u64>,
    /// Tokens per image
    #[arg(
        long,
        value_name = "M",
        value_parser = flags::count,
        allow_negative_numbers = true,
        default_value_t = 1,
        help_heading = "Token"
    )]
    tokens: usize,
    /// Where in the prompt they stand
    #[arg(long, value_enum, default_value = "end", help_heading = "Token")]
    place: PlaceFlag,
    /// What they begin as: word:WORD, random, gaussian[:SCALE], white[:SCALE], unit
    /// [default: word:cool where that is one token, else white; released unit]
    #[arg(long, value_name = "INIT", value_parser = parse_init, help_heading = "Token")]
    init: Option<Init>,
    /// What they begin as: a token saved before
    #[arg(long, value_name = "FILE", conflicts_with = "init", help_heading = "Token")]
    init_token: Option<PathBuf>,
    /// SDXL: where the pooled text is read [default: eos; released placeholder]
    #[arg(long, value_enum, help_heading = "Token")]
    pool_at: Option<PoolFlag>,
    /// Write the learned token as a textual inversion, safetensors; several images get names of their own
    #[arg(long, value_name = "FILE", help_heading = "Token")]
    save_token: Option<PathBuf>,
    /// Noise level of the second estimate: annealed, or a share of the training steps [default: annealed; released 0.75]
    #[arg(long, value_name = "annealed|SHARE", value_parser = parse_renoise, help_heading = "Objective (ablations)")]
    renoise: Option<Renoise>,
    /// Weight of the term whose second estimate has no gradient
    #[arg(
        long,
        value_parser = flags::number,
        allow_negative_numbers = true,
        default_value_t = 1.0,
        help_heading = "Objective (ablations)"
    )]
    lambda: f64,
    /// No gradient through the second estimate
    #[arg(long, help_heading = "Objective (ablations)")]
    stop_second: bool,
    /// The second estimate is told the learned prompt too
    #[arg(long, help_heading = "Objective (ablations)")]
    second_learned: bool,
    /// Estimates under classifier-free guidance
    #[arg(long, help_heading = "Objective (ablations)")]
    guided: bool,
    /// Squared distances
    #[arg(long, help_heading = "Objective (ablations)")]
    squared: bool,
    /// Write a JSON line per iteration: objective, length of the gradient, distance moved
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print which steps are optimised, the UNet passes and the memory, and stop
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    rivals: CompareFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Default,
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Minority,
    Repulsion,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Token,
    Text,
    Null,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum After {
    Prompt,
    Learned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PlaceFlag {
    Start,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PoolFlag {
    Eos,
    Placeholder,
}

fn parse_init(text: &str) -> Result<Init, String> {
    let scale = |text: Option<&str>| match text.map(str::parse::<f64>) {
        None => Ok(1.0),
        Some(Ok(scale)) if scale.is_finite() && scale >= 0.0 => Ok(scale),
        Some(Ok(_) | Err(_)) => Err("the scale must be a number, 0 or more".to_string()),
    };
    match text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest))) {
        ("word", Some(word)) if !word.trim().is_empty() => Ok(Init::Word(word.trim().to_string())),
        ("random", None) => Ok(Init::RandomWord),
        ("gaussian", rest) => Ok(Init::Gaussian { scale: scale(rest)? }),
        ("white", rest) => Ok(Init::White { scale: scale(rest)? }),
        ("unit", None) => Ok(Init::Unit),
        _ => Err("write word:WORD, random, gaussian[:SCALE], white[:SCALE] or unit".to_string()),
    }
}

fn parse_renoise(text: &str) -> Result<Renoise, String> {
    match (text, text.parse::<f64>()) {
        ("annealed", _) => Ok(Renoise::Annealed),
        (_, Ok(share)) if share > 0.0 && share < 1.0 => Ok(Renoise::Fixed(share)),
        (_, _) => Err("write annealed, or a share of the training steps between 0 and 1".to_string()),
    }
}

/// MinorityPrompt as the flags ask for it, the defaults of mode and model filled in.
#[derive(Clone)]
pub struct Options {
    variable: Variable,
    schedule: Schedule,
    kinds: Vec<Kind>,
    switches: objective::Minority,
    trace: bool,
    /// The optimiser's seed of image 0 less the sampler's.
    opt_seed: u64,
    /// As images record it.
    record: Value,
}

impl Options {
    /// The defaults of this method for a model.
    fn new(args: &Minority, pipeline: &Pipeline) -> Result<Options> {
        let convention = match args.mode {
            Mode::Default => Convention::Diffusers,
            Mode::Released => Convention::Released,
        };
        let usual = Schedule::of(pipeline, convention)?;
        let schedule = Schedule {
            iterations: args.iterations.unwrap_or(usual.iterations),
            lr: args.lr.unwrap_or(usual.lr),
            lr_decay: args.lr_decay,
            t_lo: args.t_lo.unwrap_or(usual.t_lo),
            t_hi: args.t_hi.unwrap_or(usual.t_hi),
            every: args.every,
            base_prompt_after: args.after.map_or(usual.base_prompt_after, |after| after == After::Prompt),
            renoise: args.renoise.unwrap_or(usual.renoise),
            convention,
        };
        let variable = match args.variable {
            What::Token => Variable::Token(args.token(pipeline, convention)?),
            What::Text => Variable::TextStates(Branch::Prompt),
            What::Null => Variable::TextStates(Branch::Negative),
        };
        let switches = objective::Minority {
            lambda: args.lambda,
            detach_second: args.stop_second,
            second_optimized: args.second_learned,
            // Nothing else of it depends on the unconditional branch.
            guided: args.guided || args.variable == What::Null,
            squared: args.squared,
        };
        let opt_seed = args.opt_seed.unwrap_or(args.images.sampling.seed);
        let record = json!({
            "schedule": schedule_record(&schedule),
            "variable": variable_record(&variable),
            "objectives": args.objective.iter().map(|kind| format!("{kind:?}").to_lowercase()).collect::<Vec<_>>(),
            "switches": switches,
            "opt_seed": opt_seed.wrapping_sub(args.images.sampling.seed) as i64,
        });
        Ok(Options {
            variable,
            schedule,
            kinds: args.objective.clone(),
            switches,
            trace: args.trace.is_some(),
            opt_seed: opt_seed.wrapping_sub(args.images.sampling.seed),
            record,
        })
    }

    pub fn record(&self) -> Value {
        self.record.clone()
    }

    pub fn reserved_tokens(&self) -> usize {
        match &self.variable {
            Variable::Token(token) => token.rows,
            Variable::TextStates(_) | Variable::Latents => 0,
        }
    }

    /// Whether batches of so many images can be optimised.
    pub fn check(&self, batch: usize) -> Result<()> {
        if self.kinds.contains(&Kind::Repulsion) && batch < 2 {
            let what = "--objective repulsion: an image alone in its batch repels nothing; choose --batch 2 or more, and \
                        a --count that leaves none over";
            return Err(Error::Usage(what.into()));
        }
        Ok(())
    }

    /// The optimiser's seed of an image.
    pub fn seed(&self, of_image: u64) -> u64 {
        of_image.wrapping_add(self.opt_seed)
    }

    pub fn settings(&self, images: &Settings, budget: Option<usize>) -> minority::Settings {
        let objective = |kind: &Kind| -> Objective<'static> {
            match kind {
                Kind::Minority => objective::minority(self.switches),
                Kind::Repulsion => objective::repulsion(),
            }
        };
        minority::Settings {
            images: images.clone(),
            schedule: self.schedule,
            variable: self.variable.clone(),
            objectives: self.kinds.iter().map(objective).collect(),
            trace: self.trace,
            loss_scale: loss_scale(images.dtype),
            budget,
        }
    }
}

fn schedule_record(s: &Schedule) -> Value {
    let renoise = match s.renoise {
        Renoise::Annealed => json!("annealed"),
        Renoise::Fixed(share) => json!(share),
    };
    json!({
        "iterations": s.iterations, "lr": s.lr, "lr_decay": s.lr_decay, "t_lo": s.t_lo, "t_hi": s.t_hi, "every": s.every,
        "after": if s.base_prompt_after { "prompt" } else { "learned" }, "renoise": renoise,
        "released": s.convention == Convention::Released
    })
}

fn variable_record(variable: &Variable) -> Value {
    match variable {
        Variable::TextStates(Branch::Prompt) => json!("text"),
        Variable::TextStates(Branch::Negative) => json!("null"),
        Variable::Latents => json!("latents"),
        Variable::Token(TokenSettings { rows, place, init, pool_at }) => json!({
            "tokens": rows, "place": format!("{place:?}").to_lowercase(), "pool_at": format!("{pool_at:?}").to_lowercase(),
            "init": match init {
                Init::Word(word) => json!(format!("word:{word}")),
                Init::RandomWord => json!("random"),
                Init::Gaussian { scale } => json!(format!("gaussian:{scale}")),
                Init::White { scale } => json!(format!("white:{scale}")),
                Init::Unit => json!("unit"),
                Init::Given(rows) => {
                    let bytes = rows.iter().flatten().flat_map(|x| x.to_le_bytes());
                    json!(format!("given:{:016x}", crate::weights::fingerprint(bytes)))
                }
            }
        }),
    }
}

impl Minority {
    /// Refuses what a comparison would silently leave out. Not clap's conflicts: those would also lift what needs --compare.
    fn check_comparison(&self) -> Result<()> {
        let flags = [
            ("--prompts", self.images.prompts.is_some()),
            ("--out", self.images.out.is_some()),
            ("--latents-out", self.images.latents_out.is_some()),
            ("--overwrite", self.images.overwrite),
            ("--save-token", self.save_token.is_some()),
            ("--trace", self.trace.is_some()),
            ("--explain", self.explain),
        ];
        match flags.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Error::Usage(format!("--compare writes one sheet of one prompt, without {flag}"))),
            None => Ok(()),
        }
    }

    fn token(&self, pipeline: &Pipeline, convention: Convention) -> Result<TokenSettings> {
        let usual = minority::token(pipeline, convention)?;
        let init = match (&self.init, &self.init_token) {
            (Some(init), _) => init.clone(),
            (None, Some(path)) => {
                let token = textual_inversion::read(path)?;
                if token.rows != self.tokens {
                    let (found, wanted) = (token.rows, self.tokens);
                    let what = format!("--init-token {}: has {found} rows; --tokens is {wanted}", path.display());
                    return Err(Error::Usage(what));
                }
                Init::Given(token.embeddings)
            }
            (None, None) => usual.init,
        };
        let token = TokenSettings {
            rows: self.tokens,
            place: match self.place {
                PlaceFlag::Start => Place::Start,
                PlaceFlag::End => Place::End,
            },
            init,
            pool_at: match self.pool_at {
                Some(PoolFlag::Eos) => PoolAt::Eos,
                Some(PoolFlag::Placeholder) => PoolAt::Placeholder,
                None => usual.pool_at,
            },
        };
        token.check(pipeline)?;
        Ok(token)
    }
}

pub fn run(mut args: Minority) -> Result<()> {
    if args.mode == Mode::Released {
        // The released code has no other.
        args.images.sampling.sampler.get_or_insert(sampler::Method::Ddim);
    }
    if args.save_token.is_some() && args.variable != What::Token {
        return Err(Error::Usage("--save-token: there is a token only with --variable token".into()));
    }
    if args.rivals.compare.is_some() {
        args.check_comparison()?;
    }
    let pipeline = args.images.open()?;
    let options = Options::new(&args, &pipeline)?;
    if args.explain {
        return explain(&args, &pipeline, options);
    }
    if let Some(path) = &args.rivals.compare {
        return compare::run(&args.images, &args.rivals, path, &pipeline, options);
    }
    let extras = Extras { save_token: args.save_token.clone(), trace: args.trace.clone() };
    run::run(&args.images, &pipeline, &Method::Minority(options), &extras)
}

/// What a run would do, without doing it.
fn explain(args: &Minority, pipeline: &Pipeline, options: Options) -> Result<()> {
    let settings = args.images.sampling.settings(pipeline, args.images.device.program_dtype()?)?;
    let executor = args.images.device.executor(false)?;
    let prompt = args.images.prompt.as_deref().unwrap_or_default();
    let prompts = vec![prompt; args.images.batch];
    let memory = args.images.device.memory_limit;
    let method = Method::Minority(options.clone());
    let planned = method.plan(pipeline, &*executor, &settings, &prompts, memory)?;
    let plain = Method::Plain.plan(pipeline, &*executor, &settings, &prompts, memory)?;
    let (passes, sampling) = (planned.passes(), plain.passes().forward);
    let minority = minority::Minority::plan(pipeline, &*executor, options.settings(&settings, None), &prompts)?;
    let visits: Vec<String> =
        minority.levels().map(|(step, levels)| format!("{step} (t {} s {})", levels.t1, levels.t2)).collect();
    let footprint = planned.footprint();
    let s = &options.schedule;
    let lines = [
        format!("optimised steps   {}: {}", visits.len(), visits.join(", ")),
        format!("iterations        {} each, learning rate {:.3e}", s.iterations, s.lr),
        format!("UNet forwards     {}, of them {sampling} for sampling alone", passes.forward),
        format!("UNet backwards    {}", passes.backward),
        format!("batch             {}; passes count images", args.images.batch),
        format!("memory            {}", show_bytes(footprint.total())),
    ];
    lines.iter().try_for_each(|line| machine::print_line(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_embeddings_and_levels() {
        assert_eq!(parse_init("word:cool"), Ok(Init::Word("cool".into())));
        assert_eq!(parse_init("gaussian:0.5"), Ok(Init::Gaussian { scale: 0.5 }));
        assert_eq!(parse_init("white"), Ok(Init::White { scale: 1.0 }));
        assert_eq!(parse_init("unit"), Ok(Init::Unit));
        for wrong in ["word", "word: ", "gaussian:x", "white:-1", "unit:2", "cool"] {
            assert!(parse_init(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_renoise("annealed"), Ok(Renoise::Annealed));
        assert_eq!(parse_renoise("0.75"), Ok(Renoise::Fixed(0.75)));
        assert!(parse_renoise("1.5").is_err() && parse_renoise("0").is_err());
    }
}
