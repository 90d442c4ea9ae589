//! What every mode of the benchmark measures with.

use super::measure::Plan;
use crate::Result;
use crate::cli::flags::device::{self, DeviceFlags};
use crate::cli::machine;
use crate::exec::Executor;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::Settings;
use crate::plan::Footprint;

/// What images show where it makes no difference.
pub const PROMPT: &str = "a red star on a dark blue background";

/// What every mode measures with.
pub struct Setup<'a> {
    pub pipeline: &'a Pipeline,
    pub executor: Box<dyn Executor>,
    pub settings: Settings,
    pub device: DeviceFlags,
    /// Seconds that opening the model took.
    pub open_s: f64,
    /// Bytes of device memory before anything was loaded.
    pub free: Option<usize>,
    pub seed: u64,
    pub plan: Plan,
}

impl Setup<'_> {
    pub fn check_memory(&self, footprint: &Footprint, batch: usize) -> Result<()> {
        let free = self.executor.free_memory()?;
        machine::check_memory(self.device.memory_limit, free, footprint, device::smaller_plan(batch))
    }
}
