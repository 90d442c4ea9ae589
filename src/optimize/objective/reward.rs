//! Any reward as an objective: of the image a run ends in, or of the image that a step's estimate decodes to.

use super::{At, Condition, Objective, StepContext};
use crate::Result;
use crate::exec::{Executor, ProgramId};
use crate::plan::plan;
use crate::program::DType;
use crate::rewards::Reward;
use crate::weights::Model;

/// The reward of the decoded latents, raised: for the end of a whole run.
pub fn reward(reward: &dyn Reward) -> Objective<'_> {
    Objective::new("reward", move |s: &mut StepContext<'_>| {
        let image = s.decode(s.latents);
        let value = reward.append(s.b, image);
        s.raise(value)
    })
}

/// The reward of the image that the estimate of the clean latents decodes to, raised: for a sampling step (Bansal et al. 2023,
/// *Universal Guidance*, eq. 6, with the prompt as the variable has it).
pub fn estimated_reward<'a>(reward: impl Reward + 'a) -> Objective<'a> {
    Objective::new("estimated reward", move |s: &mut StepContext<'_>| {
        let prediction = s.predict(s.latents, At::T1, Condition::Optimized);
        let estimate = s.estimate(prediction);
        let image = s.decode(estimate);
        let value = reward.append(s.b, image);
        s.raise(value)
    })
}

/// What a reward makes of prompts once, beside the programs that hold it as an objective.
pub struct RewardPrompts<'r> {
    reward: &'r dyn Reward,
    program: Option<ProgramId>,
}

impl<'r> RewardPrompts<'r> {
    /// `dtype` and `batch` are those of the programs that hold the objective; they are loaded already.
    pub fn load(
        reward: &'r dyn Reward,
        executor: &mut dyn Executor,
        model: &Model,
        dtype: DType,
        batch: usize,
    ) -> Result<RewardPrompts<'r>> {
        let program = reward.prepare(dtype, batch)?;
        let planned = program.map(|program| plan(program, |program, node| executor.workspace(program, node)));
        Ok(RewardPrompts { reward, program: planned.map(|planned| executor.load(planned, model)).transpose()? })
    }

    /// Prompts from now on, one per image.
    pub fn set(&self, executor: &mut dyn Executor, prompts: &[&str]) -> Result<()> {
        self.reward.write(executor, prompts)?;
        self.program.map_or(Ok(()), |program| executor.run(program))
    }
}
