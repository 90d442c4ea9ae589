//! What `rarebit seed` keeps and says of a run besides its images.

use crate::cli::flags::device::DeviceFlags;
use crate::cli::flags::values;
use crate::cli::images::targets::Targets;
use crate::cli::paths::Paths;
use crate::cli::seed::cache::CacheFolder;
use crate::methods::seedselect::{HeldOut, ReferenceCache, Watch};
use crate::metrics::shapes::World;
use crate::pipeline::Pipeline;
use crate::weights::Component;
use crate::{Error, Result, assets};
use clap::Args;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Args)]
#[command(next_help_heading = "Observation")]
pub struct WatchFlags {
    /// Write a JSON line per iteration: loss and its terms, length of noise and gradient, distance moved
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Score the image of every iteration in the trace, as `held_out`, by what is never optimised: a CLIP (a transformers folder or
    /// file), by its similarity to the references, or with the word shapes the reader of the embedded model's world, by its
    /// probability that all is right that the prompt states
    #[arg(long, value_name = "DIR|FILE|shapes")]
    judge: Option<PathBuf>,
    /// After every so many iterations write the best image so far, as NAME.preview.png beside NAME.png; it is removed when that is
    /// written
    #[arg(long, value_name = "EVERY", value_parser = values::count, allow_negative_numbers = true)]
    preview: Option<usize>,
    /// A folder that keeps what is made of reference images for later runs: features and latents, by what the images show, the
    /// networks and their settings
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Write what the run took and what came of it, as JSON: seconds by stage, counted UNet calls, bytes, every iteration
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Make every image once more as the best of as many seeds as cost the same, and report both by the same loss: twice the time
    #[arg(long)]
    pub equal_compute: bool,
}

/// The value of --judge that is no path.
const SHAPES: &str = "shapes";

impl WatchFlags {
    /// Every file that is read.
    pub fn inputs(&self, paths: &mut Paths) {
        self.judge_clip().into_iter().for_each(|path| paths.input("--judge", path));
    }

    /// What is written besides the trace.
    pub fn outputs(&self, paths: &mut Paths) -> Result<()> {
        self.cache.iter().try_for_each(|path| paths.output("--cache", path))
    }

    /// Whether every iteration is reported.
    pub fn traces(&self) -> bool {
        self.trace.is_some() || self.report.is_some()
    }

    pub fn previews(&self) -> bool {
        self.preview.is_some()
    }

    /// Refuses what does nothing.
    pub fn check(&self) -> Result<()> {
        if self.judge.is_some() && !self.traces() {
            return Err(Error::Usage("--judge: scores what --trace or --report writes; give one of them".into()));
        }
        if self.equal_compute && self.report.is_none() {
            return Err(Error::Usage("--equal-compute: is for a --report; give both".into()));
        }
        Ok(())
    }

    fn judge_clip(&self) -> Option<&PathBuf> {
        self.judge.as_ref().filter(|judge| *judge != Path::new(SHAPES))
    }

    /// With what it takes added to the model.
    pub fn watch(&self, pipeline: &mut Pipeline, targets: &Targets, device: &DeviceFlags) -> Result<Watch> {
        let judge = match (self.judge_clip(), &self.judge) {
            (Some(clip), _) => {
                pipeline.model.add(Component::HeldOutClip, clip)?;
                Some(HeldOut::Clip)
            }
            (None, Some(_)) => {
                let world = World::embedded()?;
                for prompt in targets.prompts() {
                    let wrong = |why| Error::Usage(format!("--judge shapes: '{prompt}': {why}"));
                    world.parse(prompt).map_err(wrong)?;
                }
                pipeline.model.take(Component::Reader, assets::shapes_reader()?)?;
                Some(HeldOut::Shapes)
            }
            (None, None) => None,
        };
        let cache = self.cache.as_deref().map(|path| CacheFolder::open(path, device)).transpose()?;
        let cache = cache.map(|cache| Arc::new(cache) as Arc<dyn ReferenceCache>);
        Ok(Watch { judge, preview: self.preview.and_then(NonZeroUsize::new), cache })
    }

    /// What the user may not expect; `clip` is that of the loss.
    pub fn remarks(&self, clip: Option<&Path>, iterations: usize) -> Vec<String> {
        let mut remarks = vec![];
        if self.judge_clip().is_some_and(|judge| clip == Some(judge)) {
            remarks.push("--judge: is the CLIP of the loss; what it says is no judgement".to_string());
        }
        if let Some(every) = self.preview.filter(|every| *every > iterations) {
            remarks.push(format!("--preview {every}: there are only {iterations} iterations"));
        }
        remarks
    }
}
