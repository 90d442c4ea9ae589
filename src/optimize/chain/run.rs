//! Running a differentiable chain: forward over the steps, losses, and back.

use super::Chain;
use super::programs::{DRAWS, NOISE, Run, STATES, loss_name, of_objective, of_step};
use crate::exec::{Data, Executor, HostFloat, ProgramId};
use crate::optimize::objective::{self, NoiseLevels};
use crate::optimize::variable::Entry;
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::{self, BATCH, Branch, ENCODED, States, Text};
use crate::pipeline::generate::Job;
use crate::pipeline::programs::{Sizes, buffer, gradient_of, input_names, pooled_width, rows};
use crate::plan::Planned;
use crate::sampler::{self, HISTORY, LATENTS, Schedule};
use crate::{Error, Result};
use std::collections::HashSet;
use std::ops::Range;

/// Losses and gradients of one run.
#[derive(Clone, Debug)]
pub struct Evaluation<F> {
    /// Per objective, per sample: what is minimized.
    pub losses: Vec<Vec<F>>,
    /// Of the sum of all losses, per entry in the order asked for; laid out as what enters there.
    pub gradients: Vec<Vec<F>>,
}

/// A chain with its programs on an executor.
pub struct Loaded<'p, 'e, F = f32> {
    pipeline: &'p Pipeline,
    executor: &'e mut dyn Executor,
    sizes: Sizes,
    schedule: Schedule,
    /// The first ones of the schedule; the others are those of the plain run beside it.
    steps: usize,
    image_scale: f64,
    entries: Vec<Entry>,
    text: ProgramId,
    condition: ProgramId,
    condition_backward: Option<ProgramId>,
    start: ProgramId,
    start_backward: Option<ProgramId>,
    step: ProgramId,
    /// One per objective.
    losses: Vec<ProgramId>,
    run: LoadedRun,
    /// Steps done before each objective.
    after: Vec<usize>,
    /// Buffers that objectives read.
    inputs: HashSet<String>,
    host: std::marker::PhantomData<F>,
}

enum LoadedRun {
    Latents {
        clear: ProgramId,
        step_backward: ProgramId,
        objectives: Vec<ProgramId>,
    },
    /// With the buffers it reads: what no loss depends on is not among them, as the history of the last step.
    Activations(ProgramId, HashSet<String>),
}

impl<'p, 'e, F: HostFloat> Loaded<'p, 'e, F> {
    pub(super) fn new(chain: Chain<'p>, executor: &'e mut dyn Executor) -> Result<Loaded<'p, 'e, F>> {
        let Chain { pipeline, sizes, schedule, steps, image_scale, entries, after, levels, parts, .. } = chain;
        let read: HashSet<String> = parts.losses.iter().flat_map(|planned| input_names(&planned.program)).collect();
        let mut load = |planned: Planned| executor.load(planned, &pipeline.model);
        let mut loaded = Loaded {
            text: load(parts.text)?,
            condition: load(parts.condition)?,
            condition_backward: parts.condition_backward.map(&mut load).transpose()?,
            start: load(parts.start)?,
            start_backward: parts.start_backward.map(&mut load).transpose()?,
            step: load(parts.step)?,
            losses: parts.losses.into_iter().map(&mut load).collect::<Result<_>>()?,
            run: match parts.run {
                Run::Latents { clear, step_backward, objectives } => LoadedRun::Latents {
                    clear: load(clear)?,
                    step_backward: load(*step_backward)?,
                    objectives: objectives.into_iter().map(&mut load).collect::<Result<_>>()?,
                },
                Run::Activations(whole) => {
                    let inputs = input_names(&whole.program).collect();
                    LoadedRun::Activations(load(whole)?, inputs)
                }
            },
            pipeline,
            executor,
            sizes,
            schedule,
            steps,
            image_scale,
            entries,
            after,
            inputs: read,
            host: std::marker::PhantomData,
        };
        loaded.write_constants(&levels)?;
        Ok(loaded)
    }

    /// What objectives read of their point of the run.
    fn write_constants(&mut self, levels: &[NoiseLevels]) -> Result<()> {
        let size_ids = conditioning::size_ids(self.pipeline, self.sizes, self.sizes.batch);
        for (index, levels) in levels.iter().enumerate() {
            for (name, values) in levels.buffers(self.pipeline.config.scheduler.prediction) {
                self.write_own(index, name, Data::F64(&values))?;
            }
            self.write_own(index, objective::buffer::SIZE_IDS, Data::F32(&size_ids))?;
        }
        Ok(())
    }

    /// Fills a buffer of one objective's context if it is read.
    fn write_own(&mut self, index: usize, name: &str, data: Data<'_>) -> Result<()> {
        let name = format!("{name}{}", of_objective(index));
        if self.inputs.contains(&name) { self.executor.write(&name, data) } else { Ok(()) }
    }

