//! What `rarebit seed` keeps and says of a run besides its images.

use crate::cli::images::targets::Targets;
use crate::cli::paths::Paths;
use crate::methods::seedselect::{HeldOut, Watch};
use crate::metrics::shapes::World;
use crate::pipeline::Pipeline;
use crate::weights::Component;
use crate::{Error, Result, assets};
use clap::Args;
use std::path::{Path, PathBuf};

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
}

/// The value of --judge that is no path.
const SHAPES: &str = "shapes";

impl WatchFlags {
    /// Every file that is read.
    pub fn inputs(&self, paths: &mut Paths) {
        self.judge_clip().into_iter().for_each(|path| paths.input("--judge", path));
    }

    /// Refuses what does nothing.
    pub fn check(&self) -> Result<()> {
        match (&self.judge, &self.trace) {
            (Some(_), None) => Err(Error::Usage("--judge: scores what --trace FILE writes; give both".into())),
            (None | Some(_), _) => Ok(()),
        }
    }

    fn judge_clip(&self) -> Option<&PathBuf> {
        self.judge.as_ref().filter(|judge| *judge != Path::new(SHAPES))
    }

    /// With what it takes added to the model.
    pub fn watch(&self, pipeline: &mut Pipeline, targets: &Targets) -> Result<Watch> {
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
        Ok(Watch { judge })
    }

    /// What the user may not expect; `clip` is that of the loss.
    pub fn remarks(&self, clip: Option<&Path>) -> Vec<String> {
        let same = self.judge_clip().is_some_and(|judge| clip == Some(judge));
        let what = "--judge: is the CLIP of the loss; what it says is no judgement";
        if same { vec![what.to_string()] } else { vec![] }
    }
}
