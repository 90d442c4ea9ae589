//! Flags with the same meaning in every subcommand, defined once.

use crate::exec::cpu::Cpu;
use crate::exec::cuda::{Cuda, Gpu, Hopper};
use crate::exec::{Executor, Lockstep};
use crate::models::config::{Family, Prediction, Spacing};
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Settings;
use crate::program::DType;
use crate::sampler::{self, Method, Rng};
use crate::weights::Model;
use crate::{Error, Result};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// Which model.
#[derive(Args, Clone)]
pub struct ModelFlags {
    /// A diffusers folder or a single-file checkpoint (.safetensors) [default: the embedded `shapes` model]
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    /// UNet weights that replace the model's own (how SDXL-Lightning ships)
    #[arg(long, value_name = "DIR|FILE")]
    pub unet: Option<PathBuf>,
    /// What the UNet predicts, where the model does not say
    #[arg(long, value_enum)]
    pub prediction: Option<PredictionFlag>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PredictionFlag {
    Epsilon,
    V,
    Sample,
}

impl From<PredictionFlag> for Prediction {
    fn from(flag: PredictionFlag) -> Prediction {
        match flag {
            PredictionFlag::Epsilon => Prediction::Epsilon,
            PredictionFlag::V => Prediction::V,
            PredictionFlag::Sample => Prediction::Sample,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DTypeFlag {
    Auto,
    F32,
    F64,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Device::Cuda)
                .ok_or_else(|| "auto, cpu, cuda or cuda:N".to_string()),
        }
    }
}

impl ModelFlags {
    pub fn open(&self) -> Result<Pipeline> {
        let mut model = match &self.model {
            Some(path) => Model::open(path)?,
            None => crate::assets::shapes()?,
        };
        if let Some(unet) = &self.unet {
            model.replace_unet(unet)?;
        }
        Pipeline::open(model, self.prediction.map(Prediction::from))
    }

    /// The model's name as images record it.
    pub fn name(&self) -> String {
        // "v1.5" of a folder is no extension.
        let name =
            |path: &PathBuf| if path.is_dir() { path.file_name() } else { path.file_stem() }.map(|s| s.to_owned());
        let stem = |path: &PathBuf| name(path).unwrap_or_else(|| path.clone().into()).to_string_lossy().into_owned();
        let base = self.model.as_ref().map_or_else(|| "shapes".to_string(), stem);
        match &self.unet {
            Some(unet) => format!("{base}+{}", stem(unet)),
            None => base,
        }
    }
}

/// Where and how programs run.
#[derive(Args, Clone, Copy)]
pub struct DeviceFlags {
    /// Where to run; auto is the CPU until the CUDA kernels have been checked on hardware
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    pub device: Device,
    /// Number type of weights and activations; auto is f32 on the CPU, which can also compute in f64 as its own oracle, and f16
    /// on a GPU, which also takes bf16 and f32; beside f16 a VAE that needs its range (force_upcast) is in bf16
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: DTypeFlag,
    /// Refuse to start when the plan needs more, e.g. 6G or 800M
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory_limit: Option<usize>,
    /// Repeat every op of a GPU on the CPU and stop at the first that differs; slow
    #[arg(long)]
    pub check: bool,
    /// What the kernels for Hopper do on such a GPU: what they are expected to be faster at, nothing, all they can
    #[arg(long, default_value = "auto", value_name = "auto|off|always")]
    pub hopper: Hopper,
}

impl DeviceFlags {
    pub fn program_dtype(&self) -> Result<DType> {
        let on_gpu = matches!(self.device, Device::Cuda(_));
        let refuse = |what: &str| Err(Error::Usage(format!("--dtype: {what}")));
        match self.dtype {
            DTypeFlag::Auto if on_gpu => Ok(DType::F16),
            DTypeFlag::Auto | DTypeFlag::F32 => Ok(DType::F32),
            DTypeFlag::F64 if on_gpu => refuse("a GPU computes in f16, bf16 or f32; f64 needs --device cpu"),
            DTypeFlag::F64 => Ok(DType::F64),
            DTypeFlag::F16 if on_gpu => Ok(DType::F16),
            DTypeFlag::Bf16 if on_gpu => Ok(DType::BF16),
            DTypeFlag::F16 | DTypeFlag::Bf16 => {
                refuse("the CPU computes in f32 (or f64); f16 and bf16 need --device cuda")
            }
        }
    }

