//! The programs of a set of objectives at a sampling step, and the host's side of one evaluation.

use super::context::{Optimized, Place, buffer};
use super::{NoiseLevels, Objective, StepContext};
use crate::autodiff::{Cotangent, Request};
use crate::exec::{Data, Executor, ProgramId};
use crate::models::config::Prediction;
use crate::models::unet::Unet;
use crate::optimize::variable::{Variable, VariableSpec};
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::{self, Branch, States};
use crate::pipeline::generate::{self, Job};
use crate::pipeline::programs::{Sizes, gradient_of, input_names};
use crate::plan::{Planned, plan, plan_gradient};
use crate::program::{Builder, DType, Node, Op, Origin, Program, ValueId};
use crate::sampler::{self, Level};
use crate::weights::{Component, Model};
use crate::{Error, Result};
use std::collections::HashSet;

/// Text states of what is not optimized, `[B, T, D]`; each branch's in turn.
const CONSTANT_CONTEXT: &str = "constant.context";

/// What an objective reports, per image.
pub fn report_name(objective: usize) -> String {
    format!("report.{objective}")
}

/// Network function evaluations: calls of the UNet, each on one image's latents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nfe {
    pub forward: usize,
    pub backward: usize,
}

/// What the programs of objectives are planned for.
pub struct ObjectiveSpec<'a> {
    pub pipeline: &'a Pipeline,
    pub dtype: DType,
    pub sizes: Sizes,
    /// Of [`StepContext::guided`].
    pub guidance: f64,
    /// What gradients are taken with respect to; `None`: losses alone.
    pub variable: Option<&'a Variable>,
    /// Tokens before the first learnable one; see [`VariableSpec::prefix`].
    pub prefix: usize,
    /// What gradients are multiplied with.
    pub loss_scale: f64,
    /// Bytes of arena; `None`: as many as the fastest way wants.
    pub budget: Option<usize>,
}

/// Planned objectives.
pub struct Objectives {
    /// Latents and variable → reports and gradients, one per objective.
    evaluations: Vec<Planned>,
    /// Text states to keys and values, of the user's prompt and of the unconditional branch; where an objective reads them.
    prompt: Option<Planned>,
    null: Option<Planned>,
    batch: usize,
}

impl Objectives {
    pub fn plan(spec: &ObjectiveSpec<'_>, executor: &dyn Executor, objectives: &[Objective<'_>]) -> Result<Objectives> {
        let workspace = |program: &Program, node: &Node| executor.workspace(program, node);
        let budget = spec.budget.unwrap_or(usize::MAX);
        let evaluation = |(index, objective): (usize, &Objective<'_>)| {
            let (program, request) = spec.evaluation(index, objective)?;
            Ok(match request {
                Some(request) => plan_gradient(&program, &request, budget, workspace)?.0,
                None => plan(program, workspace),
            })
        };
        let evaluations = objectives.iter().enumerate().map(evaluation).collect::<Result<Vec<_>>>()?;
        let constant = |name: &str| {
            let read = evaluations.iter().any(|planned| planned.program.input(name).is_some());
            read.then(|| Ok(plan(spec.constant(name)?, workspace))).transpose()
        };
        Ok(Objectives {
            prompt: constant(buffer::PROMPT[0])?,
            null: constant(buffer::NULL[0])?,
            evaluations,
            batch: spec.sizes.batch,
        })
    }

    pub fn all(&self) -> Vec<&Planned> {
        self.evaluations.iter().chain(&self.prompt).chain(&self.null).collect()
    }

    /// Of one evaluation of each.
    pub fn nfe(&self) -> Nfe {
        let calls = self.evaluations.iter().map(|planned| calls(&planned.program));
        calls.fold(Nfe::default(), |sum, calls| Nfe {
            forward: sum.forward + self.batch * calls.forward,
            backward: sum.backward + self.batch * calls.backward,
        })
    }

    pub fn load(self, executor: &mut dyn Executor, model: &Model) -> Result<Loaded> {
        let inputs = self.evaluations.iter().flat_map(|planned| input_names(&planned.program)).collect();
        let mut load = |planned: Planned| executor.load(planned, model);
        Ok(Loaded {
            evaluations: self.evaluations.into_iter().map(&mut load).collect::<Result<_>>()?,
            prompt: self.prompt.map(&mut load).transpose()?,
            null: self.null.map(&mut load).transpose()?,
            inputs,
        })
    }
}

/// How often a program runs the UNet: forward, by its first layer, which is also computed again where activations are; backward, by
/// its last.
fn calls(program: &Program) -> Nfe {
    let is = |id: ValueId, key: &str| match &program.value(id).origin {
        Origin::Weight(weight) => weight.component == Component::Unet && weight.keys == [key],
        Origin::Input(_) | Origin::Op(_) => false,
    };
    let mut nfe = Nfe::default();
    for node in &program.nodes {
        if let Op::Conv2d(conv) = &node.op {
            nfe.forward += usize::from(is(conv.w, "conv_in.weight"));
        } else if let Op::Conv2dBackward(conv) = &node.op {
            nfe.backward += usize::from(is(conv.w, "conv_out.weight"));
        }
    }
    nfe
}

