//! The loss of SeedSelect at the end of a run as what gradient-free searches choose by.

use super::options::{Convention, Options};
use super::programs::seen;
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
    pub semantics: f64,
    pub appearance: f64,
    /// Of what is drawn for references.
    pub seed: u64,
}

impl Likeness {
    /// With the weights of SeedSelect's loss.
    pub fn new(references: Arc<References>, seed: u64) -> Likeness {
        let Options { semantics, appearance, .. } = Options::DEFAULT;
        Likeness { references, semantics, appearance, seed }
    }
}

impl Criterion for Likeness {
    fn record(&self) -> Value {
        let Likeness { references, semantics, appearance, .. } = self;
        json!({"references": references.fingerprint(), "semantics": semantics, "appearance": appearance})
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        generator: &Generator<'p>,
        settings: &generate::Settings,
    ) -> Result<Box<dyn PlannedJudge + 'p>> {
        let convention = Convention::Default;
        let tower = (self.semantics != 0.0).then(|| tower(pipeline, Component::Clip)).transpose()?;
        let seen = tower.clone().map(|tower| seen(tower, convention));
        let mut terms: Vec<Objective<'_>> = seen.iter().map(|tower| semantics(tower, self.semantics)).collect();
        terms.extend((self.appearance != 0.0).then(|| appearance(self.appearance)));
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
        let wanted = Wanted { tower: tower.as_ref(), latents: self.appearance != 0.0, means: false };
        let frame = (convention, [settings.width, settings.height]);
        Ok(Box::new(PlannedLikeness {
            pipeline,
            terms: terms.len(),
            objectives: Objectives::plan(&spec, executor, &terms)?,
            encoders: Encoders::plan(pipeline, executor, settings.dtype, wanted, frame)?,
            likeness: self.clone(),
        }))
    }
}

struct PlannedLikeness<'p> {
    pipeline: &'p Pipeline,
    objectives: Objectives,
    terms: usize,
    encoders: Encoders,
    likeness: Likeness,
}

impl PlannedJudge for PlannedLikeness<'_> {
    fn programs(&self) -> Vec<&Planned> {
        let mut all = self.objectives.all();
        all.extend(self.encoders.programs());
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
        Ok(Box::new(LoadedLikeness { objectives, terms: self.terms, targets }))
    }
}

struct LoadedLikeness {
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
