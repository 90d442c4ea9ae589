//! The programs of a differentiable run, and which of its two forms a budget allows.

use super::term::Term;
use crate::autodiff::{Cotangent, Request, differentiate};
use crate::exec::Executor;
use crate::models::unet::Unet;
use crate::optimize::objective::{Loss, Place, StepContext};
use crate::optimize::variable::Entry;
use crate::pipeline::Pipeline;
use crate::pipeline::programs::{self, Conditions, Sizes, buffer, gradient_of, rows};
use crate::plan::{Planned, Recompute, plan, plan_gradient, show_bytes};
use crate::program::{Builder, DType, Node, Program, ValueId};
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

/// What belongs to objective `index`, in all programs.
pub fn of_objective(index: usize) -> String {
    format!(".objective{index}")
}

/// The starting noise, `[B, h, w, C]`, unit variance, of the accumulator type.
pub const NOISE: &str = "chain.noise";
/// The fresh noise of every step, `[steps, B, h, w, C]`, for samplers that add it.
pub const DRAWS: &str = "chain.draws";
/// The sampler's state before every step and after the last: latents, then the history, `[steps + 1, 1 + depth, B, h, w, C]`.
pub const STATES: &str = "chain.states";

/// How the backward gets the forward's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// The state after every step; each step's forward runs again, in this many segments.
    Latents(Recompute),
    /// Everything.
    Activations,
}

/// Everything that is asked for.
pub struct Spec<'a> {
    pub pipeline: &'a Pipeline,
    pub dtype: DType,
    pub sizes: Sizes,
    /// Steps that are conditioned for, and how many of them are the run.
    pub schedule: &'a Schedule,
    pub steps: usize,
    pub guidance: f64,
    pub entries: &'a [Entry],
    pub terms: Vec<Term<'a>>,
    /// Steps done before each objective.
    pub after: &'a [usize],
}

/// The planned programs of a run.
pub struct Parts {
    pub text: Planned,
    pub condition: Planned,
    /// From gradients to keys, values and time projections to gradients to text; where an entry is text.
    pub condition_backward: Option<Planned>,
    /// From the noise to the first latents, and back.
    pub start: Planned,
    pub start_backward: Option<Planned>,
    pub step: Planned,
    /// The losses alone, one per objective.
    pub losses: Vec<Planned>,
    pub run: Run,
}

/// What goes back.
pub enum Run {
    Latents {
        /// Sets the gradients that steps and objectives add to to 0.
        clear: Planned,
        step_backward: Box<Planned>,
        /// One per objective; without a backward where it is only watched.
        objectives: Vec<Planned>,
    },
    /// Forward, losses and backward.
    Activations(Planned),
}

impl Parts {
    pub fn state_bytes(&self) -> usize {
        let Planned { program, .. } = &self.start;
        program.input(STATES).map_or(0, |states| program.value(states).bytes())
    }

    pub fn all(&self) -> Vec<&Planned> {
        let mut all = vec![&self.text, &self.condition, &self.start, &self.step];
        all.extend(self.condition_backward.iter().chain(&self.start_backward).chain(&self.losses));
        match &self.run {
            Run::Latents { clear, step_backward, objectives } => {
                all.extend([clear, step_backward]);
                all.extend(objectives);
            }
            Run::Activations(whole) => all.push(whole),
        }
        all
    }
}

