//! The programs of a MinorityPrompt run besides those that make images.

use super::Settings;
use super::{Convention, released};
use crate::exec::{Executor, ProgramId};
use crate::optimize::objective::{self, ObjectiveSpec, Objectives};
use crate::optimize::variable::{Variable, VariableSpec};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Generator;
use crate::pipeline::programs::Sizes;
use crate::plan::{Planned, plan};
use crate::program::Program;
use crate::sampler::{self, Schedule};
use crate::weights::Model;
use crate::{Error, Result};
use std::collections::BTreeSet;

/// The part that makes images, with the tables of the convention.
pub fn generator<'p>(
    pipeline: &'p Pipeline,
    executor: &dyn Executor,
    settings: &Settings,
    batch: usize,
) -> Result<Generator<'p>> {
    Generator::with_schedule(pipeline, executor, settings.images.clone(), batch, schedule(pipeline, settings)?)
}

/// The sampling steps.
pub fn schedule(pipeline: &Pipeline, settings: &Settings) -> Result<Schedule> {
    let (config, sampler) = (&pipeline.config.scheduler, &settings.images.sampler);
    match settings.schedule.convention {
        Convention::Diffusers => sampler::schedule(config, sampler),
        Convention::Released => released(config, sampler),
    }
}

/// The variable beside prompts with so many tokens before the first learnable one.
pub fn variable<'a>(pipeline: &'a Pipeline, sizes: Sizes, settings: &'a Settings, prefix: usize) -> VariableSpec<'a> {
    VariableSpec { pipeline, dtype: settings.images.dtype, sizes, variable: &settings.variable, prefix }
}

/// The numbers of tokens before the first learnable one that batches of these prompts have.
pub fn prefixes(pipeline: &Pipeline, variable: &Variable, prompts: &[&str], batch: usize) -> Result<BTreeSet<usize>> {
    if batch == 0 || prompts.is_empty() || !prompts.len().is_multiple_of(batch) {
        return Err(Error::Usage(format!("{} prompts are no whole batches of {batch}", prompts.len())));
    }
    let Variable::Token(token) = variable else { return Ok(BTreeSet::from([0])) };
    let mut batches: Vec<&[&str]> = prompts.chunks(batch).collect();
    // Several images of one prompt follow each other.
    batches.dedup();
    batches.into_iter().map(|batch| Ok(token.tokenize(pipeline, batch)?.prefix)).collect()
}

/// The programs for prompts with this many tokens before the first learnable one.
pub struct OfPrefix {
    /// What those tokens hand on to the learnable ones.
    prefix: Option<Planned>,
    /// The parameters to the text states that sampling reads, where they are text.
    pub forward: Option<Planned>,
    /// The parameters to scores and gradients.
    pub objectives: Objectives,
}

/// [`OfPrefix`] on an executor.
pub struct LoadedOfPrefix {
    pub prefix: Option<ProgramId>,
    pub forward: Option<ProgramId>,
    pub objectives: objective::Loaded,
}

impl OfPrefix {
    pub fn plan(variable: &VariableSpec<'_>, executor: &dyn Executor, settings: &Settings) -> Result<OfPrefix> {
        let plan = |program: Program| plan(program, |program, node| executor.workspace(program, node));
        let &VariableSpec { pipeline, dtype, sizes, prefix, .. } = variable;
        let spec = ObjectiveSpec {
            pipeline,
            dtype,
            sizes,
            guidance: settings.images.sampler.guidance,
            variable: Some(&settings.variable),
            prefix,
            loss_scale: settings.loss_scale,
            budget: settings.budget,
        };
        Ok(OfPrefix {
            prefix: variable.prefix()?.map(plan),
            forward: variable.forward()?.map(plan),
            objectives: Objectives::plan(&spec, executor, &settings.objectives)?,
        })
    }

    pub fn all(&self) -> Vec<&Planned> {
        self.prefix.iter().chain(&self.forward).chain(self.objectives.all()).collect()
    }

    pub fn load(self, executor: &mut dyn Executor, model: &Model) -> Result<LoadedOfPrefix> {
        let mut load = |planned: Planned| executor.load(planned, model);
        Ok(LoadedOfPrefix {
            prefix: self.prefix.map(&mut load).transpose()?,
            forward: self.forward.map(&mut load).transpose()?,
            objectives: self.objectives.load(executor, model)?,
        })
    }
}
