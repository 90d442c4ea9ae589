//! `rarebit seed --interpolate A B`: images along a path from one starting noise to another.

use crate::cli::flags::images::RunFlags;
use crate::cli::paths::Paths;
use crate::cli::tensors;
use crate::exec::Executor;
use crate::methods::baselines::ddim::Ddim;
use crate::methods::seedselect::nao::{self, Interpolation, frames};
use crate::methods::{ImageMethod, PlannedMethod, Request};
use crate::pipeline::Pipeline;
use crate::sampler;
use crate::{Error, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::Path;

#[derive(Args)]
#[command(next_help_heading = "Interpolation")]
pub struct InterpolationFlags {
    /// In place of optimising: images along a path from one starting noise to another, each a seed or a file of one noise
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    pub interpolate: Vec<String>,
    /// Images along the path, both ends among them [default: 8]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(2..))]
    frames: Option<u16>,
    /// nao: where noises are likely (Samuel et al. 2023); slerp: on the arc; lerp: on the chord, whose middle no model was trained on
    /// [default: nao]
    #[arg(long, value_enum)]
    along: Option<Along>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Along {
    Nao,
    Slerp,
    Lerp,
}

/// Plain sampling of the noises along a path.
pub struct Between<'a>(&'a InterpolationFlags);

/// Images of a path that does not say how many.
const FRAMES: u16 = 8;

impl InterpolationFlags {
    pub fn frames(&self) -> u16 {
        self.frames.unwrap_or(FRAMES)
    }

    fn along(&self) -> Along {
        self.along.unwrap_or(Along::Nao)
    }

    /// Refuses what does nothing without the path. Not clap's `requires`: the other flags' conflict with --interpolate would lift it.
    pub fn check(&self) -> Result<()> {
        let given = [("--frames", self.frames.is_some()), ("--along", self.along.is_some())];
        match given.into_iter().find(|(_, given)| *given && self.interpolate.is_empty()) {
            Some((flag, _)) => Err(Error::Usage(format!("{flag}: does nothing without --interpolate"))),
            None => Ok(()),
        }
    }

    /// Every file that is read.
    pub fn inputs(&self, paths: &mut Paths) {
        let files = self.interpolate.iter().filter(|end| end.parse::<u64>().is_err());
        files.for_each(|file| paths.input("--interpolate", Path::new(file)));
    }

    pub fn method(&self) -> Between<'_> {
        Between(self)
    }

    /// The noises, `[C, H/f, W/f]`, in order.
    pub fn noises(&self, run: &RunFlags, pipeline: &Pipeline) -> Result<Vec<Vec<f32>>> {
        let settings = run.settings(pipeline)?;
        let (height, width) = pipeline.latent_size(settings.width, settings.height)?;
        let shape = [1, pipeline.config.unet.in_channels, height, width];
        let end = |end: &String| -> Result<Vec<f32>> {
            let Ok(seed) = end.parse() else {
                return Ok(tensors::read_noise(Path::new(end), shape)?.swap_remove(0));
            };
            let mut noise = vec![0.0; shape.iter().product()];
            sampler::Noise::new(settings.rng, seed).normal(&mut noise);
            Ok(noise)
        };
        let [a, b] = &self.interpolate[..] else {
            return Err(Error::Usage("--interpolate: needs two noises, each a seed or a file".into()));
        };
        let how = match self.along() {
            Along::Nao => Interpolation::Nao(nao::Settings::default()),
            Along::Slerp => Interpolation::Slerp,
            Along::Lerp => Interpolation::Lerp,
        };
        frames(&end(a)?, &end(b)?, self.frames().into(), how)
    }
}

impl ImageMethod for Between<'_> {
    fn name(&self) -> &'static str {
        "interpolation"
    }

    fn title(&self) -> String {
        "interpolation".into()
    }

    fn options(&self) -> Value {
        let along = format!("{:?}", self.0.along()).to_lowercase();
        json!({"between": self.0.interpolate, "frames": self.0.frames(), "along": along})
    }

    fn plan<'p>(
        &self,
        pipeline: &'p Pipeline,
        executor: &dyn Executor,
        request: &Request<'_>,
    ) -> Result<Box<dyn PlannedMethod + 'p>> {
        Ddim.plan(pipeline, executor, request)
    }
}
