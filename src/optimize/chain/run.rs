//! Running a differentiable chain: forward over the steps, losses, and back.

use super::programs::{Run, STATES, loss_name, of_step};
use super::{Chain, Leaf};
use crate::exec::{Data, Executor, HostFloat, ProgramId};
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::{self, Text};
use crate::pipeline::programs::{Sizes, buffer, gradient_of, pooled_width, rows};
use crate::program::Origin;
use crate::sampler::{HISTORY, LATENTS, NOISE, Schedule};
use crate::{Error, Result};
use std::collections::HashSet;

/// Losses and gradients of one run.
#[derive(Clone, Debug)]
pub struct Evaluation<F> {
    /// Per objective, per sample.
    pub losses: Vec<Vec<F>>,
    /// Of the sum of all losses, per leaf in the order asked for; laid out as the leaf is.
    pub gradients: Vec<Vec<F>>,
}

/// A chain with its programs on an executor.
pub struct Loaded<'p, 'e, F = f32> {
    pipeline: &'p Pipeline,
    executor: &'e mut dyn Executor,
    sizes: Sizes,
    schedule: Schedule,
    leaves: Vec<Leaf>,
    text: ProgramId,
    condition: ProgramId,
    condition_backward: Option<ProgramId>,
    run: LoadedRun,
    /// Steps done before each objective.
    after: Vec<usize>,
    /// The latents before the first step.
    start: Vec<F>,
}

enum LoadedRun {
    Latents {
        step: ProgramId,
        step_backward: ProgramId,
        objectives: Vec<ProgramId>,
    },
    /// With the buffers it reads: what no loss depends on is not among them, as the history of the last step.
    Activations(ProgramId, HashSet<String>),
}

impl<'p, 'e, F: HostFloat> Loaded<'p, 'e, F> {
    pub(super) fn new(chain: Chain<'p>, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e, F>> {
        let Chain { pipeline, sizes, schedule, leaves, after, parts, .. } = chain;
        let model = &pipeline.model;
        let text = executor.load(parts.text, model)?;
        let condition = executor.load(parts.condition, model)?;
        let condition_backward = parts.condition_backward.map(|planned| executor.load(planned, model)).transpose()?;
        let run = match parts.run {
            Run::Latents { step, step_backward, objectives } => LoadedRun::Latents {
                step: executor.load(step, model)?,
                step_backward: executor.load(*step_backward, model)?,
                objectives: objectives
                    .into_iter()
                    .map(|planned| executor.load(planned, model))
                    .collect::<Result<_>>()?,
            },
            Run::Activations(whole) => {
                let inputs = whole.program.inputs.iter().filter_map(|id| match &whole.program.value(*id).origin {
                    Origin::Input(name) => Some(name.clone()),
                    Origin::Weight(_) | Origin::Op(_) => None,
                });
                let inputs = inputs.collect();
                LoadedRun::Activations(executor.load(whole, model)?, inputs)
            }
        };
        let start = vec![F::default(); latents_len(pipeline, sizes)];
        Ok(Loaded {
            pipeline,
            executor,
            sizes,
            schedule,
            leaves,
            text,
            condition,
            condition_backward,
            run,
            after,
            start,
        })
    }

    /// Fills an input that an objective declares.
    pub fn write(&mut self, name: &str, data: Data<'_>) -> Result<()> {
        self.executor.write(name, data)
    }

    /// Encodes a prompt per sample and, for guidance, what the unconditional branch is told, and conditions the run on them.
    pub fn prompts(&mut self, prompts: &[&str], negatives: &[&str]) -> Result<()> {
        let unconditional = if self.schedule.needs.uncond { negatives } else { &[] };
        for (row, prompt) in unconditional.iter().chain(prompts).enumerate() {
            conditioning::encode(self.pipeline, self.executor, self.text, prompt)?;
            conditioning::copy(self.pipeline, self.executor, (conditioning::ENCODED, 0), (conditioning::TOLD, row))?;
        }
        conditioning::condition(self.pipeline, self.executor, self.condition, self.sizes, &self.schedule)
    }

