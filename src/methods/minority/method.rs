//! MinorityPrompt as an [`ImageMethod`]: its options, what images record of them, and a plan within a memory limit.

use super::{Convention, Loaded, Minority, Renoise, Schedule, Settings};
use crate::data::textual_inversion::LearnedToken;
use crate::exec::Executor;
use crate::methods::{ImageMethod, LoadedMethod, PlannedMethod, Request};
use crate::optimize::objective::{self, Nfe, NoiseLevels, Objective, loss_scale};
use crate::optimize::variable::Variable;
use crate::optimize::variable::token::{Init, TokenSettings};
use crate::pipeline::conditioning::Branch;
use crate::pipeline::generate::{self, Image, Job};
use crate::pipeline::{Observer, Pipeline};
use crate::plan::Planned;
use crate::weights::fingerprint;
use crate::{Error, Result};
use serde_json::{Value, json};

/// An objective by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raised {
    Minority,
    Repulsion,
}

impl Raised {
    fn name(self) -> &'static str {
        match self {
            Raised::Minority => "minority",
            Raised::Repulsion => "repulsion",
        }
    }
}

/// The method with all its options.
#[derive(Clone)]
pub struct MinorityPrompt {
    pub variable: Variable,
    pub schedule: Schedule,
    /// Each gets `iterations` of its own, in this order.
    pub objectives: Vec<Raised>,
    /// Of the minority objective.
    pub switches: objective::Minority,
    /// Report every iteration.
    pub trace: bool,
    /// The optimiser's seed of an image less the sampler's.
    pub opt_seed: u64,
}

impl MinorityPrompt {
    /// Plans the fastest way, or where that would not fit the memory, one that computes activations again.
    pub fn plan_within<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<PlannedMinority<'p>> {
        self.check(request.batch)?;
        let plan = |budget| {
            let settings = self.settings(request.settings, budget);
            Minority::plan_batches(pipeline, executor, settings, request.prompts, request.batch)
        };
        let fastest = plan(None)?;
        let footprint = fastest.footprint();
        let over = request.memory.filter(|memory| footprint.total() > *memory);
        let rest = |memory: usize| memory.checked_sub(footprint.total() - footprint.arena_bytes);
        let minority = match over.and_then(rest) {
            Some(budget) => plan(Some(budget)).unwrap_or(fastest),
            None => fastest,
        };
        Ok(PlannedMinority { minority, opt_seed: self.opt_seed })
    }

    /// How often the optimizer iterates for one image of these settings.
    pub fn iterations(&self, pipeline: &Pipeline, images: &generate::Settings) -> Result<usize> {
        super::iterations(pipeline, &self.settings(images, None))
    }

    fn settings(&self, images: &generate::Settings, budget: Option<usize>) -> Settings {
        let objective = |raised: &Raised| -> Objective {
            match raised {
                Raised::Minority => objective::minority(self.switches),
                Raised::Repulsion => objective::repulsion(),
            }
        };
        Settings {
            images: images.clone(),
            schedule: self.schedule,
            variable: self.variable.clone(),
            objectives: self.objectives.iter().map(objective).collect(),
            trace: self.trace,
            loss_scale: loss_scale(images.dtype),
            budget,
        }
    }
}

impl ImageMethod for MinorityPrompt {
    fn name(&self) -> &'static str {
        "minority"
    }

    fn title(&self) -> String {
        "MinorityPrompt".into()
    }

    fn options(&self) -> Value {
        json!({
            "schedule": schedule_record(&self.schedule),
            "variable": variable_record(&self.variable),
            "objectives": self.objectives.iter().map(|raised| raised.name()).collect::<Vec<_>>(),
            "switches": self.switches,
            "opt_seed": self.opt_seed as i64,
        })
    }

    fn reserved_tokens(&self) -> usize {
        match &self.variable {
            Variable::Token(token) => token.rows,
            Variable::TextStates(_) | Variable::Latents => 0,
        }
    }

    fn check(&self, batch: usize) -> Result<()> {
        if self.objectives.contains(&Raised::Repulsion) && batch < 2 {
            let what = "--objective repulsion: a batch of one image has no pairs to repel; choose --batch 2 or more, and \
                        a --count that leaves none over";
            return Err(Error::Usage(what.into()));
        }
        Ok(())
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        Ok(Box::new(self.plan_within(pipeline, executor, request)?))
    }
}

/// [`MinorityPrompt`], planned.
pub struct PlannedMinority<'p> {
    minority: Minority<'p>,
    opt_seed: u64,
}

impl PlannedMinority<'_> {
    /// The optimized steps, each with the two noise levels of its objectives.
    pub(crate) fn levels(&self) -> impl Iterator<Item = (usize, NoiseLevels)> {
        self.minority.levels()
    }
}

impl PlannedMethod for PlannedMinority<'_> {
    fn programs(&self) -> Vec<&Planned> {
        self.minority.programs()
    }

    fn progress_units(&self) -> usize {
        self.minority.progress_units()
    }

    fn nfe(&self) -> Nfe {
        self.minority.nfe()
    }

    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e,
    {
        Ok(Box::new(LoadedMinority { minority: self.minority.load(executor)?, opt_seed: self.opt_seed }))
    }
}

struct LoadedMinority<'p, 'e> {
    minority: Loaded<'p, 'e>,
    opt_seed: u64,
}

impl LoadedMethod for LoadedMinority<'_, '_> {
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let seeds: Vec<u64> = jobs.iter().map(|job| job.seed.wrapping_add(self.opt_seed)).collect();
        self.minority.run(jobs, &seeds, observe)
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self.minority.images().executor()
    }

    fn learned(&self, index: usize, word: &str) -> Result<LearnedToken> {
        self.minority.token(index, word)
    }
}

fn schedule_record(s: &Schedule) -> Value {
    let renoise = match s.renoise {
        Renoise::Annealed => json!("annealed"),
        Renoise::Fixed(fraction) => json!(fraction),
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
        Variable::Token(TokenSettings { rows, position, init, pool_at }) => json!({
            "tokens": rows, "place": format!("{position:?}").to_lowercase(), "pool_at": format!("{pool_at:?}").to_lowercase(),
            "init": show_init(init)
        }),
    }
}

/// As `--init` has it; rows that were given by a hash.
pub fn show_init(init: &Init) -> String {
    match init {
        Init::Word(word) => format!("word:{word}"),
        Init::RandomWord => "random".into(),
        Init::Gaussian { scale } => format!("gaussian:{scale}"),
        Init::White { scale } => format!("white:{scale}"),
        Init::Unit => "unit".into(),
        Init::Given(rows) => {
            let bytes = rows.iter().flatten().flat_map(|x| x.to_le_bytes());
            format!("given:{:016x}", fingerprint(bytes))
        }
    }
}