    /// What it runs on: for an optimizer, and for single networks beside it.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.executor
    }

    /// Fills an input that an objective declares.
    pub fn write(&mut self, name: &str, data: Data<'_>) -> Result<()> {
        self.executor.write(name, data)
    }

    /// Encodes a prompt per sample and, for guidance, what the unconditional branch reads, and conditions the run on them.
    pub fn prompts(&mut self, prompts: &[&str], negatives: &[&str]) -> Result<()> {
        let unconditional = if self.schedule.needs.uncond { negatives } else { &[] };
        for (row, prompt) in unconditional.iter().chain(prompts).enumerate() {
            conditioning::encode(self.pipeline, self.executor, self.text, prompt)?;
            conditioning::copy(self.pipeline, self.executor, (ENCODED, 0), (BATCH, row))?;
        }
        conditioning::condition(self.pipeline, self.executor, self.condition, self.sizes, &self.schedule)
    }

    /// Conditions the run on what jobs ask for, one per sample, as [`crate::pipeline::generate`] does: without a negative prompt the
    /// unconditional branch of a model that wants it so reads zeros.
    pub fn jobs(&mut self, jobs: &[Job]) -> Result<()> {
        let mut texts = Vec::new();
        if self.schedule.needs.uncond {
            for job in jobs {
                let text = self.encode(job.negative.as_deref().unwrap_or_default())?;
                let zeros = job.negative.is_none() && self.pipeline.config.zero_empty_negative;
                let zeroed = || Text { context: vec![0.0; text.context.len()], pooled: vec![0.0; text.pooled.len()] };
                texts.push(if zeros { zeroed() } else { text });
            }
        }
        for job in jobs {
            texts.push(self.encode(&job.prompt)?);
        }
        self.texts(&texts)
    }

    /// Conditions the run on the text states of all rows, under guidance the unconditional ones first.
    pub fn texts(&mut self, texts: &[Text]) -> Result<()> {
        let Text { context, pooled } = conditioning::stacked(texts);
        self.condition(Data::F32(&context), Data::F32(&pooled))
    }

    /// The same from states as [`Entry::Context`] and [`Entry::Pooled`] are laid out; `pooled` is empty where the model has none.
    pub fn condition(&mut self, context: Data<'_>, pooled: Data<'_>) -> Result<()> {
        self.executor.write(buffer::CONTEXT, context)?;
        if self.pipeline.config.unet.added.is_some() {
            self.executor.write(buffer::POOLED, pooled)?;
        }
        conditioning::condition(self.pipeline, self.executor, self.condition, self.sizes, &self.schedule)
    }

    /// Conditions a branch, where there is it, on what buffers of a row per sample hold; without pooled states there, it keeps its own.
    pub fn condition_on_states(&mut self, branch: Branch, from: States<'_>) -> Result<()> {
        for (sample, row) in self.rows_of(branch).enumerate() {
            conditioning::copy(self.pipeline, self.executor, (from, sample), (BATCH, row))?;
        }
        conditioning::condition(self.pipeline, self.executor, self.condition, self.sizes, &self.schedule)
    }

    /// Copies the gradients to a branch's states, as [`Loaded::gradient`] left them, to buffers of a row per sample.
    pub fn copy_gradient(&mut self, branch: Branch, to: States<'_>) -> Result<()> {
        let names = [buffer::CONTEXT, buffer::POOLED].map(gradient_of);
        let pooled = self.entries.contains(&Entry::Pooled).then_some(names[1].as_str());
        let from = States { context: &names[0], pooled };
        for (sample, row) in self.rows_of(branch).enumerate() {
            conditioning::copy(self.pipeline, self.executor, (from, row), (to, sample))?;
        }
        Ok(())
    }

    /// The rows of a branch, under guidance the unconditional ones first.
    fn rows_of(&self, branch: Branch) -> Range<usize> {
        let (rows, batch) = (rows(self.sizes, &self.schedule), self.sizes.batch);
        match branch {
            Branch::Prompt => rows - batch..rows,
            Branch::Negative => 0..rows - batch,
        }
    }

    /// One prompt's text states.
    pub fn encode(&mut self, prompt: &str) -> Result<Text> {
        conditioning::encode(self.pipeline, self.executor, self.text, prompt)?;
        Ok(conditioning::read(self.pipeline, self.executor, ENCODED, 1, 0..1)?.swap_remove(0))
    }

    /// Steps of the run.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Those of [`Loaded::sample`].
    pub fn image_steps(&self) -> usize {
        self.images().len()
    }

    /// The plain run beside the run, where there is one, else the run.
    fn images(&self) -> Range<usize> {
        let all = self.schedule.steps.len();
        if all > self.steps { self.steps..all } else { 0..all }
    }

    /// Draws of noise that the sampler adds in a run.
    pub fn draws(&self) -> usize {
        if self.schedule.needs.noise { self.steps } else { 0 }
    }

    /// The starting noise, `[B, h, w, C]`, unit variance.
    pub fn set_noise(&mut self, noise: &[F]) -> Result<()> {
        self.executor.write(NOISE, F::data(noise))
    }

    /// Keeps the starting noise in the place of its gradient, which is lost; the next gradient is written there too.
    pub fn put_noise_aside(&mut self) -> Result<()> {
        self.executor.copy((NOISE, 0), (&gradient_of(NOISE), 0), self.latents_len())
    }

    /// Takes it back, bit for bit.
    pub fn take_noise_back(&mut self) -> Result<()> {
        self.executor.copy((&gradient_of(NOISE), 0), (NOISE, 0), self.latents_len())
    }

    /// The starting noise as it is now.
    pub fn noise(&self) -> Result<Vec<F>> {
        self.read(NOISE, self.latents_len())
    }

    /// The fresh noise of every step, for samplers that add it; for the others there is none.
    pub fn set_draws(&mut self, draws: &[Vec<F>]) -> Result<()> {
        let needed = self.draws();
        if draws.len() != needed {
            return Err(Error::Usage(format!("{} draws of noise, this sampler takes {needed}", draws.len())));
        }
        if needed == 0 { Ok(()) } else { self.executor.write(DRAWS, F::data(&draws.concat())) }
    }

    /// What the objectives' own noise is drawn by, a seed per sample and the number of the draw.
    pub fn set_seeds(&mut self, seeds: &[u64], draw: u64) -> Result<()> {
        let counters = sampler::counters(seeds, draw);
        (0..self.after.len())
            .try_for_each(|index| self.write_own(index, objective::buffer::COUNTER, Data::I32(&counters)))
    }

    /// Runs from the noise, without a backward: the losses per objective and sample.
    pub fn loss(&mut self) -> Result<Vec<Vec<F>>> {
        self.loss_observed(&mut || Ok(()))
    }

    /// [`Loaded::loss`] with a call after every step, which may end it by an error.
    pub fn loss_observed(&mut self, step: &mut dyn FnMut() -> Result<()>) -> Result<Vec<Vec<F>>> {
        self.executor.run(self.start)?;
        for done in 0..=self.steps {
            self.run_at(done, |loaded| &loaded.losses)?;
            if done < self.steps {
                self.write_step(done, "")?;
                self.executor.run(self.step)?;
                step()?;
            }
        }
        self.losses()
    }

    /// Final latents in [`LATENTS`], of a run from the noise as it is now: the plain one, where there is one beside the run. There are no
    /// losses of it. `step` is called after every step, and may end it by an error.
    pub fn sample(&mut self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let steps = self.images();
        if steps.start == 0 {
            self.executor.run(self.start)?;
        } else {
            let latents: Vec<F> = self.noise()?.into_iter().map(|x| x.scaled(self.image_scale)).collect();
            self.executor.write(LATENTS, F::data(&latents))?;
        }
        for index in steps {
            self.write_step(index, "")?;
            self.executor.run(self.step)?;
            step()?;
        }
        Ok(())
    }

    /// Runs from the noise and back: the losses. Gradients are then on the device, in the buffers [`gradient_of`] names.
    pub fn gradient(&mut self) -> Result<Vec<Vec<F>>> {
        self.gradient_observed(&mut || Ok(()))
    }

    /// [`Loaded::gradient`] with a call after every step forward and every step back, which may end it by an error. Where all steps are
    /// one program the calls come after it.
    pub fn gradient_observed(&mut self, step: &mut dyn FnMut() -> Result<()>) -> Result<Vec<Vec<F>>> {
        self.executor.run(self.start)?;
        match self.run {
            LoadedRun::Latents { clear, step_backward, .. } => {
                self.forward(step)?;
                self.executor.run(clear)?;
                self.backward(step_backward, step)?;
            }
            LoadedRun::Activations(whole, _) => {
                (0..self.steps).try_for_each(|index| self.write_step(index, &of_step(index)))?;
                self.executor.run(whole)?;
                (0..2 * self.steps).try_for_each(|_| step())?;
            }
        }
        let mut last = self.condition_backward.into_iter().chain(self.start_backward);
        last.try_for_each(|program| self.executor.run(program))?;
        self.losses()
    }

    /// The gradient of the sum of all losses to an entry that was asked for, as [`Loaded::gradient`] left it.
    pub fn read_gradient(&self, entry: Entry) -> Result<Vec<F>> {
        let config = &self.pipeline.config;
        let rows = rows(self.sizes, &self.schedule);
        let (name, len) = match entry {
            Entry::Latents => (NOISE, self.latents_len()),
            Entry::Context => (buffer::CONTEXT, rows * self.sizes.tokens * config.unet.context_width),
            Entry::Pooled => (buffer::POOLED, rows * pooled_width(self.pipeline)?.unwrap_or(0)),
            Entry::Tokens => return Err(Error::Usage("a run has no gradient to tokens".into())),
        };
        self.read(&gradient_of(name), len)
    }

    /// Everything by way of the host: runs from `noise` with `draws` and back, and reads all gradients.
    pub fn evaluate(&mut self, noise: &[F], draws: &[Vec<F>]) -> Result<Evaluation<F>> {
        self.set_draws(draws)?;
        self.set_noise(noise)?;
        let losses = self.gradient()?;
        let gradients = self.entries.iter().map(|entry| self.read_gradient(*entry)).collect::<Result<_>>()?;
        Ok(Evaluation { losses, gradients })
    }

    /// Writes the numbers of a step, and moves its noise where the step reads it.
    fn write_step(&mut self, index: usize, suffix: &str) -> Result<()> {
        let reads = |run: &LoadedRun, name: &str| match run {
            LoadedRun::Activations(_, inputs) if !suffix.is_empty() => inputs.contains(name),
            LoadedRun::Activations(..) | LoadedRun::Latents { .. } => true,
        };
        let step = [index as i32];
        let numbers = self.schedule.steps[index].buffers().map(|(name, values)| (name, Data::F64(values)));
        for (name, data) in std::iter::once((buffer::STEP, Data::I32(&step))).chain(numbers) {
            let name = format!("{name}{suffix}");
            if reads(&self.run, &name) {
                self.executor.write(&name, data)?;
            }
        }
        let noise = format!("{}{suffix}", sampler::NOISE);
        if self.schedule.needs.noise && reads(&self.run, &noise) {
            let len = self.latents_len();
            self.executor.copy((DRAWS, index * len), (&noise, 0), len)?;
        }
        Ok(())
    }

    /// Moves the state after `done` steps to where it is kept, or back.
    fn move_state(&mut self, done: usize, keep: bool) -> Result<()> {
        let (len, slots) = (self.latents_len(), 1 + self.schedule.needs.history);
        let names = std::iter::once(LATENTS).chain(HISTORY).take(slots);
        (done * slots..).zip(names).try_for_each(|(slot, name)| {
            let (state, kept) = ((name, 0), (STATES, slot * len));
            if keep { self.executor.copy(state, kept, len) } else { self.executor.copy(kept, state, len) }
        })
    }

    /// Unfilled slots of the history have coefficient 0.
    fn forward(&mut self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.move_state(0, true)?;
        for index in 0..self.steps {
            self.write_step(index, "")?;
            self.executor.run(self.step)?;
            self.move_state(index + 1, true)?;
            step()?;
        }
        Ok(())
    }

    fn backward(&mut self, step_backward: ProgramId, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        for done in (0..=self.steps).rev() {
            if self.after.contains(&done) {
                self.move_state(done, false)?;
                self.run_at(done, |loaded| match &loaded.run {
                    LoadedRun::Latents { objectives, .. } => objectives,
                    LoadedRun::Activations(..) => &[],
                })?;
            }
            if done > 0 {
                self.move_state(done - 1, false)?;
                self.write_step(done - 1, "")?;
                self.executor.run(step_backward)?;
                step()?;
            }
        }
        Ok(())
    }

    /// Runs the programs, one per objective, of the objectives after `done` steps.
    fn run_at(&mut self, done: usize, programs: impl Fn(&Self) -> &[ProgramId]) -> Result<()> {
        for index in (0..self.after.len()).filter(|index| self.after[*index] == done).collect::<Vec<_>>() {
            let program = programs(self).get(index).copied();
            program.map_or(Ok(()), |program| self.executor.run(program))?;
        }
        Ok(())
    }

    fn losses(&self) -> Result<Vec<Vec<F>>> {
        (0..self.after.len()).map(|index| self.read(&loss_name(index), self.sizes.batch)).collect()
    }

    fn latents_len(&self) -> usize {
        let Sizes { batch, height, width, .. } = self.sizes;
        batch * height * width * self.pipeline.config.unet.in_channels
    }

    fn read(&self, name: &str, len: usize) -> Result<Vec<F>> {
        let mut values = vec![F::default(); len];
        self.executor.read(name, F::data_mut(&mut values))?;
        Ok(values)
    }
}