    /// Conditions the run on the text states of all rows, under guidance the unconditional ones first.
    pub fn texts(&mut self, texts: &[Text]) -> Result<()> {
        let Text { context, pooled } = conditioning::stacked(texts);
        self.condition(Data::F32(&context), Data::F32(&pooled))
    }

    /// The same from states as [`Leaf::Context`] and [`Leaf::Pooled`] are laid out; `pooled` is empty where the model has none.
    pub fn condition(&mut self, context: Data<'_>, pooled: Data<'_>) -> Result<()> {
        self.executor.write(buffer::CONTEXT, context)?;
        if self.pipeline.config.unet.added.is_some() {
            self.executor.write(buffer::POOLED, pooled)?;
        }
        conditioning::condition(self.pipeline, self.executor, self.condition, self.sizes, &self.schedule)
    }

    /// One prompt's text states.
    pub fn encode(&mut self, prompt: &str) -> Result<Text> {
        conditioning::encode(self.pipeline, self.executor, self.text, prompt)?;
        Ok(conditioning::read(self.pipeline, self.executor, conditioning::ENCODED, 1, 0..1)?.swap_remove(0))
    }

    /// Runs from `noise` (`[B, h, w, C]`, unit variance) and back. `draws`: the fresh noise of every step, for samplers that add it.
    pub fn evaluate(&mut self, noise: &[F], draws: &[Vec<F>]) -> Result<Evaluation<F>> {
        let needed = if self.schedule.needs.noise { self.schedule.steps.len() } else { 0 };
        if draws.len() != needed {
            return Err(Error::Usage(format!("{} draws of noise, this sampler takes {needed}", draws.len())));
        }
        // Unfilled slots of the history have coefficient 0.
        self.start = noise.iter().map(|x| x.scaled(self.schedule.initial_scale)).collect();
        self.executor.write(LATENTS, F::data(&self.start))?;
        match self.run {
            LoadedRun::Latents { step, step_backward, .. } => {
                self.forward(step, draws)?;
                self.backward(step_backward, draws)?;
            }
            LoadedRun::Activations(whole, _) => self.at_once(whole, draws)?,
        }
        if let Some(program) = self.condition_backward {
            self.executor.run(program)?;
        }
        self.results()
    }

    /// Writes everything a step reads but its state.
    fn prepare(&mut self, index: usize, draws: &[Vec<F>], suffix: &str) -> Result<()> {
        let step = [index as i32];
        let mut data = vec![(buffer::STEP, Data::I32(&step))];
        data.extend(self.schedule.steps[index].buffers().map(|(name, coefficients)| (name, Data::F64(coefficients))));
        data.extend(draws.get(index).map(|draw| (NOISE, F::data(draw))));
        for (name, data) in data {
            let name = format!("{name}{suffix}");
            let read = match &self.run {
                LoadedRun::Latents { .. } => true,
                LoadedRun::Activations(_, inputs) => inputs.contains(&name),
            };
            if read {
                self.executor.write(&name, data)?;
            }
        }
        Ok(())
    }

    /// Keeps the state after `done` steps.
    fn keep(&mut self, done: usize) -> Result<()> {
        let (len, slots) = (self.start.len(), 1 + self.schedule.needs.history);
        let mut slot = (done * slots..).zip(names().take(slots));
        slot.try_for_each(|(slot, name)| self.executor.copy((name, 0), (STATES, slot * len), len))
    }

    /// Takes up the state after `done` steps.
    fn restore(&mut self, done: usize) -> Result<()> {
        let (len, slots) = (self.start.len(), 1 + self.schedule.needs.history);
        let mut slot = (done * slots..).zip(names().take(slots));
        slot.try_for_each(|(slot, name)| self.executor.copy((STATES, slot * len), (name, 0), len))
    }

