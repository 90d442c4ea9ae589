//! The record that an image carries of how it was made.

use crate::Result;
use crate::cli::flags::device::Device;
use crate::cli::flags::images::{Noise, RunFlags};
use crate::cli::images::targets::Target;
use crate::cli::images::work::Work;
use crate::data::metadata::{Record, TokenRecord};
use crate::weights::fingerprint;

/// Of one image of a run; prompt, seed and row of `noise` are the target's.
pub fn record(flags: &RunFlags, work: &Work<'_>, noise: &Noise, target: &Target) -> Result<Record> {
    let Work { pipeline, settings, method } = work;
    let scheduler = &pipeline.config.scheduler;
    let row = noise.as_ref().map(|rows| &rows[target.index]);
    Ok(Record {
        version: env!("CARGO_PKG_VERSION").into(),
        method: method.name().into(),
        options: method.options_of(target.seed),
        model: flags.model.name(),
        model_hash: pipeline.model.fingerprint()?,
        prompt: target.prompt.to_string(),
        negative: flags.sampling.negative.clone(),
        seed: target.seed,
        rng: settings.rng.to_string(),
        noise: row.map(hash),
        tokens: tokens(flags, work, target)?,
        steps: settings.sampler.steps,
        sampler: settings.sampler.method.to_string(),
        spacing: settings.sampler.spacing(scheduler).to_string(),
        eta: settings.sampler.eta,
        guidance: settings.sampler.guidance,
        cfg_pp: settings.sampler.cfg_pp,
        prediction: format!("{:?}", scheduler.prediction).to_lowercase(),
        width: settings.width,
        height: settings.height,
        dtype: settings.dtype.to_string(),
        device: match flags.device.device {
            Device::Auto | Device::Cpu => None,
            Device::Cuda(_) => Some("cuda".into()),
        },
    })
}

/// The learned words that decide an image: those of its prompt and of its negative prompt.
fn tokens(flags: &RunFlags, work: &Work<'_>, target: &Target) -> Result<Vec<TokenRecord>> {
    if work.pipeline.learned.is_empty() {
        return Ok(vec![]);
    }
    let mut words = work.pipeline.learned_words(&target.prompt)?;
    if let Some(negative) = work.method.negative(flags.sampling.negative.as_deref()) {
        words.extend(work.pipeline.learned_words(negative)?);
    }
    let mut tokens: Vec<TokenRecord> =
        words.iter().map(|(word, values)| TokenRecord { word: word.clone(), hash: hash(values) }).collect();
    tokens.sort_by(|a, b| a.word.cmp(&b.word));
    tokens.dedup();
    Ok(tokens)
}

fn hash<'x>(values: impl IntoIterator<Item = &'x f32>) -> String {
    format!("{:016x}", fingerprint(values.into_iter().flat_map(|x| x.to_le_bytes())))
}
