//! The promise: torch's seeds give torch's noise, and our own generator never changes.

use rarebit::sampler::{Noise, Rng};

const GOLDEN: &str = include_str!("../data/noise.json");

fn draws(rng: Rng, seed: u64, lengths: &[usize]) -> Vec<f32> {
    let mut noise = Noise::new(rng, seed);
    let draw = |&n: &usize| {
        let mut out = vec![0.0; n];
        noise.normal(&mut out);
        out
    };
    lengths.iter().flat_map(draw).collect()
}

fn fnv1a(values: &[f32]) -> String {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn torch_cpu_is_bit_exact() {
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).expect("golden file");
    let cases = golden["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 72, "golden file is incomplete");
    for case in cases {
        let lengths: Vec<usize> = serde_json::from_value(case["draws"].clone()).expect("draws");
        let head: Vec<u32> = serde_json::from_value(case["head"].clone()).expect("head");
        let seed = case["seed"].as_u64().expect("seed");
        let values = draws(Rng::TorchCpu, seed, &lengths);
        let bits: Vec<u32> = values.iter().take(4).map(|v| v.to_bits()).collect();
        assert_eq!(bits, head, "seed {seed} draws {lengths:?}");
        assert_eq!(fnv1a(&values), case["hash"], "seed {seed} draws {lengths:?}");
    }
}

/// `torch.randn(4, device="cuda")` after `torch.manual_seed(0)`.
#[test]
fn torch_cuda_vector() {
    let values = draws(Rng::TorchCuda, 0, &[4]);
    for (value, expected) in values.iter().zip([-0.924_662_6, -0.425_344_15, -2.643_845_8, 0.145_183_88f32]) {
        assert!((value - expected).abs() < 2e-6, "{values:?}");
    }
    let again = draws(Rng::TorchCuda, 0, &[4, 4]);
    assert_eq!(again[..4], values[..]);
    assert_ne!(again[4..], values[..]);
}

#[test]
fn philox_is_pinned_and_has_unit_variance() {
    let values = draws(Rng::Philox, 42, &[65_536, 65_536]);
    assert_eq!(fnv1a(&values), "bce852996d94e247");
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    let moment = |p: i32| values.iter().map(|&v| (f64::from(v) - mean).powi(p)).sum::<f64>() / values.len() as f64;
    assert!(mean.abs() < 0.01 && (moment(2) - 1.0).abs() < 0.015, "mean {mean} variance {}", moment(2));
    assert!(moment(3).abs() < 0.04 && (moment(4) - 3.0).abs() < 0.1, "moments {} {}", moment(3), moment(4));
}

/// An element depends on seed, draw and position only, not on how much is drawn.
#[test]
fn philox_elements_are_independent_of_the_length() {
    let long = draws(Rng::Philox, 3, &[100, 100]);
    for n in [1, 2, 3, 5, 99] {
        let short = draws(Rng::Philox, 3, &[n, n]);
        assert_eq!(short[..n], long[..n]);
        assert_eq!(short[n..], long[100..100 + n]);
    }
}
