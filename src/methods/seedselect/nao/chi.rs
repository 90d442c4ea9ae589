//! The chi law: how likely the length of a Gaussian noise is.

use crate::{Error, Result};

/// The law of `r = ‖z‖` for `z ~ N(0, I)` in `d` dimensions. With `d = 16384` its standard deviation is 0.707 around 128, so that the
/// mean of two noises, of length 90.5, is no noise that a network was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chi {
    /// `d - 1`.
    power: f64,
    mode: f64,
    at_mode: f64,
}

impl Chi {
    /// `Error::Usage` below two dimensions, where the law has no mode above 0.
    pub fn new(dimensions: usize) -> Result<Chi> {
        if dimensions < 2 {
            return Err(Error::Usage(format!("a noise of {dimensions} numbers: its length has no likeliest value")));
        }
        let (d, power) = (dimensions as f64, dimensions as f64 - 1.0);
        let log_constant = (d / 2.0 - 1.0) * std::f64::consts::LN_2 + libm::lgamma(d / 2.0);
        Ok(Chi { power, mode: power.sqrt(), at_mode: power * (power.ln() - 1.0) / 2.0 - log_constant })
    }

    /// The likeliest length, `√(d - 1)`.
    pub fn mode(&self) -> f64 {
        self.mode
    }

    /// `f(r) = (d - 1) ln r - r²/2 - (d/2 - 1) ln 2 - ln Γ(d/2)`.
    ///
    /// Computed as the distance from its value at the mode, `(d - 1) (ln q - (q² - 1)/2)` with `q = r/mode`: the terms of the formula
    /// are around 80000 at `d = 16384`, and near the mode their difference is below 1.
    pub fn log_density(&self, r: f64) -> f64 {
        let off = r / self.mode - 1.0;
        self.at_mode + self.power * (off.ln_1p() - off - off * off / 2.0)
    }

    /// `f'(r) = (d - 1)/r - r`.
    pub fn derivative(&self, r: f64) -> f64 {
        self.power / r - r
    }
}