    pub fn executor(&self, check_finite: bool) -> Result<Box<dyn Executor>> {
        let dtype = self.program_dtype()?;
        if let Device::Cuda(ordinal) = self.device {
            let gpu = Box::new(Gpu::new(ordinal)?);
            let cuda = Cuda::new(gpu).with_hopper(self.hopper).check_finite(check_finite);
            return Ok(if self.check { Box::new(Lockstep::new(cuda)) } else { Box::new(cuda) });
        }
        if self.check {
            return Err(Error::Usage("--check holds a GPU against the CPU: give --device cuda".into()));
        }
        if self.hopper != Hopper::Auto {
            return Err(Error::Usage("--hopper chooses among a GPU's kernels: give --device cuda".into()));
        }
        Ok(match dtype {
            DType::F64 => Box::new(Cpu::<f64>::new().check_finite(check_finite)),
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 => {
                Box::new(Cpu::<f32>::new().check_finite(check_finite))
            }
        })
    }
}

/// How latents become images.
#[derive(Args)]
pub struct SamplingFlags {
    /// Seed of a prompt's first image; its image i uses SEED+i and is the same image alone
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,
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
    /// Share of fresh noise in DDIM, 0 to 1
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
        if !self.cfg_pp && self.guidance.is_some_and(|w| (0.0..1.0).contains(&w)) {
            remarks.push("--guidance below 1 leans away from the prompt, 0 ignores it; distilled models want 1".into());
        }
        remarks
    }
}

/// What makes the plan of a sampling run smaller.
pub fn smaller_plan(batch: usize) -> &'static str {
    if batch > 1 { "a smaller --batch or --size" } else { "a smaller --size" }
}

/// A number of things: 1 to a million.
pub fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=1_000_000).contains(&count) => Ok(count),
        Ok(_) | Err(_) => Err("write a number from 1 to 1000000".to_string()),
    }
}

/// A finite number.
pub fn number(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| "write a number".to_string())
}

/// A finite number from 0.
pub fn amount(text: &str) -> Result<f64, String> {
    number(text).ok().filter(|x| *x >= 0.0).ok_or_else(|| "write a number, 0 or more".to_string())
}

/// A number from 0 to 1.
pub fn share(text: &str) -> Result<f64, String> {
    number(text).ok().filter(|x| (0.0..=1.0).contains(x)).ok_or_else(|| "write a number from 0 to 1".to_string())
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

/// `800M`, `6G`, `6GiB`, plain bytes.
fn parse_bytes(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" | "kib" => 1024.0,
        "m" | "mb" | "mib" => 1024.0 * 1024.0,
        "g" | "gb" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err("write bytes, or a number with K, M or G".to_string()),
    };
    let number: f64 = digits.parse().map_err(|_| "write bytes, or a number with K, M or G".to_string())?;
    if !(number >= 0.0 && number * unit < 1e18) {
        return Err("out of range".to_string());
    }
    Ok((number * unit) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_bytes() {
        assert_eq!(parse_size("512x768"), Ok((512, 768)));
        assert!(parse_size("512").is_err() && parse_size("512x-8").is_err() && parse_size("99999x8").is_err());
        assert_eq!(parse_bytes("2K"), Ok(2048));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("77"), Ok(77));
        assert!(parse_bytes("-1").is_err() && parse_bytes("x").is_err() && parse_bytes("1T").is_err());
        assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
        assert!("gpu".parse::<Device>().is_err());
        assert!(number("-1e3").is_ok() && number("nan").is_err() && number("inf").is_err() && number("x").is_err());
        assert!(amount("0").is_ok() && amount("-1").is_err() && share("1").is_ok() && share("1.1").is_err());
    }
}
