//! The flags of MinorityPrompt, and its settings out of them: a flag, else what the model recommends, else the default.

use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::flags::optimizer::{After, OptimizerFlags};
use crate::cli::flags::values;
use crate::cli::paths::Paths;
use crate::data::textual_inversion;
use crate::methods::ImageMethod;
use crate::methods::minority::{self, Convention, MinorityPrompt, Raised, Recommended, Renoise, Schedule};
use crate::models::config::Family;
use crate::optimize::objective;
use crate::optimize::variable::Variable;
use crate::optimize::variable::token::{Init, PoolAt, TokenSettings};
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::Branch;
use crate::text::Position;
use crate::{Error, Result};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

#[derive(Args)]
pub struct MinorityFlags {
    /// default follows the paper and mends the released code; released follows that code, its schedule, defaults and quirks
    #[arg(long, value_enum, default_value = "default", help_heading = "Optimisation")]
    pub mode: Mode,
    /// What is raised, one after the other: minority, repulsion (needs --batch 2 or more) [default: minority]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "Optimisation")]
    objective: Vec<Kind>,
    /// What is optimised: a token beside the prompt, all states of the prompt, or those of the negative prompt
    /// [default: token]
    #[arg(long, value_enum, help_heading = "Optimisation")]
    variable: Option<What>,
    #[command(flatten, next_help_heading = "Optimisation")]
    optimizer: OptimizerFlags,
    /// Tokens per image [default: those of --init-token, else the model's recommended.json, else 1]
    #[arg(
        long,
        value_name = "M",
        value_parser = values::count,
        allow_negative_numbers = true,
        help_heading = "Token"
    )]
    tokens: Option<usize>,
    /// Where in the prompt they stand [default: end]
    #[arg(long, value_enum, help_heading = "Token")]
    place: Option<PositionFlag>,
    /// What they begin as: word:WORD, random, gaussian[:SCALE], white[:SCALE], unit
    /// [default: the model's recommended.json, else word:cool where that is one token, else white; released unit]
    #[arg(long, value_name = "INIT", value_parser = minority::parse_init, help_heading = "Token")]
    init: Option<Init>,
    /// What they begin as: a token saved before
    #[arg(long, value_name = "FILE", conflicts_with = "init", help_heading = "Token")]
    init_token: Option<PathBuf>,
    /// SDXL: where the pooled text is read [default: eos; released placeholder]
    #[arg(long, value_enum, help_heading = "Token")]
    pool_at: Option<PoolFlag>,
    /// Noise level of the second estimate: annealed, or a fraction of the training steps [default: annealed; released 0.75]
    #[arg(long, value_name = "annealed|SHARE", value_parser = parse_renoise, help_heading = "Objective (ablations)")]
    renoise: Option<Renoise>,
    /// Weight of the term whose second estimate has no gradient [default: 1]
    #[arg(long, value_parser = values::number, allow_negative_numbers = true, help_heading = "Objective (ablations)")]
    lambda: Option<f64>,
    /// No gradient through the second estimate
    #[arg(long, help_heading = "Objective (ablations)")]
    stop_second: bool,
    /// The second estimate is conditioned on the learned prompt too
    #[arg(long, help_heading = "Objective (ablations)")]
    second_learned: bool,
    /// Estimates under classifier-free guidance
    #[arg(long, help_heading = "Objective (ablations)")]
    guided: bool,
    /// Squared distances
    #[arg(long, help_heading = "Objective (ablations)")]
    squared: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Default,
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Minority,
    Repulsion,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    Token,
    Text,
    Null,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PositionFlag {
    Start,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PoolFlag {
    Eos,
    Placeholder,
}

fn parse_renoise(text: &str) -> Result<Renoise, String> {
    match (text, text.parse::<f64>()) {
        ("annealed", _) => Ok(Renoise::Annealed),
        (_, Ok(fraction)) if fraction > 0.0 && fraction < 1.0 => Ok(Renoise::Fixed(fraction)),
        (_, _) => Err("write annealed, or a fraction of the training steps between 0 and 1".to_string()),
    }
}

/// Where a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Flag,
    Recommended,
    Default,
}

