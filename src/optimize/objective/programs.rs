//! The programs of a set of objectives, and the host's side of one look at the latents.

use super::{Objective, Scene, Told, scene};
use crate::autodiff::{Cotangent, Request};
use crate::exec::{Data, Executor, ProgramId};
use crate::models::unet::Unet;
use crate::optimize::variable::{Design, Variable};
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::{self, States};
use crate::pipeline::generate::{self, Branch, Job};
use crate::pipeline::programs::{Sizes, gradient_of};
use crate::plan::{Planned, plan, plan_gradient};
use crate::program::{Builder, DType, Node, Op, Origin, Program, ValueId};
use crate::sampler::{self, LATENTS, Level};
use crate::weights::{Component, Model};
use crate::{Error, Result};
use std::collections::HashSet;

/// Text states that the network is told besides the variable, `[B, T, D]`; each branch's in turn.
const CONSTANT_CONTEXT: &str = "constant.context";

/// What an objective reports, per image.
pub fn score_name(objective: usize) -> String {
    format!("score.{objective}")
}

/// Calls of the UNet, each on one image's latents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    pub forward: usize,
    pub backward: usize,
}

/// The two noise levels of a look: that of the latents, and the one they are taken back to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    pub timestep: f64,
    pub level: Level,
    pub again: f64,
    pub again_level: Level,
}

/// What a gradient is taken with respect to.
#[derive(Clone, Copy)]
pub enum Varies<'a> {
    /// What the network is told: the parameters of a variable, beside prompts with so many tokens before the first learnable one.
    Told { variable: &'a Variable, prefix: usize },
    /// The latents.
    Latents,
    /// Nothing: the objective is a score.
    Nothing,
}

/// What the programs are planned for.
pub struct Ask<'a> {
    pub pipeline: &'a Pipeline,
    pub dtype: DType,
    pub sizes: Sizes,
    /// Of [`Scene::guided`].
    pub guidance: f64,
    pub varies: Varies<'a>,
    /// What gradients are multiplied with.
    pub loss_scale: f64,
    /// Bytes of arena; `None`: as many as the fastest way wants.
    pub budget: Option<usize>,
}

/// Planned objectives.
pub struct Objectives {
    /// The latents, and what varies → scores and gradients.
    looks: Vec<Planned>,
    /// Text states to keys and values, of the user's prompt and of the unconditional branch; where a look reads them.
    prompt: Option<Planned>,
    null: Option<Planned>,
    batch: usize,
}

impl Objectives {
    pub fn plan(ask: &Ask<'_>, executor: &dyn Executor, objectives: &[Objective]) -> Result<Objectives> {
        let workspace = |program: &Program, node: &Node| executor.workspace(program, node);
        let budget = ask.budget.unwrap_or(usize::MAX);
        let look = |(index, objective): (usize, &Objective)| {
            let (program, request) = ask.look(index, objective)?;
            Ok(match request {
                Some(request) => plan_gradient(&program, &request, budget, workspace)?.0,
                None => plan(program, workspace),
            })
        };
        let looks = objectives.iter().enumerate().map(look).collect::<Result<Vec<_>>>()?;
        let constant = |name: &str| {
            let read = looks.iter().any(|planned| planned.program.input(name).is_some());
            read.then(|| Ok(plan(ask.constant(name)?, workspace))).transpose()
        };
        Ok(Objectives {
            prompt: constant(scene::PROMPT[0])?,
            null: constant(scene::NULL[0])?,
            looks,
            batch: ask.sizes.batch,
        })
    }

    pub fn all(&self) -> Vec<&Planned> {
        self.looks.iter().chain(&self.prompt).chain(&self.null).collect()
    }

    /// Of one look of each.
    pub fn passes(&self) -> Passes {
        let calls = self.looks.iter().map(|planned| calls(&planned.program));
        calls.fold(Passes::default(), |sum, calls| Passes {
            forward: sum.forward + self.batch * calls.forward,
            backward: sum.backward + self.batch * calls.backward,
        })
    }

    pub fn load(self, executor: &mut dyn Executor, model: &Model) -> Result<Loaded> {
        let mut inputs = HashSet::new();
        for planned in &self.looks {
            let program = &planned.program;
            inputs.extend(program.inputs.iter().filter_map(|id| match &program.value(*id).origin {
                Origin::Input(name) => Some(name.clone()),
                Origin::Weight(_) | Origin::Op(_) => None,
            }));
        }
        let mut load = |planned: Planned| executor.load(planned, model);
        Ok(Loaded {
            looks: self.looks.into_iter().map(&mut load).collect::<Result<_>>()?,
            prompt: self.prompt.map(&mut load).transpose()?,
            null: self.null.map(&mut load).transpose()?,
            inputs,
        })
    }
}

