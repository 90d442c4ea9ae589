//! The flags of what methods are compared with: plain sampling, null-prompting, CADS, SGMS.

use crate::Result;
use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::flags::values;
use crate::methods::ImageMethod;
use crate::methods::baselines::cads::Cads;
use crate::methods::baselines::ddim::Ddim;
use crate::methods::baselines::null_prompt::{NullPrompt, TYPICAL, TYPICAL_SHAPE};
use crate::methods::baselines::sgms::Sgms;
use clap::Args;

/// Plain sampling has none of its own.
#[derive(Args)]
pub struct DdimFlags {}

impl MethodFlags for DdimFlags {
    fn method(&self, _context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        Ok(Box::new(Ddim))
    }
}

#[derive(Args)]
pub struct NullPromptFlags {
    /// What the null-prompted images should not show [default: the typical image; its words are ours]
    #[arg(long, value_name = "TEXT")]
    pub null_prompt: Option<String>,
}

impl MethodFlags for NullPromptFlags {
    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        let typical = if context.embedded { TYPICAL_SHAPE } else { TYPICAL };
        Ok(Box::new(NullPrompt { negative: self.null_prompt.as_deref().unwrap_or(typical).to_string() }))
    }
}

#[derive(Args)]
pub struct CadsFlags {
    /// CADS (Sadat et al. 2023): noise on the prompt's states, gone in the course of sampling
    #[arg(long)]
    pub cads: bool,
    /// CADS: times (1 to 0) below which the states are clean and above which they are noise
    #[arg(long, value_name = "LOW,HIGH", value_parser = pair, default_value = "0.6,0.9")]
    pub cads_times: (f64, f64),
    /// CADS: standard deviation of the noise
    #[arg(
        long,
        value_name = "S",
        value_parser = values::amount,
        allow_negative_numbers = true,
        default_value_t = Cads::default().scale
    )]
    pub cads_scale: f64,
    /// CADS: how far noisy states are brought back to the mean and deviation of the clean ones, 0 to 1
    #[arg(
        long,
        value_name = "PSI",
        value_parser = values::fraction,
        allow_negative_numbers = true,
        default_value_t = Cads::default().psi
    )]
    pub cads_mix: f64,
    /// CADS: corrupt the negative prompt too
    #[arg(long)]
    pub cads_negative: bool,
    /// CADS: lower the guidance weight with the noise (Dynamic CFG)
    #[arg(long)]
    pub cads_guidance: bool,
}

impl MethodFlags for CadsFlags {
    fn method(&self, _context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        Ok(Box::new(Cads {
            tau1: self.cads_times.0,
            tau2: self.cads_times.1,
            scale: self.cads_scale,
            psi: self.cads_mix,
            negatives: self.cads_negative,
            dynamic_guidance: self.cads_guidance,
        }))
    }
}

fn pair(text: &str) -> Result<(f64, f64), String> {
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| "write two numbers, e.g. 0.6,0.9".to_string());
    let (low, high) = text.split_once(',').ok_or("write two numbers, e.g. 0.6,0.9")?;
    Ok((number(low)?, number(high)?))
}

#[derive(Args)]
pub struct SgmsFlags {
    /// SGMS (Um & Ye 2024), our version on latents: length of its steps; 0 is plain sampling
    #[arg(long, value_name = "ETA", value_parser = values::number, allow_negative_numbers = true)]
    pub sgms: Option<f64>,
    /// SGMS: noise level of the second estimate, as a fraction of the training steps
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = values::fraction,
        allow_negative_numbers = true,
        default_value_t = Sgms::default().ratio
    )]
    pub sgms_ratio: f64,
    /// SGMS: guide every so many steps
    #[arg(
        long,
        value_name = "N",
        value_parser = values::count,
        allow_negative_numbers = true,
        default_value_t = Sgms::default().every
    )]
    pub sgms_every: usize,
    /// SGMS: guide while the timestep is above this fraction of the training steps
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = values::number,
        allow_negative_numbers = true,
        default_value_t = Sgms::default().t_mid
    )]
    pub sgms_above: f64,
    /// SGMS: do not divide the gradient by its largest number
    #[arg(long)]
    pub sgms_raw: bool,
    /// SGMS: do not multiply with the variance of an ancestral step
    #[arg(long)]
    pub sgms_fixed: bool,
    /// SGMS: estimates under guidance
    #[arg(long)]
    pub sgms_guided: bool,
}

impl MethodFlags for SgmsFlags {
    fn method(&self, _context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        Ok(Box::new(Sgms {
            eta: self.sgms.unwrap_or(Sgms::default().eta),
            ratio: self.sgms_ratio,
            every: self.sgms_every,
            t_mid: self.sgms_above,
            normalised: !self.sgms_raw,
            variance: !self.sgms_fixed,
            guided: self.sgms_guided,
        }))
    }
}
