//! Where programs run, in which number type, and how much memory they may take.

use crate::exec::cpu::Cpu;
use crate::exec::cuda::{Cuda, Gpu, Hopper};
use crate::exec::{Executor, Lockstep};
use crate::program::DType;
use crate::{Error, Result};
use clap::{Args, ValueEnum};
use std::str::FromStr;

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

/// What makes the plan of a sampling run smaller.
pub fn smaller_plan(batch: usize) -> &'static str {
    if batch > 1 { "a smaller --batch or --size" } else { "a smaller --size" }
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
    fn devices_and_bytes() {
        assert_eq!(parse_bytes("2K"), Ok(2048));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("77"), Ok(77));
        assert!(parse_bytes("-1").is_err() && parse_bytes("x").is_err() && parse_bytes("1T").is_err());
        assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
        assert!("gpu".parse::<Device>().is_err());
    }
}
