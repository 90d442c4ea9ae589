//! CADS (Sadat et al. 2023, algorithm 1): sampling while the text states are noise first and clean in the end.

use super::Cads;
use crate::Error;
use crate::Result;
use crate::pipeline::Observer;
use crate::pipeline::conditioning::{Branch, Text};
use crate::pipeline::generate::{Image, Job, Loaded};
use crate::sampler::{draw, normal};

/// Makes one full batch of images.
pub fn run(images: &mut Loaded<'_, '_>, cads: &Cads, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
    cads.check()?;
    if cads.dynamic_guidance && images.is_cfg_pp() {
        return Err(Error::Usage("CADS with dynamic guidance does not go with CFG++".into()));
    }
    images.begin(jobs)?;
    let (prompts, negatives) = (images.texts(Branch::Prompt)?, images.texts(Branch::Negative)?);
    let guidance = images.guidance();
    let steps = images.schedule.steps.len();
    let mut clean = true;
    for step in 0..steps {
        let gamma = cads.gamma(step, steps);
        if gamma < 1.0 || !clean {
            let corrupted = |texts: &[Text], branch: u64| -> Vec<Text> {
                let draw = draw::TEXT + 2 * step as u64 + branch;
                texts.iter().zip(jobs).map(|(text, job)| corrupted(text, cads, gamma, job.seed, draw)).collect()
            };
            let prompts = corrupted(&prompts, 0);
            let negatives = if cads.negatives { corrupted(&negatives, 1) } else { vec![] };
            images.condition_on(&[(Branch::Prompt, &prompts), (Branch::Negative, &negatives)])?;
            clean = gamma >= 1.0;
        }
        if cads.dynamic_guidance {
            images.guide(step, gamma * guidance);
        }
        images.step(step, observe)?;
    }
    images.finish(observe)
}

/// Context and pooled text each with noise of their own.
fn corrupted(text: &Text, cads: &Cads, gamma: f64, seed: u64, draw: u64) -> Text {
    let mut text = text.clone();
    let split = text.context.len();
    let mut noise = vec![0.0; split + text.pooled.len()];
    normal(seed, draw, &mut noise);
    cads.corrupt(&mut text.context, gamma, &noise[..split]);
    cads.corrupt(&mut text.pooled, gamma, &noise[split..]);
    text
}