impl Spec<'_> {
    pub fn plan(self, executor: &dyn Executor, budget: Option<usize>) -> Result<(Parts, Storage)> {
        let workspace = |program: &Program, node: &Node| executor.workspace(program, node);
        let (run, storage) = self.run(budget, &workspace)?;
        let Spec { pipeline, dtype, sizes, schedule, .. } = self;
        let optional = |on: bool, program: &dyn Fn() -> Result<Program>| -> Result<Option<Planned>> {
            on.then(|| Ok(plan(program()?, workspace))).transpose()
        };
        let losses = (0..self.terms.len()).map(|index| Ok(plan(self.objective(index)?.0, workspace)));
        let parts = Parts {
            text: plan(programs::text(pipeline, dtype)?, workspace),
            condition: plan(programs::condition(pipeline, dtype, sizes, schedule)?, workspace),
            condition_backward: optional(self.through_text(), &|| self.condition_backward())?,
            start: plan(self.start(matches!(run, Run::Latents { .. }))?, workspace),
            start_backward: optional(self.entries.contains(&Entry::Latents), &|| self.start_backward())?,
            step: plan(programs::step(pipeline, dtype, sizes, schedule)?, workspace),
            losses: losses.collect::<Result<_>>()?,
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
        self.entries.iter().any(|entry| *entry != Entry::Latents)
    }

    /// The buffers of a step that gradients are carried in, besides the latents and the history.
    fn conditions(&self) -> Vec<&'static str> {
        let pooled = self.entries.contains(&Entry::Pooled);
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
        let (step, request) = self.step_request()?;
        let clear = plan(self.clear(&step)?, workspace);
        let (step_backward, recompute) = plan_gradient(&step, &request, budget, workspace)?;
        let mut objectives = Vec::new();
        for index in 0..self.terms.len() {
            let (program, request) = self.objective(index)?;
            objectives.push(match self.terms[index].watched {
                true => plan(program, workspace),
                false => plan_gradient(&program, &request, budget, workspace)?.0,
            });
        }
        let run = Run::Latents { clear, step_backward: Box::new(step_backward), objectives };
        Ok((run, Storage::Latents(recompute)))
    }

    fn latents_shape(&self) -> [usize; 4] {
        let Sizes { batch, height, width, .. } = self.sizes;
        [batch, height, width, self.pipeline.config.unet.in_channels]
    }

    /// The noise to the latents before the first step. What is kept of a run is declared here; steps copy to and from it.
    fn start(&self, keeps_states: bool) -> Result<Program> {
        let (shape, steps) = (self.latents_shape(), self.steps);
        let mut b = Builder::new("start", self.dtype);
        let noise = b.accumulator_input(NOISE, &shape);
        if keeps_states {
            b.accumulator_input(STATES, &[&[steps + 1, 1 + self.schedule.needs.history], &shape[..]].concat());
        }
        if self.schedule.needs.noise {
            b.accumulator_input(DRAWS, &[&[steps], &shape[..]].concat());
        }
        let latents = b.affine(noise, self.schedule.initial_scale, 0.0);
        b.output(LATENTS, latents);
        b.finish()
    }

    fn start_backward(&self) -> Result<Program> {
        let mut b = Builder::new("start backward", self.dtype);
        let latents = b.accumulator_input(gradient_of(LATENTS), &self.latents_shape());
        let noise = b.affine(latents, self.schedule.initial_scale, 0.0);
        b.output(gradient_of(NOISE), noise);
        b.finish()
    }

    /// The buffers of the sampler's state that a step reads and makes.
    fn state(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(LATENTS).chain(HISTORY).take(1 + self.schedule.needs.history)
    }

    /// Zeros for the gradients that a run adds to.
    fn clear(&self, step: &Program) -> Result<Program> {
        let mut b = Builder::new("clear gradients", self.dtype);
        for name in self.state().chain(self.conditions()) {
            let value = step.value(input(step, name)?);
            let zero = b.computing_in(value.dtype, |b| b.constant(&value.shape, 0.0));
            b.output(gradient_of(name), zero);
        }
        b.finish()
    }

    /// A step as a vector-Jacobian product: gradients to the new state in, gradients to the old state out, and those to the
    /// conditions added to what earlier calls left.
    fn step_request(&self) -> Result<(Program, Request)> {
        let mut step = programs::step(self.pipeline, self.dtype, self.sizes, self.schedule)?;
        step.name = "step backward".into();
        let outputs = std::mem::take(&mut step.outputs);
        let carried = |(name, id): (String, ValueId)| (id, Cotangent::Input(gradient_of(&name)));
        let mut request = Request { objectives: outputs.into_iter().map(carried).collect(), leaves: vec![] };
        for name in self.state() {
            request.leaves.push((input(&step, name)?, gradient_of(name)));
        }
        for name in self.conditions() {
            carry(&step, name, &mut request)?;
        }
        Ok((step, request))
    }

    /// Appends an objective to latents.
    fn append(&self, b: &mut Builder, index: usize, latents: ValueId) -> Loss {
        let place = Place::Chain { rows: rows(self.sizes, self.schedule), suffix: of_objective(index) };
        let mut context = StepContext::at(b, self.pipeline, self.sizes, self.guidance, place, latents);
        let loss = self.terms[index].objective.append(&mut context);
        if context.predicts && self.entries.contains(&Entry::Pooled) {
            context.b.fail("an objective that predicts, beside a gradient to the pooled text: not both");
        }
        b.output(loss_name(index), loss.minimize);
        loss
    }

    /// One objective: its losses, and its gradients added to those of the latents and, where it predicts, of the text.
    fn objective(&self, index: usize) -> Result<(Program, Request)> {
        let mut b = Builder::new(format!("objective {index}"), self.dtype);
        let latents = b.accumulator_input(LATENTS, &self.latents_shape());
        let loss = self.append(&mut b, index, latents).minimize;
        let program = b.finish()?;
        let mut request = Request { objectives: vec![], leaves: vec![] };
        carry(&program, LATENTS, &mut request)?;
        if self.through_text() && program.input(buffer::KV).is_some() {
            carry(&program, buffer::KV, &mut request)?;
        }
        request.objectives.push((loss, Cotangent::Ones));
        Ok((program, request))
    }

    /// All steps and losses as one program, and its gradient.
    fn whole(&self) -> Result<Program> {
        let (config, schedule) = (&self.pipeline.config, self.schedule);
        let unet = Unet::new(&config.unet);
        let mut b = Builder::new("run", self.dtype);
        let shape = self.latents_shape();
        let latents = b.accumulator_input(LATENTS, &shape);
        let conditions = Conditions::inputs(&mut b, &unet, self.sizes, schedule, config.unet.added.is_some());
        let history = HISTORY[..schedule.needs.history].iter().map(|name| b.accumulator_input(*name, &shape)).collect();
        let mut state = State { latents, history };
        let mut losses = Vec::new();
        for done in 0..=self.steps {
            // Before the step that follows, so that its gradient is added after that step's, as in the other form.
            for index in (0..self.terms.len()).filter(|index| self.after[*index] == done) {
                let loss = self.append(&mut b, index, state.latents).minimize;
                losses.extend((!self.terms[index].watched).then_some((loss, Cotangent::Ones)));
            }
            if done < self.steps {
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
        for (entry, name) in [(Entry::Context, buffer::CONTEXT), (Entry::Pooled, buffer::POOLED)] {
            if self.entries.contains(&entry) {
                leaves.push((input(&program, name)?, gradient_of(name)));
            }
        }
        differentiate(&program, &Request { objectives, leaves }, None)
    }
}

/// An input as an objective of its own: what arrives at its gradient is passed on, and this program's share added.
fn carry(program: &Program, name: &str, request: &mut Request) -> Result<()> {
    let id = input(program, name)?;
    request.objectives.push((id, Cotangent::Input(gradient_of(name))));
    request.leaves.push((id, gradient_of(name)));
    Ok(())
}

/// The input of a name.
fn input(program: &Program, name: &str) -> Result<ValueId> {
    program.input(name).ok_or_else(|| {
        let what = format!("has no input '{name}'");
        Error::Program { program: program.name.clone(), what, at: "gradient".into() }
    })
}
