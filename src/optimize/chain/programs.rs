//! The programs of a differentiable run, and which of its two forms a budget allows.

use super::{Leaf, Objective, Storage};
use crate::autodiff::{Cotangent, Request, differentiate};
use crate::exec::Executor;
use crate::models::unet::Unet;
use crate::pipeline::Pipeline;
use crate::pipeline::programs::{self, Conditions, Sizes, buffer, gradient_of};
use crate::plan::{Planned, plan, plan_gradient, show_bytes};
use crate::program::{Builder, DType, Node, Origin, Program, Value, ValueId};
use crate::sampler::{HISTORY, LATENTS, Schedule, State, update};
use crate::{Error, Result};

/// The buffer of the losses of objective `index`.
pub fn loss_name(index: usize) -> String {
    format!("loss.{index}")
}

/// What belongs to step `index` in a program of all steps.
pub fn of_step(index: usize) -> String {
    format!(".{index}")
}

/// The sampler's state before every step and after the last: latents, then the history, `[steps + 1, 1 + depth, B, h, w, C]`.
pub const STATES: &str = "chain.states";

/// Everything that is asked for.
pub struct Design<'a> {
    pub pipeline: &'a Pipeline,
    pub dtype: DType,
    pub sizes: Sizes,
    pub schedule: &'a Schedule,
    pub leaves: &'a [Leaf],
    pub objectives: Vec<Objective<'a>>,
    /// Steps done before each objective.
    pub after: &'a [usize],
}

/// The planned programs of a run.
pub struct Parts {
    pub text: Planned,
    pub condition: Planned,
    /// From gradients to keys, values and time projections to gradients to text; where a leaf is text.
    pub condition_backward: Option<Planned>,
    pub run: Run,
}

pub enum Run {
    Latents {
        step: Planned,
        step_backward: Box<Planned>,
        /// One per objective.
        objectives: Vec<Planned>,
    },
    Activations(Planned),
}

impl Parts {
    pub fn state_bytes(&self) -> usize {
        match &self.run {
            Run::Latents { step: Planned { program, .. }, .. } => {
                program.input(STATES).map_or(0, |states| program.value(states).bytes())
            }
            Run::Activations(_) => 0,
        }
    }

    pub fn all(&self) -> Vec<&Planned> {
        let mut all = vec![&self.text, &self.condition];
        all.extend(&self.condition_backward);
        match &self.run {
            Run::Latents { step, step_backward, objectives } => {
                all.extend([step, step_backward]);
                all.extend(objectives);
            }
            Run::Activations(whole) => all.push(whole),
        }
        all
    }
}

