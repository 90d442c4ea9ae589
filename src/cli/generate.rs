//! `rarebit generate`: prompts to PNG files, by plain sampling or one of the samplers that methods are compared with.

use crate::cli::flags;
use crate::cli::images::run::{self, Extras, ImageFlags};
use crate::cli::method::{Method, Score};
use crate::methods::baselines::Cads;
use crate::methods::baselines::sgms::Sgms;
use crate::{Error, Result};

#[derive(clap::Args)]
pub struct Generate {
    #[command(flatten)]
    pub images: ImageFlags,
    #[command(flatten)]
    rivals: RivalFlags,
    /// Keep the best of N images, each from a seed of its own (SEED * N + 0, 1, ...)
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u16).range(1..),
        conflicts_with_all = ["cads", "sgms"]
    )]
    best_of: Option<u16>,
    /// What it is the best in
    #[arg(long, value_enum, value_name = "SCORE", requires = "best_of", default_value = "elbo")]
    by: Score,
}

/// Samplers that MinorityPrompt is compared with.
#[derive(clap::Args)]
pub struct RivalFlags {
    /// CADS (Sadat et al. 2023): noise on the prompt's states, gone in the course of sampling
    #[arg(long, conflicts_with = "sgms")]
    pub cads: bool,
    /// CADS: times (1 to 0) below which the states are clean and above which they are noise
    #[arg(long, value_name = "LOW,HIGH", value_parser = pair, default_value = "0.6,0.9")]
    pub cads_times: (f64, f64),
    /// CADS: standard deviation of the noise
    #[arg(
        long,
        value_name = "S",
        value_parser = flags::amount,
        allow_negative_numbers = true,
        default_value_t = Cads::default().scale
    )]
    pub cads_scale: f64,
    /// CADS: how far noisy states are brought back to the mean and deviation of the clean ones, 0 to 1
    #[arg(
        long,
        value_name = "PSI",
        value_parser = flags::share,
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
    /// SGMS (Um & Ye 2024), our version on latents: length of its steps; 0 is plain sampling
    #[arg(long, value_name = "ETA", value_parser = flags::number, allow_negative_numbers = true)]
    pub sgms: Option<f64>,
    /// SGMS: noise level of the second estimate, as a share of the training steps
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = flags::share,
        allow_negative_numbers = true,
        default_value_t = Sgms::default().ratio
    )]
    pub sgms_ratio: f64,
    /// SGMS: guide every so many steps
    #[arg(
        long,
        value_name = "N",
        value_parser = flags::count,
        allow_negative_numbers = true,
        default_value_t = Sgms::default().every
    )]
    pub sgms_every: usize,
    /// SGMS: guide while the timestep is above this share of the training steps
    #[arg(
        long,
        value_name = "SHARE",
        value_parser = flags::number,
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

impl RivalFlags {
    pub fn cads(&self) -> Cads {
        Cads {
            tau1: self.cads_times.0,
            tau2: self.cads_times.1,
            scale: self.cads_scale,
            psi: self.cads_mix,
            negatives: self.cads_negative,
            dynamic_guidance: self.cads_guidance,
        }
    }

    pub fn sgms(&self) -> Sgms {
        Sgms {
            eta: self.sgms.unwrap_or(Sgms::default().eta),
            ratio: self.sgms_ratio,
            every: self.sgms_every,
            t_mid: self.sgms_above,
            normalised: !self.sgms_raw,
            variance: !self.sgms_fixed,
            guided: self.sgms_guided,
        }
    }
}

fn pair(text: &str) -> Result<(f64, f64), String> {
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| "write two numbers, e.g. 0.6,0.9".to_string());
    let (low, high) = text.split_once(',').ok_or("write two numbers, e.g. 0.6,0.9")?;
    Ok((number(low)?, number(high)?))
}

impl Generate {
    fn method(&self) -> Result<Method> {
        Ok(match (self.rivals.cads, self.rivals.sgms, self.best_of) {
            (false, None, None) => Method::Plain,
            (true, None, None) => Method::Cads(self.rivals.cads()),
            (false, Some(_), None) => Method::Sgms(self.rivals.sgms()),
            (false, None, Some(n)) => Method::BestOf(n.into(), self.by),
            (_, _, _) => return Err(Error::Usage("--cads, --sgms and --best-of exclude each other".into())),
        })
    }
}

pub fn run(args: &Generate) -> Result<()> {
    let method = args.method()?;
    let pipeline = args.images.open()?;
    run::run(&args.images, &pipeline, &method, &Extras::default())
}
