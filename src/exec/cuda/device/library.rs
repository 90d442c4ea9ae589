//! NVIDIA's driver library: whether it is there, what it drives, and its errors in words.

use crate::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_int;
use std::fmt;

/// The oldest driver that reads compressed fat binaries and tells the size of a kernel's parameters: CUDA 12.4.
const OLDEST_DRIVER: c_int = 12040;

/// The device of that number. cudarc panics at the first call where the library is missing, so that is asked first.
pub fn find(ordinal: usize, name: &str) -> Result<sys::CUdevice> {
    let none = "no CUDA device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu";
    let missing = |what: &str| Err(Error::Device(format!("{name}: {what}")));
    // SAFETY: loads NVIDIA's library, whose initialisers are trusted as the driver is.
    if !unsafe { sys::is_culib_present() } {
        return missing("NVIDIA's driver is not installed (no libcuda); install it, or use --device cpu");
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return missing(none),
        result => result.map_err(|e| failed(name, "starting NVIDIA's driver", e))?,
    }
    let version = version().map_err(|e| failed(name, "asking the driver's version", e))?;
    if version < OLDEST_DRIVER {
        let (has, wants) = (Version(version), Version(OLDEST_DRIVER));
        return missing(&format!("NVIDIA's driver is for CUDA {has}; update it to one for CUDA {wants} or newer"));
    }
    match result::device::get_count().map_err(|e| failed(name, "counting devices", e))? as usize {
        0 => missing(none),
        count if ordinal >= count => {
            Err(Error::Usage(format!("--device cuda:{ordinal}: the last device is cuda:{}", count - 1)))
        }
        _ => result::device::get(ordinal as c_int).map_err(|e| failed(name, "opening it", e)),
    }
}

/// Of the driver, as it encodes it. Only for after the library was found.
pub fn version() -> Result<c_int, DriverError> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map(|()| version)
}

/// An error of the driver. Only for after the library was found: the words are the driver's own.
pub fn failed(device: impl fmt::Display, operation: impl fmt::Display, error: DriverError) -> Error {
    Error::Device(format!("{device}: {operation}: {}", Words(error)))
}

pub struct Words(pub DriverError);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.error_name(), self.0.error_string()) {
            (Ok(name), Ok(text)) => write!(f, "{} ({})", text.to_string_lossy(), name.to_string_lossy()),
            _ => write!(f, "the driver's error {}", self.0.0 as u32),
        }
    }
}

/// As the driver encodes it: 12040 is 12.4.
pub struct Version(pub c_int);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}
