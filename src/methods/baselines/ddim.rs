//! Plain sampling, with DDIM (Song et al. 2021) or whichever sampler the settings name.

use crate::Result;
use crate::exec::Executor;
use crate::methods::sampling_loop::SamplingLoop;
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Generator;

/// As images of plain sampling record it.
pub(super) const NAME: &str = "generate";

#[derive(Clone, Copy, Debug, Default)]
pub struct Ddim;

impl ImageMethod for Ddim {
    fn name(&self) -> &'static str {
        NAME
    }

    fn title(&self) -> String {
        "DDIM".into()
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        let generator = Generator::plan(pipeline, executor, request.settings.clone(), request.batch)?;
        Ok(Box::new(SamplingLoop::new(generator, |images, jobs, observe| images.run(jobs, observe))))
    }
}
