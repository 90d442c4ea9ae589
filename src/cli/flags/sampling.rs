//! How latents become images: sampler, guidance, size, seed.

use crate::models::config::{Family, Spacing};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Settings;
use crate::program::DType;
use crate::sampler::{self, Method, Rng};
use crate::{Error, Result};
use clap::Args;

/// How latents become images.
#[derive(Args)]
pub struct SamplingFlags {
    /// Seed of a prompt's first image; its image i uses SEED+i and is the same image alone [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// Noise generator: philox is the same on every device, torch-cpu and torch-cuda repeat PyTorch's
    #[arg(long, default_value = "philox", value_name = "philox|torch-cpu|torch-cuda")]
    pub rng: Rng,
    /// Sampling steps
    #[arg(long, default_value_t = 50, allow_negative_numbers = true)]
    pub steps: usize,
    /// ddim, euler, euler-a, dpmpp-2m, dpmpp-2m-karras or pndm [default: the model's]
    #[arg(long)]
    pub sampler: Option<Method>,
    /// How timesteps are spread [default: the model's]
    #[arg(long, value_name = "leading|linspace|trailing")]
    pub spacing: Option<Spacing>,
    /// Fraction of fresh noise in DDIM, 0 to 1
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub eta: f64,
    /// Classifier-free guidance weight; 1 runs the prompt's branch only [default: 7.5, SDXL 5, CFG++ 0.6]
    #[arg(long, allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// CFG++: renoise with the unconditional prediction; guidance in (0, 1]
    #[arg(long)]
    pub cfg_pp: bool,
    /// What the image should not show
    #[arg(long, value_name = "PROMPT")]
    pub negative: Option<String>,
    /// Image size in pixels, multiples of 8 [default: the model's]
    #[arg(long, value_name = "WxH", value_parser = parse_size)]
    pub size: Option<(usize, usize)>,
}

impl SamplingFlags {
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    /// The flags with the model's defaults filled in.
    pub fn settings(&self, pipeline: &Pipeline, dtype: DType) -> Result<Settings> {
        let config = &pipeline.config;
        if let (None, Some(why)) = (self.sampler, &config.scheduler.unsupported) {
            return Err(Error::Usage(format!("{why}; choose a sampler with --sampler")));
        }
        let (width, height) = self.size.unwrap_or((config.image_size, config.image_size));
        let usual_guidance = match (self.cfg_pp, config.family) {
            (true, _) => 0.6,
            (false, Family::Sdxl) => 5.0,
            (false, Family::Sd1 | Family::Sd2) => 7.5,
        };
        Ok(Settings {
            width,
            height,
            sampler: sampler::Settings {
                method: self.sampler.or(Method::of(&config.scheduler)).unwrap_or(Method::Ddim),
                spacing: self.spacing,
                steps: self.steps,
                eta: self.eta,
                guidance: self.guidance.unwrap_or(usual_guidance),
                cfg_pp: self.cfg_pp,
            },
            rng: self.rng,
            dtype,
        })
    }

    /// What the user may not expect of these flags with this model.
    pub fn remarks(&self, pipeline: &Pipeline) -> Vec<String> {
        let mut remarks = Vec::new();
        let scheduler = &pipeline.config.scheduler;
        if self.sampler.is_none() && Method::of(scheduler).is_none() {
            remarks.push(format!("the model's {} is not here; using ddim (see --sampler)", scheduler.class));
        }
        let own = Method::of(scheduler);
        if let (Some(chosen), Some(why)) = (self.sampler, &scheduler.unsupported)
            && own == Some(chosen)
        {
            remarks.push(format!("{why}; --sampler {chosen} does without it"));
        }
        if !self.cfg_pp && self.guidance.is_some_and(|w| (0.0..1.0).contains(&w)) {
            remarks.push("--guidance below 1 moves away from the prompt, 0 ignores it; distilled models want 1".into());
        }
        if !self.cfg_pp && self.guidance == Some(1.0) && self.negative.is_some() {
            remarks.push("--negative: --guidance 1 runs the prompt's branch only".into());
        }
        remarks
    }
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let (w, h) = text.split_once(['x', 'X']).ok_or("write WIDTHxHEIGHT, e.g. 512x512")?;
    let side = |s: &str| s.trim().parse::<usize>().map_err(|_| "write WIDTHxHEIGHT, e.g. 512x512".to_string());
    let (w, h) = (side(w)?, side(h)?);
    if w.max(h) > 16384 {
        return Err("at most 16384 pixels a side".to_string());
    }
    Ok((w, h))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512x768"), Ok((512, 768)));
        assert!(parse_size("512").is_err() && parse_size("512x-8").is_err() && parse_size("99999x8").is_err());
    }
}
