//! Methods: the loops. Each file reads like the algorithm it runs; everything it runs is a planned program.
//!
//! A method has three stages: [`ImageMethod`] is its settings, [`PlannedMethod`] its programs before anything is allocated,
//! [`LoadedMethod`] weights and programs on an executor. The command line knows a method by nothing else.

pub mod baselines;
pub mod minority;
pub mod sampling_loop;
pub mod seedselect;

use crate::data::textual_inversion::LearnedToken;
use crate::exec::Executor;
use crate::optimize::objective::Nfe;
use crate::pipeline::generate::{self, Image, Job};
use crate::pipeline::{Observer, Pipeline, Progress};
use crate::plan::{Footprint, Planned};
use crate::{Error, Result};
use serde_json::Value;

/// What a method is planned for.
pub struct Request<'a> {
    pub settings: &'a generate::Settings,
    /// Images of one batch.
    pub batch: usize,
    /// The prompt of every image that will be made, in the order of the batches; whole batches. A batch with the prompts of the one
    /// before may be left out.
    pub prompts: &'a [&'a str],
    /// Bytes; where the fastest way would not fit, a method may choose one that computes more again.
    pub memory: Option<usize>,
}

/// A way to make images from prompts.
pub trait ImageMethod {
    /// As images record it.
    fn name(&self) -> &'static str;

    /// As sheets and tables label it.
    fn title(&self) -> String;

    /// Everything of the method that decides the pixels, as images record it.
    fn options(&self) -> Value {
        Value::Null
    }

    /// The same of the image of a seed, where images differ in it.
    fn options_of(&self, _seed: u64) -> Value {
        self.options()
    }

    /// Tokens of the prompt that the method takes for itself.
    fn reserved_tokens(&self) -> usize {
        0
    }

    /// The negative prompt of its images where the user gave `given`.
    fn negative<'a>(&'a self, given: Option<&'a str>) -> Option<&'a str> {
        given
    }

    /// `Error::Usage` where it cannot make a batch of so many images.
    fn check(&self, _batch: usize) -> Result<()> {
        Ok(())
    }

    /// What the user may not expect: options that change nothing with these settings.
    fn remarks(&self, _settings: &generate::Settings) -> Vec<String> {
        vec![]
    }

    /// Plans every program that batches of these prompts need.
    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>>;
}

/// A method's programs, planned but not loaded.
pub trait PlannedMethod {
    fn programs(&self) -> Vec<&Planned>;

    fn footprint(&self) -> Footprint {
        Footprint::of(&self.programs())
    }

    /// Steps and iterations of one batch: how often [`Progress::Step`] and [`Progress::Iteration`] come.
    fn progress_units(&self) -> usize;

    /// UNet calls of one batch, each on one image's latents.
    fn nfe(&self) -> Nfe;

    /// Steps and iterations that are done once for all batches of the request, beside those of each.
    fn shared_units(&self) -> usize {
        0
    }

    /// UNet calls that are made once for all batches of the request, beside those of each.
    fn shared_nfe(&self) -> Nfe {
        Nfe::default()
    }

    /// Loads weights and programs; after it nothing is planned or loaded.
    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e;
}

/// A method on an executor.
pub trait LoadedMethod {
    /// Makes one full batch of images. Where some are not finite it is an error, but `observe` has seen the others.
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>>;

    fn executor(&mut self) -> &mut dyn Executor;

    /// [`LoadedMethod::run`]; of what is not finite the error names the op where that begins.
    fn run_checked(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        self.run(jobs, observe).map_err(|error| self.locate(error, jobs, observe))
    }

    /// The error of a run of these jobs; where something was not finite, they are made once more with a check of every op, for the
    /// error to name the first that goes wrong.
    fn locate(&mut self, error: Error, jobs: &[Job], observe: &mut Observer<'_>) -> Error {
        if !matches!(error, Error::NotFinite(_)) {
            return error;
        }
        self.executor().set_check_finite(true);
        let again = self.run(jobs, &mut |_| observe(Progress::Again));
        self.executor().set_check_finite(false);
        again.err().unwrap_or(error)
    }

    /// What the image of job `index` of the last batch was chosen by, where there was a choice.
    fn chosen(&self, _index: usize) -> Option<Chosen> {
        None
    }

    /// The optimised starting noise of job `index` of the last batch, `[C, H/f, W/f]`, unit variance.
    fn noise(&self, _index: usize) -> Option<Vec<f32>> {
        None
    }

    /// The token learned for job `index` of the last batch.
    fn learned(&self, _index: usize, _word: &str) -> Result<LearnedToken> {
        Err(Error::Usage("this method learns no token; leave --save-token out".into()))
    }
}

/// An image that was chosen among several.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen {
    /// Which candidate, from 0.
    pub candidate: usize,
    /// The seed that makes it alone, where it has one.
    pub seed: Option<u64>,
    pub score: f64,
}
