//! What images are worth by a network that is not in the loss: whether they get better, or the CLIP of the loss has been fooled.

use super::cache::ReferenceCache;
use super::options::Convention;
use super::references::{Encoders, References, Wanted, tower};
use crate::exec::{Data, Executor};
use crate::metrics::shapes::World;
use crate::optimize::chain::Term;
use crate::optimize::objective::references::{Tower, View, buffer, semantics};
use crate::optimize::objective::reward;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{self, Job};
use crate::plan::Planned;
use crate::rewards::{Attributes, Reward};
use crate::weights::Component;
use crate::{Error, Result};

/// A judge of the image of every iteration; the higher its score the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldOut {
    /// Cosine to the mean of the references, in the features of the model's [`Component::HeldOutClip`].
    Clip,
    /// Probability that the image shows all that its prompt states, by the model's [`Component::Reader`] of the `shapes` world.
    Shapes,
}

impl HeldOut {
    /// The score that the loss of its term stands for.
    pub(super) fn score(self, loss: f64) -> f64 {
        match self {
            HeldOut::Clip => 1.0 - loss,
            HeldOut::Shapes => (-loss).exp(),
        }
    }

    pub(super) fn plan(
        self,
        pipeline: &Pipeline,
        executor: &dyn Executor,
        images: &generate::Settings,
    ) -> Result<PlannedHeldOut> {
        let size = [images.width, images.height];
        match self {
            HeldOut::Clip => {
                let tower = tower(pipeline, Component::HeldOutClip, View::WHOLE)?;
                let wanted = Wanted { tower: Some(&tower), ..Wanted::default() };
                let encoders = Encoders::plan(pipeline, executor, images.dtype, wanted, (Convention::Default, size))?;
                Ok(PlannedHeldOut::Clip { tower, encoders: Box::new(encoders) })
            }
            HeldOut::Shapes => {
                let world = World::embedded()?;
                if size != [world.image_size; 2] {
                    let (side, [width, height]) = (world.image_size, size);
                    let what =
                        format!("the reader of the `shapes` world takes {side}x{side} images, not {width}x{height}");
                    return Err(Error::Usage(what));
                }
                let parse = move |prompt: &str| {
                    let not_stated =
                        |why| Error::Usage(format!("'{prompt}' is no caption of the `shapes` world: {why}"));
                    world.parse(prompt).map_err(not_stated)
                };
                Ok(PlannedHeldOut::Shapes(Attributes::new(&pipeline.model, parse)?))
            }
        }
    }
}

pub(super) enum PlannedHeldOut {
    Clip { tower: Tower, encoders: Box<Encoders> },
    Shapes(Attributes),
}

impl PlannedHeldOut {
    pub fn kind(&self) -> HeldOut {
        match self {
            PlannedHeldOut::Clip { .. } => HeldOut::Clip,
            PlannedHeldOut::Shapes(_) => HeldOut::Shapes,
        }
    }

    /// Of the final image, beside the terms of the loss.
    pub fn term(&self) -> Term<'_> {
        let objective = match self {
            PlannedHeldOut::Clip { tower, .. } => semantics(tower, 0.0, 1.0),
            PlannedHeldOut::Shapes(attributes) => reward(attributes),
        };
        Term::at_end(objective).watched()
    }

    /// Besides that term's.
    pub fn programs(&self) -> Vec<&Planned> {
        match self {
            PlannedHeldOut::Clip { encoders, .. } => encoders.programs(),
            PlannedHeldOut::Shapes(_) => vec![],
        }
    }

    pub fn load(
        self,
        pipeline: &Pipeline,
        executor: &mut dyn Executor,
        references: &References,
        cache: Option<&dyn ReferenceCache>,
    ) -> Result<LoadedHeldOut> {
        Ok(match self {
            PlannedHeldOut::Clip { encoders, .. } => {
                LoadedHeldOut::Clip(encoders.load(pipeline, cache)?.centroid(executor, references)?)
            }
            PlannedHeldOut::Shapes(attributes) => LoadedHeldOut::Shapes(attributes),
        })
    }
}

pub(super) enum LoadedHeldOut {
    /// With the centroid of the references.
    Clip(Vec<f32>),
    Shapes(Attributes),
}

impl LoadedHeldOut {
    /// Writes what the term reads; the programs are loaded.
    pub fn write(&self, executor: &mut dyn Executor, jobs: &[Job]) -> Result<()> {
        match self {
            LoadedHeldOut::Clip(centroid) => {
                executor.write(buffer::HELD_OUT_CENTROID, Data::F32(&centroid.repeat(jobs.len())))
            }
            LoadedHeldOut::Shapes(attributes) => {
                let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
                attributes.write(executor, &prompts)
            }
        }
    }
}