impl ObjectiveSpec<'_> {
    /// One objective, and what is to be differentiated.
    fn evaluation(&self, index: usize, objective: &Objective<'_>) -> Result<(Program, Option<Request>)> {
        let ObjectiveSpec { pipeline, dtype, sizes, guidance, prefix, .. } = *self;
        let mut b = Builder::new(objective.name, dtype);
        let variable = self.variable.map(|variable| VariableSpec { pipeline, dtype, sizes, variable, prefix });
        let states = variable.map(|variable| variable.states(&mut b)).transpose()?.flatten();
        let branch = self.variable.and_then(Variable::branch);
        let optimized = branch.zip(states).map(|(branch, states)| Optimized::new(&mut b, pipeline, branch, states));
        let mut context = StepContext::new(&mut b, pipeline, sizes, guidance, Place::Step { optimized });
        let loss = objective.append(&mut context);
        let uses_optimized = context.uses_optimized;
        b.output(report_name(index), loss.report);
        let Some(variable) = variable else { return Ok((b.finish()?, None)) };
        if let (Some(branch), false) = (branch, uses_optimized) {
            // What it found wrong itself comes first.
            b.finish()?;
            let what = match branch {
                Branch::Negative => "predicts without guidance: nothing in it depends on the unconditional branch",
                Branch::Prompt => "does not depend on what is optimized",
            };
            return Err(Error::Usage(format!("the objective '{}' {what}", objective.name)));
        }
        let minimize = match self.loss_scale == 1.0 {
            true => loss.minimize,
            false => b.affine(loss.minimize, self.loss_scale, 0.0),
        };
        let program = b.finish()?;
        let names = variable.parameters().into_iter().map(|parameter| parameter.name);
        let leaves = names.filter_map(|name| Some((program.input(name)?, gradient_of(name)))).collect();
        Ok((program, Some(Request { objectives: vec![(minimize, Cotangent::Ones)], leaves })))
    }

    /// Text states to the keys and values called `name`.
    fn constant(&self, name: &str) -> Result<Program> {
        let Sizes { batch, tokens, .. } = self.sizes;
        let config = &self.pipeline.config.unet;
        let mut b = Builder::new("constant", self.dtype);
        let context = b.input(CONSTANT_CONTEXT, &[batch, tokens, config.context_width]);
        let kv = Unet::new(config).context_kv(&mut b, context);
        b.output(name, kv);
        b.finish()
    }
}

impl NoiseLevels {
    /// What a context's buffers hold at these levels, by the names of [`buffer`].
    pub(crate) fn buffers(&self, prediction: Prediction) -> Vec<(&'static str, Vec<f64>)> {
        let mut buffers = vec![];
        for (at, (t, level)) in [(self.t1, self.level1), (self.t2, self.level2)].into_iter().enumerate() {
            buffers.push((buffer::TIMESTEP[at], vec![t]));
            buffers.push((buffer::CLEAN[at], level.x0(prediction).to_vec()));
            buffers.push((buffer::NOISE[at], level.eps(prediction).to_vec()));
        }
        let Level { alpha, sigma } = self.level2;
        buffers.push((buffer::RENOISE, vec![alpha, sigma]));
        buffers.push((buffer::RATIO, vec![sigma / alpha, -sigma / alpha]));
        buffers
    }
}

/// Objectives on an executor, that of the generator whose latents they are functions of.
pub struct Loaded {
    evaluations: Vec<ProgramId>,
    prompt: Option<ProgramId>,
    null: Option<ProgramId>,
    /// Named buffers that are read.
    inputs: HashSet<String>,
}

impl Loaded {
    pub fn reads(&self, name: &str) -> bool {
        self.inputs.contains(name)
    }

    /// Fills a buffer if an objective reads it.
    pub fn write(&self, images: &mut generate::Loaded<'_, '_>, name: &str, data: Data<'_>) -> Result<()> {
        if self.reads(name) { images.executor.write(name, data) } else { Ok(()) }
    }

    /// What predictions are conditioned on besides the variable, and the size of the images: once per batch, after it has begun.
    pub fn constants(&self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job]) -> Result<()> {
        let branches =
            [(self.prompt, Branch::Prompt, buffer::PROMPT[1]), (self.null, Branch::Negative, buffer::NULL[1])];
        for (program, branch, pooled) in branches {
            let Some(program) = program else { continue };
            let states = States { context: CONSTANT_CONTEXT, pooled: self.reads(pooled).then_some(pooled) };
            for (row, job) in jobs.iter().enumerate() {
                images.fetch(branch, job, states, row)?;
            }
            images.executor.run(program)?;
        }
        let size_ids = conditioning::size_ids(images.pipeline, images.sizes, jobs.len());
        self.write(images, buffer::SIZE_IDS, Data::F32(&size_ids))
    }

    /// The noise levels of the evaluations that follow.
    pub fn set_levels(&self, images: &mut generate::Loaded<'_, '_>, levels: &NoiseLevels) -> Result<()> {
        let buffers = levels.buffers(images.pipeline.config.scheduler.prediction);
        buffers.into_iter().try_for_each(|(name, values)| self.write(images, name, Data::F64(&values)))
    }

    /// Evaluates one objective, with draw `draw` of fresh noise under each image's seed; reports and gradients are then in their
    /// buffers.
    pub fn run(&self, images: &mut generate::Loaded<'_, '_>, index: usize, seeds: &[u64], draw: u64) -> Result<()> {
        self.write(images, buffer::COUNTER, Data::I32(&sampler::counters(seeds, draw)))?;
        images.executor.run(self.evaluations[index])
    }
}