    fn forward(&mut self, step: ProgramId, draws: &[Vec<F>]) -> Result<()> {
        self.keep(0)?;
        for index in 0..self.schedule.steps.len() {
            self.prepare(index, draws, "")?;
            self.executor.run(step)?;
            self.keep(index + 1)?;
        }
        Ok(())
    }

    fn backward(&mut self, step_backward: ProgramId, draws: &[Vec<F>]) -> Result<()> {
        self.clear_gradients()?;
        for done in (0..=self.schedule.steps.len()).rev() {
            if self.after.contains(&done) {
                self.restore(done)?;
                self.objectives(done)?;
            }
            if done > 0 {
                self.restore(done - 1)?;
                self.prepare(done - 1, draws, "")?;
                self.executor.run(step_backward)?;
            }
        }
        Ok(())
    }

    fn objectives(&mut self, done: usize) -> Result<()> {
        let LoadedRun::Latents { objectives, .. } = &self.run else { return Ok(()) };
        for (&program, _) in objectives.iter().zip(&self.after).filter(|(_, after)| **after == done) {
            self.executor.run(program)?;
        }
        Ok(())
    }

    /// Gradients that steps and objectives add to begin at 0.
    fn clear_gradients(&mut self) -> Result<()> {
        let zeros = vec![0.0; self.start.len()];
        for name in names().take(1 + self.schedule.needs.history) {
            self.executor.write(&gradient_of(name), Data::F32(&zeros))?;
        }
        let (rows, steps) = (rows(self.sizes, &self.schedule), self.schedule.steps.len());
        let unet = crate::models::unet::Unet::new(&self.pipeline.config.unet);
        if self.condition_backward.is_some() {
            let zeros = vec![0.0; rows * self.sizes.tokens * unet.kv_width()];
            self.executor.write(&gradient_of(buffer::KV), Data::F32(&zeros))?;
        }
        if self.leaves.contains(&Leaf::Pooled) {
            let zeros = vec![0.0; steps * rows * unet.time_width()];
            self.executor.write(&gradient_of(buffer::TIME), Data::F32(&zeros))?;
        }
        Ok(())
    }

    fn at_once(&mut self, whole: ProgramId, draws: &[Vec<F>]) -> Result<()> {
        for index in 0..self.schedule.steps.len() {
            self.prepare(index, draws, &of_step(index))?;
        }
        self.executor.run(whole)
    }

    fn results(&self) -> Result<Evaluation<F>> {
        let losses = (0..self.after.len()).map(|index| self.read(&loss_name(index), self.sizes.batch));
        let rows = rows(self.sizes, &self.schedule);
        let config = &self.pipeline.config;
        let gradient = |leaf: &Leaf| match leaf {
            Leaf::Noise => {
                let gradient = self.read(&gradient_of(LATENTS), latents_len(self.pipeline, self.sizes))?;
                Ok(gradient.into_iter().map(|x| x.scaled(self.schedule.initial_scale)).collect())
            }
            Leaf::Context => {
                self.read(&gradient_of(buffer::CONTEXT), rows * self.sizes.tokens * config.unet.context_width)
            }
            Leaf::Pooled => {
                let width = pooled_width(self.pipeline)?.unwrap_or(0);
                self.read(&gradient_of(buffer::POOLED), rows * width)
            }
        };
        Ok(Evaluation {
            losses: losses.collect::<Result<_>>()?,
            gradients: self.leaves.iter().map(gradient).collect::<Result<_>>()?,
        })
    }

    fn read(&self, name: &str, len: usize) -> Result<Vec<F>> {
        let mut values = vec![F::default(); len];
        self.executor.read(name, F::data_mut(&mut values))?;
        Ok(values)
    }
}

/// The buffers of a sampler's state: latents, then the history.
fn names() -> impl Iterator<Item = &'static str> {
    std::iter::once(LATENTS).chain(HISTORY)
}

fn latents_len(pipeline: &Pipeline, sizes: Sizes) -> usize {
    sizes.batch * sizes.height * sizes.width * pipeline.config.unet.in_channels
}
