//! Prompts to what every sampling step reads. States are encoded once, stay on the device, and can be set anew before any step, so that
//! a run may follow a schedule of prompts.

use super::Pipeline;
use super::job::Job;
use super::programs::{Sizes, buffer, pooled_width, rows};
use crate::Result;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::sampler::Schedule;
use std::collections::HashMap;
use std::ops::Range;

/// The branches of classifier-free guidance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Branch {
    Prompt,
    Negative,
}

/// What a row of the batch is conditioned on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Prompt(String),
    /// SDXL's unconditional branch without a negative prompt.
    Zeros,
}

/// A prompt's states on the host: context `[T, D]`, and for SDXL the pooled projection `[P]` (else
/// empty).
#[derive(Clone, Debug)]
pub struct Text {
    pub context: Vec<f32>,
    pub pooled: Vec<f32>,
}

/// Buffers of text states, a row per prompt.
#[derive(Clone, Copy)]
pub struct States<'a> {
    pub context: &'a str,
    /// Read by SDXL's UNets alone.
    pub pooled: Option<&'a str>,
}

/// What the program `text` makes: one row.
pub(crate) const ENCODED: States<'_> = States { context: buffer::TEXT_CONTEXT, pooled: Some(buffer::TEXT_POOLED) };
/// What the program `condition` reads: all rows of the batch.
pub(crate) const BATCH: States<'_> = States { context: buffer::CONTEXT, pooled: Some(buffer::POOLED) };

/// Numbers of a row: context, and pooled text where the UNet takes it.
fn widths(pipeline: &Pipeline) -> Result<(usize, Option<usize>)> {
    Ok((pipeline.tokens() * pipeline.config.unet.context_width, pooled_width(pipeline)?))
}