impl Design<'_> {
    pub fn plan(self, executor: &dyn Executor, budget: Option<usize>) -> Result<(Parts, Storage)> {
        let workspace = |program: &Program, node: &Node| executor.workspace(program, node);
        let (run, storage) = self.run(budget, &workspace)?;
        let Design { pipeline, dtype, sizes, schedule, .. } = self;
        let parts = Parts {
            text: plan(programs::text(pipeline, dtype)?, workspace),
            condition: plan(programs::condition(pipeline, dtype, sizes, schedule)?, workspace),
            condition_backward: match self.through_text() {
                true => Some(plan(self.condition_backward()?, workspace)),
                false => None,
            },
            run,
        };
        // Those without a backward have nothing to compute again.
        if let Some(budget) = budget
            && let Some(planned) = parts.all().into_iter().find(|planned| planned.plan.arena_bytes > budget)
        {
            let [needed, budget] = [planned.plan.arena_bytes, budget].map(show_bytes);
            let what = format!("'{}' needs {needed} of activations; {budget} are allowed", planned.program.name);
            return Err(Error::Memory(what));
        }
        Ok((parts, storage))
    }

    /// Whether gradients flow on to what the steps are conditioned on.
    fn through_text(&self) -> bool {
        self.leaves.iter().any(|leaf| *leaf != Leaf::Noise)
    }

    /// The buffers of a step that gradients are carried in, besides the latents and the history.
    fn conditions(&self) -> Vec<&'static str> {
        let pooled = self.leaves.contains(&Leaf::Pooled);
        [(self.through_text(), buffer::KV), (pooled, buffer::TIME)]
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, name)| name)
            .collect()
    }

    fn run(&self, budget: Option<usize>, workspace: &dyn Fn(&Program, &Node) -> usize) -> Result<(Run, Storage)> {
        if let Some(budget) = budget {
            let whole = plan(self.whole()?, workspace);
            if whole.plan.arena_bytes <= budget {
                return Ok((Run::Activations(whole), Storage::Activations));
            }
        }
        let budget = budget.unwrap_or(usize::MAX);
        let forward = programs::step(self.pipeline, self.dtype, self.sizes, self.schedule)?;
        let (bare, request) = self.step_request(&forward)?;
        let (step_backward, recompute) = plan_gradient(&bare, &request, budget, workspace)?;
        let mut objectives = Vec::new();
        for (index, objective) in self.objectives.iter().enumerate() {
            let (program, request) = self.objective(index, objective)?;
            let (planned, _) = plan_gradient(&program, &request, budget, workspace)?;
            objectives.push(planned);
        }
        let step_backward = Box::new(step_backward);
        let step = plan(self.with_states(forward), workspace);
        let run = Run::Latents { step, step_backward, objectives };
        Ok((run, Storage::Latents(recompute)))
    }

    fn latents_shape(&self) -> [usize; 4] {
        let Sizes { batch, height, width, .. } = self.sizes;
        [batch, height, width, self.pipeline.config.unet.in_channels]
    }

    /// A step program that has the buffer of all states made; its ops neither read nor write it.
    fn with_states(&self, mut step: Program) -> Program {
        let slots = [self.schedule.steps.len() + 1, 1 + self.schedule.needs.history];
        let shape = [&slots[..], &self.latents_shape()].concat();
        step.inputs.push(ValueId(step.values.len() as u32));
        step.values.push(Value { shape, dtype: self.dtype.wide(), origin: Origin::Input(STATES.into()) });
        step
    }

    /// A step as a vector-Jacobian product: gradients to the new state in, gradients to the old state out, and those to the
    /// conditions added to what earlier calls left.
    fn step_request(&self, step: &Program) -> Result<(Program, Request)> {
        let mut step = Program { name: "step backward".into(), ..step.clone() };
        let outputs = std::mem::take(&mut step.outputs);
        let carried = |(name, id): (String, ValueId)| (id, Cotangent::Input(gradient_of(&name)));
        let mut request = Request { objectives: outputs.into_iter().map(carried).collect(), leaves: vec![] };
        for name in std::iter::once(LATENTS).chain(HISTORY).take(1 + self.schedule.needs.history) {
            request.leaves.push((input(&step, name)?, gradient_of(name)));
        }
        for name in self.conditions() {
            let id = input(&step, name)?;
            // Its own objective: what arrives is passed on, and this step's share added.
            request.objectives.push((id, Cotangent::Input(gradient_of(name))));
            request.leaves.push((id, gradient_of(name)));
        }
        Ok((step, request))
    }

    /// One objective: its losses, and its gradient added to that of the latents.
    fn objective(&self, index: usize, objective: &Objective<'_>) -> Result<(Program, Request)> {
        let mut b = Builder::new(format!("objective {index}"), self.dtype);
        let latents = b.wide_input(LATENTS, &self.latents_shape());
        let loss = (objective.loss)(&mut b, latents);
        self.check_loss(&mut b, loss);
        b.output(loss_name(index), loss);
        let objectives = vec![(latents, Cotangent::Input(gradient_of(LATENTS))), (loss, Cotangent::Ones)];
        Ok((b.finish()?, Request { objectives, leaves: vec![(latents, gradient_of(LATENTS))] }))
    }

    #[track_caller]
    fn check_loss(&self, b: &mut Builder, loss: ValueId) {
        let (found, batch) = (b.shape(loss), self.sizes.batch);
        if found != [batch] {
            b.fail(format!("a loss is {found:?}; it must be one number per sample, [{batch}]"));
        }
    }

    /// All steps and losses as one program, and its gradient.
    fn whole(&self) -> Result<Program> {
        let (config, schedule) = (&self.pipeline.config, self.schedule);
        let unet = Unet::new(&config.unet);
        let mut b = Builder::new("run", self.dtype);
        let shape = self.latents_shape();
        let latents = b.wide_input(LATENTS, &shape);
        let conditions = Conditions::inputs(&mut b, &unet, self.sizes, schedule, config.unet.added.is_some());
        let history = HISTORY[..schedule.needs.history].iter().map(|name| b.wide_input(*name, &shape)).collect();
        let mut state = State { latents, history };
        let mut losses = Vec::new();
        for done in 0..=schedule.steps.len() {
            // Before the step that follows, so that its gradient is added after that step's, as in the other form.
            for (index, objective) in self.objectives.iter().enumerate() {
                if self.after[index] == done {
                    let loss = (objective.loss)(&mut b, state.latents);
                    self.check_loss(&mut b, loss);
                    b.output(loss_name(index), loss);
                    losses.push((loss, Cotangent::Ones));
                }
            }
            if done < schedule.steps.len() {
                let suffix = of_step(done);
                let index = b.input_i32(format!("{}{suffix}", buffer::STEP), &[1]);
                let (with, without) =
                    programs::predict(&mut b, &unet, schedule.needs, state.latents, conditions, index);
                state = update(&mut b, schedule.needs, &state, with, without, &suffix);
            }
        }
        let program = b.finish()?;
        let mut leaves = vec![(latents, gradient_of(LATENTS))];
        for name in self.conditions() {
            leaves.push((input(&program, name)?, gradient_of(name)));
        }
        differentiate(&program, &Request { objectives: losses, leaves }, None)
    }

    /// From gradients to keys, values and time projections to those to the text states and the pooled text.
    fn condition_backward(&self) -> Result<Program> {
        let mut program = programs::condition(self.pipeline, self.dtype, self.sizes, self.schedule)?;
        program.name = "condition backward".into();
        let outputs = std::mem::take(&mut program.outputs);
        let carried = self.conditions();
        let objectives = outputs
            .into_iter()
            .filter(|(name, _)| carried.contains(&name.as_str()))
            .map(|(name, id)| (id, Cotangent::Input(gradient_of(&name))))
            .collect();
        let mut leaves = Vec::new();
        for (leaf, name) in [(Leaf::Context, buffer::CONTEXT), (Leaf::Pooled, buffer::POOLED)] {
            if self.leaves.contains(&leaf) {
                leaves.push((input(&program, name)?, gradient_of(name)));
            }
        }
        differentiate(&program, &Request { objectives, leaves }, None)
    }
}

/// The input of a name.
fn input(program: &Program, name: &str) -> Result<ValueId> {
    program.input(name).ok_or_else(|| {
        let what = format!("has no input '{name}'");
        Error::Program { program: program.name.clone(), what, at: "gradient".into() }
    })
}
