//! The features of the prompts themselves, which images are compared with beside those of the references.

use crate::exec::{Executor, ProgramId};
use crate::models::detect;
use crate::optimize::objective::references::buffer;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Job;
use crate::plan::{Planned, plan};
use crate::program::DType;
use crate::rewards::{Clip, Reward};
use crate::weights::Component;
use crate::{Error, Result};

/// The text tower of the CLIP that sees, planned but not loaded.
pub(super) struct Prompt {
    clip: Clip,
    planned: Planned,
}

impl Prompt {
    /// For `batch` prompts. An error where the CLIP has no text tower.
    pub fn plan(pipeline: &Pipeline, executor: &dyn Executor, dtype: DType, batch: usize) -> Result<Prompt> {
        if detect::clip_config(&pipeline.model, Component::Clip)?.text.is_none() {
            let what = "the CLIP that sees has no text tower for the distance to the prompt; --prompt-weight 0 leaves that out";
            return Err(Error::Usage(what.into()));
        }
        let clip = Clip::new(&pipeline.model, Component::Clip)?;
        let program = clip.text(dtype, batch, buffer::PROMPT)?;
        Ok(Prompt { clip, planned: plan(program, |program, node| executor.workspace(program, node)) })
    }

    pub fn program(&self) -> &Planned {
        &self.planned
    }

    pub fn load(self, pipeline: &Pipeline, executor: &mut dyn Executor) -> Result<LoadedPrompt> {
        Ok(LoadedPrompt { clip: self.clip, program: executor.load(self.planned, &pipeline.model)? })
    }
}

pub(super) struct LoadedPrompt {
    clip: Clip,
    program: ProgramId,
}

impl LoadedPrompt {
    /// Writes the features of every job's prompt where the loss reads them.
    pub fn write(&self, executor: &mut dyn Executor, jobs: &[Job]) -> Result<()> {
        let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
        self.clip.write(executor, &prompts)?;
        executor.run(self.program)
    }
}