/// How often a program runs the UNet: forward, by its first layer, which is also computed again where activations are; backward, by
/// its last.
fn calls(program: &Program) -> Passes {
    let is = |id: ValueId, key: &str| match &program.value(id).origin {
        Origin::Weight(weight) => weight.component == Component::Unet && weight.keys == [key],
        Origin::Input(_) | Origin::Op(_) => false,
    };
    let mut passes = Passes::default();
    for node in &program.nodes {
        if let Op::Conv2d(conv) = &node.op {
            passes.forward += usize::from(is(conv.w, "conv_in.weight"));
        } else if let Op::Conv2dBackward(conv) = &node.op {
            passes.backward += usize::from(is(conv.w, "conv_out.weight"));
        }
    }
    passes
}

impl Ask<'_> {
    /// One objective and what is to be differentiated: minus what it raises.
    fn look(&self, index: usize, objective: &Objective) -> Result<(Program, Option<Request>)> {
        let mut b = Builder::new(objective.name, self.dtype);
        let (learned, parameters) = match self.varies {
            Varies::Told { variable, prefix } => {
                let Ask { pipeline, dtype, sizes, .. } = *self;
                let design = Design { pipeline, dtype, sizes, variable };
                let told = match variable {
                    Variable::Token(_) | Variable::Text => Told::Learned,
                    Variable::Null => Told::Null,
                };
                (Some((told, design.states(&mut b, prefix)?)), design.parameters())
            }
            Varies::Latents | Varies::Nothing => (None, vec![]),
        };
        let mut scene = Scene::new(&mut b, self.pipeline, self.sizes, self.guidance, learned);
        let score = (objective.append)(&mut scene);
        let looked = scene.looked_at_learned;
        for value in [score.ascend, score.report] {
            let (found, batch) = (b.shape(value), self.sizes.batch);
            if found != [batch] {
                b.fail(format!("an objective is {found:?}; it must be one number per image, [{batch}]"));
            }
        }
        b.output(score_name(index), score.report);
        let names = match self.varies {
            Varies::Told { variable, .. } if !looked => {
                // What it found wrong itself comes first.
                b.finish()?;
                let what = match variable {
                    Variable::Null => "does not look under guidance: nothing in it depends on the unconditional branch",
                    Variable::Token(_) | Variable::Text => "does not depend on what is optimised",
                };
                return Err(Error::Usage(format!("the objective '{}' {what}", objective.name)));
            }
            Varies::Told { .. } => parameters.iter().map(|parameter| parameter.name).collect(),
            Varies::Latents => vec![LATENTS],
            Varies::Nothing => return Ok((b.finish()?, None)),
        };
        let loss = b.affine(score.ascend, -self.loss_scale, 0.0);
        let program = b.finish()?;
        let leaves = names.into_iter().filter_map(|name| Some((program.input(name)?, gradient_of(name)))).collect();
        Ok((program, Some(Request { objectives: vec![(loss, Cotangent::Ones)], leaves })))
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

/// Objectives on an executor, that of the generator whose latents they look at.
pub struct Loaded {
    looks: Vec<ProgramId>,
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

    /// What the network is told besides what varies, and the size of the images: once per batch, after it has begun.
    pub fn constants(&self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job]) -> Result<()> {
        let branches = [(self.prompt, Branch::Prompt, scene::PROMPT[1]), (self.null, Branch::Negative, scene::NULL[1])];
        for (program, branch, pooled) in branches {
            let Some(program) = program else { continue };
            let states = States { context: CONSTANT_CONTEXT, pooled: self.reads(pooled).then_some(pooled) };
            for (row, job) in jobs.iter().enumerate() {
                images.enter(branch, job, states, row)?;
            }
            images.executor.run(program)?;
        }
        let size_ids = conditioning::size_ids(images.pipeline, images.sizes, jobs.len());
        self.write(images, scene::SIZE_IDS, Data::F32(&size_ids))
    }

    /// The noise levels of the looks that follow.
    pub fn prepare(&self, images: &mut generate::Loaded<'_, '_>, look: &Look) -> Result<()> {
        let prediction = images.pipeline.config.scheduler.prediction;
        for (at, (timestep, level)) in
            [(look.timestep, look.level), (look.again, look.again_level)].into_iter().enumerate()
        {
            self.write(images, scene::TIMESTEP[at], Data::F64(&[timestep]))?;
            self.write(images, scene::CLEAN[at], Data::F64(&level.x0(prediction)))?;
            self.write(images, scene::NOISE[at], Data::F64(&level.eps(prediction)))?;
        }
        let Level { alpha, sigma } = look.again_level;
        self.write(images, scene::RENOISE, Data::F64(&[alpha, sigma]))?;
        self.write(images, scene::RATIO, Data::F64(&[sigma / alpha, -sigma / alpha]))
    }

    /// Looks once, with draw `draw` of fresh noise under each image's seed.
    pub fn run(&self, images: &mut generate::Loaded<'_, '_>, index: usize, seeds: &[u64], draw: u64) -> Result<()> {
        self.write(images, scene::COUNTER, Data::I32(&sampler::counters(seeds, draw)))?;
        images.executor.run(self.looks[index])
    }
}