/// Copies one row on the device; the pooled text where both sides have one.
pub(crate) fn copy(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    (from, from_row): (States<'_>, usize),
    (to, to_row): (States<'_>, usize),
) -> Result<()> {
    let (context, pooled) = widths(pipeline)?;
    executor.copy((from.context, from_row * context), (to.context, to_row * context), context)?;
    match (pooled, from.pooled, to.pooled) {
        (Some(width), Some(from), Some(to)) => executor.copy((from, from_row * width), (to, to_row * width), width),
        (_, _, _) => Ok(()),
    }
}

/// Reads rows to the host.
pub(crate) fn read(
    pipeline: &Pipeline,
    executor: &dyn Executor,
    states: States<'_>,
    total: usize,
    rows: Range<usize>,
) -> Result<Vec<Text>> {
    let (width, pooled_width) = widths(pipeline)?;
    let (mut context, mut pooled) = (vec![0.0; total * width], vec![0.0; total * pooled_width.unwrap_or(0)]);
    executor.read(states.context, DataMut::F32(&mut context))?;
    if let (Some(_), Some(name)) = (pooled_width, states.pooled) {
        executor.read(name, DataMut::F32(&mut pooled))?;
    }
    let own =
        |values: &[f32], row: usize| values[row * values.len() / total..(row + 1) * values.len() / total].to_vec();
    Ok(rows.map(|row| Text { context: own(&context, row), pooled: own(&pooled, row) }).collect())
}

/// Puts one prompt's states where the program `text` leaves them.
pub(crate) fn write(pipeline: &Pipeline, executor: &mut dyn Executor, text: &Text) -> Result<()> {
    executor.write(buffer::TEXT_CONTEXT, Data::F32(&text.context))?;
    match widths(pipeline)?.1 {
        Some(_) => executor.write(buffer::TEXT_POOLED, Data::F32(&text.pooled)),
        None => Ok(()),
    }
}

/// Zeros in that place.
pub(crate) fn write_zeros(pipeline: &Pipeline, executor: &mut dyn Executor) -> Result<()> {
    let (context, pooled) = widths(pipeline)?;
    let zeros = Text { context: vec![0.0; context], pooled: vec![0.0; pooled.unwrap_or(0)] };
    write(pipeline, executor, &zeros)
}

/// Encodes one prompt by the loaded program `text`; its states are then in [`ENCODED`].
pub(crate) fn encode(pipeline: &Pipeline, executor: &mut dyn Executor, program: ProgramId, prompt: &str) -> Result<()> {
    let encoded = pipeline.tokenize(prompt)?;
    for (name, tokens) in buffer::IDS.iter().zip(&encoded) {
        executor.write(name, Data::I32(&tokens.ids))?;
    }
    if let Some(tokens) = encoded.get(1) {
        executor.write(buffer::EOS, Data::I32(&[tokens.eos as i32]))?;
    }
    if !pipeline.learned.is_empty() {
        for (tower, name) in buffer::LEARNED.iter().take(encoded.len()).enumerate() {
            let rows: Vec<f32> = pipeline.learned.iter().flat_map(|token| &token.embeddings[tower]).copied().collect();
            executor.write(name, Data::F32(&rows))?;
        }
    }
    executor.run(program)
}

/// The states of all rows side by side: context `[R, T, D]` and pooled `[R, P]`.
pub(crate) fn stacked(texts: &[Text]) -> Text {
    let all = |part: fn(&Text) -> &[f32]| texts.iter().flat_map(part).copied().collect();
    Text { context: all(|text| &text.context), pooled: all(|text| &text.pooled) }
}

/// SDXL's size numbers of images that are neither cropped nor scaled, `[rows, 6]` (see [`crate::models::unet::Added`]).
pub(crate) fn size_ids(pipeline: &Pipeline, sizes: Sizes, rows: usize) -> Vec<f32> {
    let factor = pipeline.config.vae.factor();
    let (height, width) = ((sizes.height * factor) as f32, (sizes.width * factor) as f32);
    [height, width, 0.0, 0.0, height, width].repeat(rows)
}

/// Computes what all steps share by the loaded program `condition`, from the states in [`BATCH`].
pub(crate) fn condition(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    program: ProgramId,
    sizes: Sizes,
    schedule: &Schedule,
) -> Result<()> {
    if pipeline.config.unet.added.is_some() {
        let size_ids = size_ids(pipeline, sizes, rows(sizes, schedule));
        executor.write(buffer::SIZE_IDS, Data::F32(&size_ids))?;
    }
    let timesteps: Vec<f64> = schedule.steps.iter().map(|step| step.timestep).collect();
    executor.write(buffer::TIMESTEPS, Data::F64(&timesteps))?;
    executor.run(program)
}

/// The rows of a batch: what each is conditioned on, and which states the device holds already.
pub struct Conditioning<'p> {
    pipeline: &'p Pipeline,
    sizes: Sizes,
    text: ProgramId,
    condition: ProgramId,
    /// Prompts that are not encoded, with their states.
    given: HashMap<String, Text>,
    /// What is asked for per row, under guidance the unconditional ones first.
    requested: Vec<Condition>,
    /// Of which conditions the rows hold the states; `None`: of none.
    cached: Vec<Option<Condition>>,
}

impl<'p> Conditioning<'p> {
    pub(crate) fn new(pipeline: &'p Pipeline, sizes: Sizes, text: ProgramId, condition: ProgramId) -> Conditioning<'p> {
        Conditioning { pipeline, sizes, text, condition, given: HashMap::new(), requested: vec![], cached: vec![] }
    }

    /// Gives the states of a prompt, which is then not encoded: embeddings that come from elsewhere.
    pub fn give(&mut self, prompt: &str, text: Text) {
        let same = Some(Condition::Prompt(prompt.to_string()));
        self.cached.iter_mut().filter(|cached| **cached == same).for_each(|cached| *cached = None);
        self.given.insert(prompt.to_string(), text);
    }

    /// What a branch of an image is conditioned on by its job.
    fn of(&self, branch: Branch, job: &Job) -> Condition {
        match (branch, &job.negative) {
            (Branch::Prompt, _) => Condition::Prompt(job.prompt.clone()),
            (Branch::Negative, None) if self.pipeline.config.zero_empty_negative => Condition::Zeros,
            (Branch::Negative, negative) => Condition::Prompt(negative.clone().unwrap_or_default()),
        }
    }

    /// What the jobs ask for, from [`Conditioning::restore`] on.
    pub(crate) fn request(&mut self, schedule: &Schedule, jobs: &[Job]) {
        let negatives = if schedule.needs.uncond { jobs } else { &[] };
        let negatives = negatives.iter().map(|job| self.of(Branch::Negative, job));
        self.requested = negatives.chain(jobs.iter().map(|job| self.of(Branch::Prompt, job))).collect();
        self.cached.resize(self.requested.len(), None);
    }

    /// The rows of a branch; none where the unconditional one is left out.
    fn rows(&self, branch: Branch) -> Range<usize> {
        let prompts = self.requested.len() - self.sizes.batch;
        match branch {
            Branch::Prompt => prompts..self.requested.len(),
            Branch::Negative => 0..prompts,
        }
    }

    /// Puts the states a job asks for in a branch into row `row` of other buffers.
    pub(crate) fn fetch_for(
        &self,
        executor: &mut dyn Executor,
        branch: Branch,
        job: &Job,
        to: (States<'_>, usize),
    ) -> Result<()> {
        self.fetch(executor, &self.of(branch, job), to)
    }

    /// The same from whichever row of the batch holds it already, else encoded anew.
    fn fetch(&self, executor: &mut dyn Executor, condition: &Condition, to: (States<'_>, usize)) -> Result<()> {
        if let Some(from) = self.cached.iter().position(|cached| cached.as_ref() == Some(condition)) {
            return copy(self.pipeline, executor, (BATCH, from), to);
        }
        match condition {
            Condition::Zeros => write_zeros(self.pipeline, executor)?,
            Condition::Prompt(prompt) => match self.given.get(prompt) {
                Some(given) => write(self.pipeline, executor, given)?,
                None => encode(self.pipeline, executor, self.text, prompt)?,
            },
        }
        copy(self.pipeline, executor, (ENCODED, 0), to)
    }

    /// Gives all rows what was requested.
    pub(crate) fn restore(&mut self, executor: &mut dyn Executor, schedule: &Schedule) -> Result<()> {
        for row in 0..self.requested.len() {
            let requested = self.requested[row].clone();
            if self.cached[row].as_ref() != Some(&requested) {
                self.cached[row] = None;
                self.fetch(executor, &requested, (BATCH, row))?;
                self.cached[row] = Some(requested);
            }
        }
        self.update(executor, schedule)
    }

    /// States of a branch, per image, on the host.
    pub(crate) fn texts(&self, executor: &dyn Executor, branch: Branch) -> Result<Vec<Text>> {
        read(self.pipeline, executor, BATCH, self.requested.len(), self.rows(branch))
    }

    /// Gives a branch, where there is it, other states from the next [`Conditioning::update`] on.
    pub(crate) fn set(&mut self, executor: &mut dyn Executor, branch: Branch, texts: &[Text]) -> Result<()> {
        for (row, text) in self.rows(branch).zip(texts) {
            self.cached[row] = None;
            write(self.pipeline, executor, text)?;
            copy(self.pipeline, executor, (ENCODED, 0), (BATCH, row))?;
        }
        Ok(())
    }

    /// The same from buffers of a row per image; without pooled states there, the branch keeps its own.
    pub(crate) fn set_states(&mut self, executor: &mut dyn Executor, branch: Branch, from: States<'_>) -> Result<()> {
        for (image, row) in self.rows(branch).enumerate() {
            self.cached[row] = None;
            copy(self.pipeline, executor, (from, image), (BATCH, row))?;
        }
        Ok(())
    }

    /// Computes what the steps read from the states of all rows.
    pub(crate) fn update(&self, executor: &mut dyn Executor, schedule: &Schedule) -> Result<()> {
        condition(self.pipeline, executor, self.condition, self.sizes, schedule)
    }
}
