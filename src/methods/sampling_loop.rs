//! Methods that need no programs but those of plain sampling: a loop over its steps is all there is to write.

use super::{LoadedMethod, PlannedMethod};
use crate::Result;
use crate::exec::Executor;
use crate::optimize::objective::Nfe;
use crate::pipeline::Observer;
use crate::pipeline::generate::{self, Generator, Image, Job};
use crate::plan::Planned;

/// The programs of plain sampling, planned (`G` a [`Generator`]) or loaded (`G` a [`generate::Loaded`]), and the loop over them.
pub struct SamplingLoop<G, F> {
    images: G,
    run: F,
}

impl<'p, F> SamplingLoop<Generator<'p>, F>
where
    F: FnMut(&mut generate::Loaded<'_, '_>, &[Job], &mut Observer<'_>) -> Result<Vec<Image>>,
{
    /// `run` makes one full batch of images, every sampling step once.
    pub fn new(images: Generator<'p>, run: F) -> Self {
        SamplingLoop { images, run }
    }
}

impl<F> PlannedMethod for SamplingLoop<Generator<'_>, F>
where
    F: FnMut(&mut generate::Loaded<'_, '_>, &[Job], &mut Observer<'_>) -> Result<Vec<Image>>,
{
    fn programs(&self) -> Vec<&Planned> {
        self.images.programs().all().to_vec()
    }

    fn progress_units(&self) -> usize {
        self.images.calls()
    }

    fn nfe(&self) -> Nfe {
        Nfe { forward: self.images.nfe(), backward: 0 }
    }

    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e,
    {
        Ok(Box::new(SamplingLoop { images: self.images.load(executor)?, run: self.run }))
    }
}

impl<F> LoadedMethod for SamplingLoop<generate::Loaded<'_, '_>, F>
where
    F: FnMut(&mut generate::Loaded<'_, '_>, &[Job], &mut Observer<'_>) -> Result<Vec<Image>>,
{
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        (self.run)(&mut self.images, jobs, observe)
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self.images.executor()
    }
}
