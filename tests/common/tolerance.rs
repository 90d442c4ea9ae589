//! How exact a kernel must be: within twice the error of exact arithmetic that rounds its results to the same storage.

use rarebit::program::DType;
use rayon::prelude::*;

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
    /// Which output, rms or largest, and what storage alone makes; of too large an error where it is.
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
    assert_eq!([found.len(), honest.len()], [exact.len(); 2], "outputs");
    for (output, ((found, exact), honest)) in found.iter().zip(exact).zip(honest).enumerate() {
        assert_eq!([found.len(), honest.len()], [exact.len(); 2], "elements of output {output}");
        let scale = exact.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        let (own, storage) = (errors(found, exact), errors(honest, exact));
        let allowed = storage.map(|storage| MARGIN * storage + FLOOR * scale);
        for (i, what) in ["rms", "largest"].into_iter().enumerate() {
            if worst.allowed == 0.0 || own[i] / allowed[i] > worst.error / worst.allowed {
                let mut what = format!(
                    "output {output}: {what} error {:.3e}, of storage {:.3e}, scale {scale:.2e}",
                    own[i], storage[i]
                );
                if own[i] > allowed[i] {
                    what += &format!("; {}", whereabouts(found, exact, allowed[1]));
                }
                worst = Verdict { error: own[i], allowed: allowed[i], what };
            }
        }
    }
    worst
}

/// How many values are further than `allowed` from what they should be, and the first of them; where there is none, the farthest.
pub fn whereabouts(found: &[f64], expected: &[f64], allowed: f64) -> String {
    let distance = |i: usize| match found[i] == expected[i] {
        true => 0.0,
        false => Some((found[i] - expected[i]).abs()).filter(|d| !d.is_nan()).unwrap_or(f64::INFINITY),
    };
    let (mut count, mut first, mut farthest) = (0, None, (0, 0.0));
    for i in 0..found.len() {
        let far = distance(i);
        if far > allowed {
            count += 1;
            first = first.or(Some(i));
        }
        if far > farthest.1 {
            farthest = (i, far);
        }
    }
    let show = |i: usize| format!("{i} is {:e}, not {:e}", found[i], expected[i]);
    let of = found.len();
    match first {
        Some(first) => format!("{count} of {of} off by more than {allowed:.1e}, the first: {}", show(first)),
        None if of > 0 => format!("none of {of} off by more than {allowed:.1e}, the farthest: {}", show(farthest.0)),
        None => "no values".into(),
    }
}

/// What is wrong with a kernel's outputs, given the exact ones and those of exact arithmetic with the same storage.
pub fn judge(found: &[Vec<f64>], exact: &[Vec<f64>], honest: &[Vec<f64>]) -> Option<String> {
    Some(verdict(found, exact, honest)).filter(|verdict| !verdict.ok()).map(|verdict| verdict.what)
}

/// What `check` finds wrong with the cases, in their order; the index is a case's place. They are checked on all cores, so that the
/// last and longest test of a binary does not leave the others idle.
pub fn side_by_side<T: Sync>(
    cases: impl Iterator<Item = T>,
    check: impl Fn(usize, &T) -> Vec<String> + Sync,
) -> Vec<String> {
    let cases: Vec<T> = cases.collect();
    cases.par_iter().enumerate().flat_map_iter(|(index, case)| check(index, case)).collect()
}

pub fn report(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong[..wrong.len().min(40)].join("\n"));
}

/// How many values do not have the same bits, and the first of them.
pub fn differing_bits(a: &[Vec<f64>], b: &[Vec<f64>]) -> Option<String> {
    let lengths = |values: &[Vec<f64>]| values.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(a), lengths(b));
    let places = a.iter().zip(b).enumerate().flat_map(|(output, (a, b))| {
        let pairs = a.iter().zip(b).enumerate();
        pairs.filter(|(_, (a, b))| a.to_bits() != b.to_bits()).map(move |(i, (a, b))| (output, i, *a, *b))
    });
    let (output, i, left, right) = places.clone().next()?;
    let (count, of) = (places.count(), a.iter().flatten().count());
    Some(format!("{count} of {of} values differ, the first: {i} of output {output} is {left:e}, not {right:e}"))
}

/// Whether all values have the same bits.
pub fn same_bits(a: &[Vec<f64>], b: &[Vec<f64>]) -> bool {
    differing_bits(a, b).is_none()
}
