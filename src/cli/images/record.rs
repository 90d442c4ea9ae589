//! The record that an image carries of how it was made.

use crate::Result;
use crate::cli::flags::images::{Noise, RunFlags};
use crate::cli::images::targets::Target;
use crate::cli::images::work::Work;
use crate::data::metadata::Record;
use crate::weights::fingerprint;

/// Of one image of a run; prompt, seed and row of `noise` are the target's.
pub fn record(flags: &RunFlags, work: &Work<'_>, noise: &Noise, target: &Target) -> Result<Record> {
    let Work { pipeline, settings, method } = work;
    let scheduler = &pipeline.config.scheduler;
    let row = noise.as_ref().map(|rows| &rows[target.index]);
    let hash = |row: &Vec<f32>| format!("{:016x}", fingerprint(row.iter().flat_map(|x| x.to_le_bytes())));
    Ok(Record {
        version: env!("CARGO_PKG_VERSION").into(),
        method: method.name().into(),
        options: method.options(),
        model: flags.model.name(),
        model_hash: pipeline.model.fingerprint()?,
        prompt: target.prompt.clone(),
        negative: flags.sampling.negative.clone(),
        seed: target.seed,
        rng: settings.rng.to_string(),
        noise: row.map(hash),
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
    })
}