/// Chooses settings and notes where each came from.
#[derive(Default)]
struct Chooser {
    /// Name, value, source.
    chosen: Vec<(&'static str, String, Source)>,
}

impl Chooser {
    fn choose<T: Clone>(
        &mut self,
        name: &'static str,
        flag: Option<T>,
        recommended: Option<T>,
        usual: T,
        show: impl Fn(&T) -> String,
    ) -> T {
        let (value, source) = match (flag, recommended) {
            (Some(value), _) => (value, Source::Flag),
            (None, Some(value)) => (value, Source::Recommended),
            (None, None) => (usual, Source::Default),
        };
        self.chosen.push((name, show(&value), source));
        value
    }
}

/// A setting for `--explain`: name, value, where it comes from.
pub type Explained = (&'static str, String, String);

impl MinorityFlags {
    /// The method, and where each of its settings comes from.
    pub fn minority(&self, context: &Context<'_>) -> Result<(MinorityPrompt, Vec<Explained>)> {
        let pipeline = context.pipeline;
        let convention = match self.mode {
            Mode::Default => Convention::Diffusers,
            Mode::Released => Convention::Released,
        };
        self.check(pipeline)?;
        let mut chooser = Chooser::default();
        let kinds = (!self.objective.is_empty()).then(|| self.objective.clone());
        let show_kinds = |kinds: &Vec<Kind>| kinds.iter().map(lower).collect::<Vec<_>>().join(",");
        let objectives = chooser.choose("objective", kinds, None, vec![Kind::Minority], show_kinds);
        let variable = chooser.choose("variable", self.variable, None, What::Token, lower);
        // What a model recommends is for a token, and not for the released code.
        let recommended = match (self.mode, variable) {
            (Mode::Default, What::Token) => Recommended::of(pipeline)?,
            (_, _) => Recommended::default(),
        };
        let schedule = self.schedule(&mut chooser, &recommended, Schedule::of(pipeline, convention)?);
        let switches = self.switches(&mut chooser, variable);
        let variable = match variable {
            What::Token => {
                let usual = minority::token(pipeline, convention)?;
                let token = self.token(&mut chooser, &recommended, usual)?;
                token.check(pipeline)?;
                Variable::Token(token)
            }
            What::Text => Variable::TextStates(Branch::Prompt),
            What::Null => Variable::TextStates(Branch::Negative),
        };
        let method = MinorityPrompt {
            variable,
            schedule,
            objectives: objectives.into_iter().map(raised).collect(),
            switches,
            trace: false,
            opt_seed: self.optimizer.opt_seed.unwrap_or(context.seed).wrapping_sub(context.seed),
        };
        let source = |source| match source {
            Source::Flag => "flag".to_string(),
            Source::Recommended => "recommended.json".to_string(),
            Source::Default if self.mode == Mode::Released => "default of the released code".to_string(),
            Source::Default => "default".to_string(),
        };
        let explained = chooser.chosen.into_iter().map(|(name, value, from)| (name, value, source(from)));
        Ok((method, explained.collect()))
    }

    /// Refuses flags of what this run has not.
    fn check(&self, pipeline: &Pipeline) -> Result<()> {
        let token = [
            ("--tokens", self.tokens.is_some()),
            ("--place", self.place.is_some()),
            ("--init", self.init.is_some()),
            ("--init-token", self.init_token.is_some()),
            ("--pool-at", self.pool_at.is_some()),
        ];
        let objective = [
            ("--renoise", self.renoise.is_some()),
            ("--lambda", self.lambda.is_some()),
            ("--stop-second", self.stop_second),
            ("--second-learned", self.second_learned),
            ("--guided", self.guided),
            ("--squared", self.squared),
        ];
        let is_raised = self.objective.is_empty() || self.objective.contains(&Kind::Minority);
        let given = |flags: &[(&'static str, bool)]| flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag);
        let unused = match (given(&token), given(&objective)) {
            (Some(flag), _) if self.variable() != What::Token => {
                format!("{flag}: there is a token only with --variable token")
            }
            (_, Some(flag)) if !is_raised => format!("{flag}: is of --objective minority, which is not raised here"),
            _ if self.pool_at.is_some() && pipeline.config.family != Family::Sdxl => {
                "--pool-at: the text is pooled for SDXL only, which this model is not".to_string()
            }
            _ => return Ok(()),
        };
        Err(Error::Usage(unused))
    }

    /// What is optimised.
    pub fn variable(&self) -> What {
        self.variable.unwrap_or(What::Token)
    }

    fn switches(&self, chooser: &mut Chooser, variable: What) -> objective::Minority {
        let usual = objective::Minority::default();
        let mut switch =
            |name, flag: bool, usual: bool| chooser.choose(name, flag.then_some(true), None, usual, bool::to_string);
        objective::Minority {
            detach_second: switch("stop-second", self.stop_second, usual.detach_second),
            second_optimized: switch("second-learned", self.second_learned, usual.second_optimized),
            // Nothing else of the objective depends on the unconditional branch.
            guided: switch("guided", self.guided, usual.guided || variable == What::Null),
            squared: switch("squared", self.squared, usual.squared),
            lambda: chooser.choose("lambda", self.lambda, None, usual.lambda, f64::to_string),
        }
    }

    fn schedule(&self, chooser: &mut Chooser, recommended: &Recommended, usual: Schedule) -> Schedule {
        let (o, r) = (&self.optimizer, recommended);
        let after = o.after.map(|after| after == After::Prompt);
        let show_after = |base: &bool| if *base { "prompt".to_string() } else { "learned".to_string() };
        let show_renoise = |renoise: &Renoise| match renoise {
            Renoise::Annealed => "annealed".to_string(),
            Renoise::Fixed(fraction) => fraction.to_string(),
        };
        Schedule {
            iterations: chooser.choose("iterations", o.iterations, r.iterations, usual.iterations, usize::to_string),
            lr: chooser.choose("lr", o.lr, r.lr, usual.lr, |lr| format!("{lr:.3e}")),
            lr_decay: chooser.choose("lr-decay", o.lr_decay, r.lr_decay, usual.lr_decay, f64::to_string),
            t_lo: chooser.choose("t-lo", o.t_lo, r.t_lo, usual.t_lo, f64::to_string),
            t_hi: chooser.choose("t-hi", o.t_hi, r.t_hi, usual.t_hi, f64::to_string),
            every: chooser.choose("every", o.every, r.every, usual.every, usize::to_string),
            base_prompt_after: chooser.choose("after", after, None, usual.base_prompt_after, show_after),
            renoise: chooser.choose("renoise", self.renoise, None, usual.renoise, show_renoise),
            convention: usual.convention,
        }
    }

    fn token(&self, chooser: &mut Chooser, r: &Recommended, usual: TokenSettings) -> Result<TokenSettings> {
        let saved = self.init_token.as_deref().map(textual_inversion::read).transpose()?;
        if let (Some(path), Some(token)) = (&self.init_token, &saved) {
            let wrong = |what: String| Err(Error::Usage(format!("--init-token {}: {what}", path.display())));
            if !token.words.iter().any(|word| word.rows == (0..token.rows)) {
                return wrong(format!("holds {} words; give a file of one", token.words.len()));
            }
            if let Some(tokens) = self.tokens.filter(|tokens| *tokens != token.rows) {
                return wrong(format!("has {} rows; --tokens is {tokens}", token.rows));
            }
        }
        let rows = self.tokens.or(saved.as_ref().map(|token| token.rows));
        let init = self.init.clone().or(saved.map(|token| Init::Given(token.embeddings)));
        let pool_at = self.pool_at.map(|at| match at {
            PoolFlag::Eos => PoolAt::Eos,
            PoolFlag::Placeholder => PoolAt::Placeholder,
        });
        let place = self.place.map(|place| match place {
            PositionFlag::Start => Position::Start,
            PositionFlag::End => Position::End,
        });
        Ok(TokenSettings {
            rows: chooser.choose("tokens", rows, r.tokens, usual.rows, usize::to_string),
            position: chooser.choose("place", place, None, usual.position, lower),
            init: chooser.choose("init", init, r.init.clone(), usual.init, minority::show_init),
            pool_at: chooser.choose("pool-at", pool_at, None, usual.pool_at, lower),
        })
    }
}

/// The name of a variant.
fn lower(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

fn raised(kind: Kind) -> Raised {
    match kind {
        Kind::Minority => Raised::Minority,
        Kind::Repulsion => Raised::Repulsion,
    }
}

impl MethodFlags for MinorityFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.init_token.iter().for_each(|path| paths.input("--init-token", path));
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        Ok(Box::new(self.minority(context)?.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_levels() {
        assert_eq!(parse_renoise("annealed"), Ok(Renoise::Annealed));
        assert_eq!(parse_renoise("0.75"), Ok(Renoise::Fixed(0.75)));
        assert!(parse_renoise("1.5").is_err() && parse_renoise("0").is_err());
    }
}
