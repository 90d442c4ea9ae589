//! Null-prompting (Um & Ye 2025): plain sampling away from a negative prompt that describes the typical image.

use super::ddim;
use crate::Result;
use crate::exec::Executor;
use crate::methods::sampling_loop::SamplingLoop;
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{Generator, Job};

/// The typical image in words. The paper does not print its words; these are ours.
pub const TYPICAL: &str = "a typical, ordinary image";

/// The same for the embedded model, in words it was trained on.
pub const TYPICAL_SHAPE: &str = "a picture of a medium flat plain shape in the center on a flat white background";

#[derive(Clone, Debug)]
pub struct NullPrompt {
    /// What takes the place of every image's negative prompt.
    pub negative: String,
}

impl ImageMethod for NullPrompt {
    /// Plain sampling with `--negative` makes the same images.
    fn name(&self) -> &'static str {
        ddim::NAME
    }

    fn title(&self) -> String {
        "null-prompted".into()
    }

    fn negative<'a>(&'a self, _given: Option<&'a str>) -> Option<&'a str> {
        Some(&self.negative)
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        let generator = Generator::plan(pipeline, executor, request.settings.clone(), request.batch)?;
        let negative = self.negative.clone();
        Ok(Box::new(SamplingLoop::new(generator, move |images, jobs, observe| {
            let jobs: Vec<Job> =
                jobs.iter().map(|job| Job { negative: Some(negative.clone()), ..job.clone() }).collect();
            images.run(&jobs, observe)
        })))
    }
}
