//! The loss of SeedSelect at the end of a run as what gradient-free searches choose by.

use super::options::{Convention, Options};
use super::programs::seen;
use super::prompt::{LoadedPrompt, Prompt};
use super::references::{Encoders, References, Targets, Wanted, tower};
use crate::exec::{DataMut, Executor};
use crate::methods::baselines::judge::{Criterion, Judge, PlannedJudge};
use crate::optimize::objective::references::{appearance, semantics};
use crate::optimize::objective::{self, Objective, ObjectiveSpec, Objectives, report_name};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::plan::Planned;
use crate::weights::Component;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::sync::Arc;

/// Minus the distance of the final image to references, `semantics · (1 − cos) + appearance · mean square`.
#[derive(Clone)]
pub struct Likeness {
    pub references: Arc<References>,
    /// Whose loss: its weights, and what the CLIP is shown.
    pub options: Options,
    /// Of what is drawn for references.
    pub seed: u64,
}

impl Likeness {
    /// By the loss of SeedSelect's defaults.
    pub fn new(references: Arc<References>, seed: u64) -> Likeness {
        Likeness { references, options: Options::DEFAULT, seed }
    }
}

impl Criterion for Likeness {
    fn record(&self) -> Value {
        let Options { semantics, appearance, prompt, views, .. } = self.options;
        json!({
            "references": self.references.fingerprint(), "semantics": semantics, "appearance": appearance, "prompt": prompt,
            "views": views.len()
        })
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        generator: &Generator<'p>,
        settings: &generate::Settings,
    ) -> Result<Box<dyn PlannedJudge + 'p>> {
        let convention = Convention::Default;
        let options = &self.options;
        let tower = (options.semantics != 0.0).then(|| tower(pipeline, Component::Clip, options.views)).transpose()?;
        let reads_prompt = tower.is_some() && options.prompt != 0.0;
        let prompt = || Prompt::plan(pipeline, executor, settings.dtype, generator.sizes().batch);
        let seen = tower.clone().map(|tower| seen(tower, convention));
        let semantics = |tower| semantics(tower, options.prompt, options.semantics);
        let mut terms: Vec<Objective<'_>> = seen.iter().map(semantics).collect();
        terms.extend((options.appearance != 0.0).then(|| appearance(options.appearance)));
        let spec = ObjectiveSpec {
            pipeline,
            dtype: settings.dtype,
            sizes: generator.sizes(),
            guidance: settings.sampler.guidance,
            variable: None,
            prefix: 0,
            loss_scale: 1.0,
            budget: None,
        };
        let wanted = Wanted { tower: tower.as_ref(), latents: options.appearance != 0.0, means: false };
        let frame = (convention, [settings.width, settings.height]);
        Ok(Box::new(PlannedLikeness {
            pipeline,
            terms: terms.len(),
            prompt: reads_prompt.then(prompt).transpose()?,
            objectives: Objectives::plan(&spec, executor, &terms)?,
            encoders: Encoders::plan(pipeline, executor, settings.dtype, wanted, frame)?,
            likeness: self.clone(),
        }))
    }
}

struct PlannedLikeness<'p> {
    pipeline: &'p Pipeline,
    prompt: Option<Prompt>,
    objectives: Objectives,
    terms: usize,
    encoders: Encoders,
    likeness: Likeness,
}

impl PlannedJudge for PlannedLikeness<'_> {
    fn programs(&self) -> Vec<&Planned> {
        let mut all = self.objectives.all();
        all.extend(self.encoders.programs());
        all.extend(self.prompt.iter().map(Prompt::program));
        all
    }

    fn forwards(&self) -> usize {
        0
    }

    fn load(self: Box<Self>, images: &mut generate::Loaded<'_, '_>) -> Result<Box<dyn Judge>> {
        let Likeness { references, seed, .. } = &self.likeness;
        let mut encoders = self.encoders.load(self.pipeline, None)?;
        let targets = encoders.targets(images.executor(), references, *seed)?;
        let objectives = self.objectives.load(images.executor(), &self.pipeline.model)?;
        let prompt = self.prompt.map(|prompt| prompt.load(self.pipeline, images.executor())).transpose()?;
        Ok(Box::new(LoadedLikeness { prompt, objectives, terms: self.terms, targets }))
    }
}

struct LoadedLikeness {
    prompt: Option<LoadedPrompt>,
    objectives: objective::Loaded,
    terms: usize,
    targets: Targets,
}

impl Judge for LoadedLikeness {
    fn forwards(&self) -> usize {
        0
    }

    fn score(&mut self, images: &mut generate::Loaded<'_, '_>, jobs: &[Job], _made: &[Image]) -> Result<Vec<f64>> {
        Targets::write(&vec![&self.targets; jobs.len()], images.executor())?;
        self.prompt.iter().try_for_each(|prompt| prompt.write(images.executor(), jobs))?;
        let (mut scores, mut losses) = (vec![0.0; jobs.len()], vec![0.0; jobs.len()]);
        for term in 0..self.terms {
            self.objectives.run(images, term, &vec![0; jobs.len()], 0)?;
            images.executor().read(&report_name(term), DataMut::F64(&mut losses))?;
            scores.iter_mut().zip(&losses).for_each(|(score, loss)| *score -= loss);
        }
        match scores.iter().all(|score| score.is_finite()) {
            true => Ok(scores),
            false => Err(Error::NotFinite("the distance to the reference images".into())),
        }
    }
}
