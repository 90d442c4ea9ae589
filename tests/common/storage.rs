//! How exact a kernel must be: within twice the error of exact arithmetic that rounds its results to the same storage.

use rarebit::program::DType;

/// What kernels store.
pub const TYPES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

/// A 16-bit kernel may be this many times as far off as exact arithmetic with the same storage.
const MARGIN: f64 = 2.0;
/// What summing in f32 may add, relative to the largest magnitude.
const FLOOR: f64 = 3e-6;

pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => half::f16::from_f64(x).to_f64(),
        DType::BF16 => half::bf16::from_f64(x).to_f64(),
        DType::F32 => x as f32 as f64,
        DType::F64 | DType::I32 => x,
    }
}

/// Root mean square and largest difference.
fn errors(a: &[f64], b: &[f64]) -> [f64; 2] {
    let differences = a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    let squares: f64 = differences.clone().map(|d| d * d).sum();
    let largest = differences.fold(0.0, |m: f64, d| if d.is_nan() { f64::INFINITY } else { m.max(d) });
    [if largest.is_finite() { (squares / a.len() as f64).sqrt() } else { largest }, largest]
}

/// An error of one output, and what is allowed.
pub struct Verdict {
    pub error: f64,
    pub allowed: f64,
    /// Which output, rms or largest, and what storage alone makes.
    pub what: String,
}

impl Verdict {
    pub fn ok(&self) -> bool {
        self.error <= self.allowed
    }
}

/// Of a kernel's outputs the error that is largest for what is allowed, given the exact outputs and those of exact arithmetic with
/// the same storage.
pub fn verdict(found: &[Vec<f64>], exact: &[Vec<f64>], honest: &[Vec<f64>]) -> Verdict {
    let mut worst = Verdict { error: 0.0, allowed: 0.0, what: "no outputs".into() };
    for (output, ((found, exact), honest)) in found.iter().zip(exact).zip(honest).enumerate() {
        let scale = exact.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        let (own, storage) = (errors(found, exact), errors(honest, exact));
        for (error, storage, what) in [(own[0], storage[0], "rms"), (own[1], storage[1], "largest")] {
            let allowed = MARGIN * storage + FLOOR * scale;
            if worst.allowed == 0.0 || error / allowed > worst.error / worst.allowed {
                let what =
                    format!("output {output}: {what} error {error:.3e}, of storage {storage:.3e}, scale {scale:.2e}");
                worst = Verdict { error, allowed, what };
            }
        }
    }
    worst
}

/// What is wrong with a kernel's outputs, given the exact ones and those of exact arithmetic with the same storage.
pub fn judge(found: &[Vec<f64>], exact: &[Vec<f64>], honest: &[Vec<f64>]) -> Option<String> {
    Some(verdict(found, exact, honest)).filter(|verdict| !verdict.ok()).map(|verdict| verdict.what)
}

pub fn report(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong[..wrong.len().min(40)].join("\n"));
}

/// Whether all values have the same bits.
pub fn same_bits(a: &[Vec<f64>], b: &[Vec<f64>]) -> bool {
    let bits = |values: &[Vec<f64>]| values.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    bits(a) == bits(b)
}
