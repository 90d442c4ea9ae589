//! SeedSelect as an [`ImageMethod`].

use super::Loaded;
use super::checkpoint::Checkpoints;
use super::options::Options;
use super::programs::{Programs, Spec};
use super::references::References;
use super::start::Start;
use super::subset::subset;
use super::watch::Watch;
use crate::exec::Executor;
use crate::methods::{ImageMethod, LoadedMethod, PlannedMethod, Request};
use crate::optimize::objective::Nfe;
use crate::pipeline::generate::{self, Image, Job, to_channels_first};
use crate::pipeline::{Observer, Pipeline};
use crate::plan::Planned;
use crate::program::DType;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::sync::Arc;

/// The method with all its options.
#[derive(Clone)]
pub struct SeedSelect {
    pub options: Options,
    pub references: Arc<References>,
    /// Of other classes, a set each; for the contrast.
    pub others: Vec<Arc<References>>,
    /// Seed of what is drawn for references.
    pub seed: u64,
    /// Report every iteration.
    pub trace: bool,
    /// Where runs are kept between iterations.
    pub checkpoints: Option<Arc<dyn Checkpoints>>,
    pub watch: Watch,
}

impl SeedSelect {
    /// Without other classes, and with nothing kept or looked at but the images.
    pub fn new(options: Options, references: Arc<References>, seed: u64) -> SeedSelect {
        SeedSelect {
            options,
            references,
            others: vec![],
            seed,
            trace: false,
            checkpoints: None,
            watch: Watch::default(),
        }
    }
}

impl ImageMethod for SeedSelect {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn title(&self) -> String {
        match self.options.start {
            Start::Noise => "SeedSelect".into(),
            Start::Nao => "SeedSelect from NAO".into(),
            Start::Lol => "SeedSelect from LOL".into(),
        }
    }

    fn options(&self) -> Value {
        let mut options = self.options.record();
        options["references"] = json!(self.references.fingerprint());
        if self.options.contrast != 0.0 {
            let others: Vec<String> = self.others.iter().map(|other| other.fingerprint()).collect();
            options["contrast"]["others"] = json!(others);
        }
        if let Some(iterations) = self.options.bootstrap {
            options["bootstrap"] = json!({"iterations": iterations, "seed": self.seed});
        }
        options
    }

    fn options_of(&self, seed: u64) -> Value {
        let mut options = self.options();
        if self.options.bootstrap.is_some() {
            let names = &self.references.names;
            let subset = subset(seed, names.len());
            options["bootstrap"]["subset"] = subset.into_iter().map(|index| names[index].as_str()).collect();
        }
        options
    }

    fn check(&self, batch: usize) -> Result<()> {
        if self.references.pictures.is_empty() {
            return Err(Error::Usage("no reference images; name a folder of PNG, JPEG or WebP".into()));
        }
        if self.options.start != Start::Noise && self.references.pictures.len() < 2 {
            let what = "a start among inverted references takes two at least, and one is given";
            return Err(Error::Usage(format!("--start {}: {what}", self.options.start.name())));
        }
        if (self.options.contrast != 0.0) != self.others.iter().any(|other| !other.pictures.is_empty()) {
            let what = "a contrast takes a weight and reference images of other classes: --contrast and --other";
            return Err(Error::Usage(what.into()));
        }
        self.options.check(batch)
    }

    fn remarks(&self, settings: &generate::Settings) -> Vec<String> {
        let mut remarks = Vec::new();
        let count = self.references.pictures.len();
        if count == 1 {
            remarks
                .push("one reference image: its background and pose count as the concept too; 3 to 5 are usual".into());
        }
        if count == 1 && self.options.bootstrap.is_some() {
            remarks
                .push("one reference image: it is every image's subset, and images differ by their noise alone".into());
        }
        if settings.sampler.steps > 50 {
            remarks
                .push(format!("--steps {}: every iteration runs all of them there and back", settings.sampler.steps));
        }
        if settings.dtype == DType::BF16 && settings.sampler.steps > 4 {
            let what = "bf16 rounds the gradient of a run of many steps off its way: over 20 steps of the embedded model its cosine to \
                        that in f32 is 0.987; in f16 it is 0.998";
            remarks.push(what.into());
        }
        remarks
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        self.check(request.batch)?;
        let spec = Spec {
            options: &self.options,
            references: self.references.pictures.len(),
            others: self.others.len(),
            watch: &self.watch,
        };
        let programs = Programs::plan(pipeline, executor, &spec, request)?;
        Ok(Box::new(PlannedSeedSelect { programs, method: self.clone() }))
    }
}

struct PlannedSeedSelect<'p> {
    programs: Programs<'p>,
    method: SeedSelect,
}

impl PlannedMethod for PlannedSeedSelect<'_> {
    fn programs(&self) -> Vec<&Planned> {
        self.programs.all()
    }

    fn progress_units(&self) -> usize {
        self.programs.progress_units()
    }

    fn nfe(&self) -> Nfe {
        self.programs.nfe()
    }

    fn shared_units(&self) -> usize {
        self.programs.shared_units()
    }

    fn shared_nfe(&self) -> Nfe {
        self.programs.shared_nfe()
    }

    fn load<'e>(self: Box<Self>, executor: &'e mut dyn Executor) -> Result<Box<dyn LoadedMethod + 'e>>
    where
        Self: 'e,
    {
        Ok(Box::new(Loaded::new(self.programs, executor, &self.method)?))
    }
}

impl LoadedMethod for Loaded<'_, '_> {
    fn run(&mut self, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        Loaded::run(self, jobs, observe)
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self.chain.executor()
    }

    fn noise(&self, index: usize) -> Option<Vec<f32>> {
        self.best.get(index).map(|best| to_channels_first(&best.noise, self.channels))
    }
}
