//! What a GPU says of itself while it works: power, clocks, temperature, energy, by NVIDIA's management library where there is one.

use super::Gpu;
use crate::Result;
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use serde_json::{Value, json};

/// The device a run is on; none of a CPU's, or where the library is missing.
pub struct NvmlDevice {
    found: Option<(Nvml, String)>,
}

impl NvmlDevice {
    pub fn none() -> NvmlDevice {
        NvmlDevice { found: None }
    }

    /// That of a CUDA device. A library that is missing or refuses leaves its numbers out and is no error.
    pub fn of(ordinal: usize) -> Result<NvmlDevice> {
        let address = Gpu::bus_address(ordinal)?;
        Ok(NvmlDevice { found: Nvml::init().ok().map(|nvml| (nvml, address)) })
    }

    fn device(&self) -> Option<nvml_wrapper::Device<'_>> {
        let (nvml, address) = self.found.as_ref()?;
        nvml.device_by_pci_bus_id(address.as_str()).ok()
    }

    /// Joules since the driver was loaded.
    pub fn energy(&self) -> Option<f64> {
        Some(self.device()?.total_energy_consumption().ok()? as f64 / 1e3)
    }

    /// MHz of the multiprocessors now.
    pub fn clock(&self) -> Option<u32> {
        self.device()?.clock_info(Clock::SM).ok()
    }

    /// As it is now.
    pub fn json(&self) -> Value {
        let Some(device) = self.device() else { return Value::Null };
        let nvml = self.found.as_ref().map(|(nvml, _)| nvml);
        json!({
            "name": device.name().ok(),
            "uuid": device.uuid().ok(),
            "driver": nvml.and_then(|nvml| nvml.sys_driver_version().ok()),
            "cuda": nvml.and_then(|nvml| nvml.sys_cuda_driver_version().ok()),
            "power_limit_w": device.enforced_power_limit().ok().map(|mw| f64::from(mw) / 1e3),
            "sm_mhz": device.clock_info(Clock::SM).ok(),
            "mem_mhz": device.clock_info(Clock::Memory).ok(),
            "temp_c": device.temperature(TemperatureSensor::Gpu).ok(),
            "ecc": device.is_ecc_enabled().ok().map(|state| state.currently_enabled),
        })
    }
}
