//! The kernels where the lists of cases do not go: at the ends of functions' domains, with operands that must not be read, at
//! timesteps as they are, and noise, which is the sampler's bit for bit.

mod common;

use common::emulated::cuda;
use common::feed::{no_weights, try_run};
use common::naive::Buffers;
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::Settings;
use rarebit::program::*;
use rarebit::sampler::{Noise, Rng};

/// A program of one output.
fn program(dtype: DType, build: impl Fn(&mut Builder) -> ValueId) -> Program {
    let mut b = Builder::new("edge", dtype);
    let out = build(&mut b);
    b.output("out", out);
    b.finish().unwrap()
}

fn buffers(floats: &[(&str, &[f64])], ints: &[(&str, &[i32])]) -> Buffers {
    Buffers {
        floats: floats.iter().map(|(name, values)| (name.to_string(), values.to_vec())).collect(),
        ints: ints.iter().map(|(name, values)| (name.to_string(), values.to_vec())).collect(),
    }
}

fn run(mut executor: impl Executor, program: &Program, buffers: &Buffers) -> Vec<f64> {
    try_run(&mut executor, program, buffers, &no_weights(), 1).unwrap().remove(0)
}

fn emulated(program: &Program, buffers: &Buffers) -> Vec<f64> {
    run(cuda(Settings::default()).with_guards(true), program, buffers)
}

/// Whether two numbers are the same, NaN and infinities included, but for rounding.
fn same(a: f64, b: f64) -> bool {
    a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= 2e-6 * b.abs().max(1e-6)
}

#[test]
fn functions_and_slopes_at_the_ends_of_their_domains() {
    let step = f64::from(f32::EPSILON);
    let x = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1.0 + step,
        -1.0 - step,
        1.0 - step,
        step - 1.0,
        1e-30,
        -1e-30,
        0.5,
        80.0,
        -80.0,
        1e30,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
    ];
    let d = vec![1.5; x.len()];
    for f in [Scalar::Sqrt, Scalar::Square, Scalar::Ln, Scalar::Exp, Scalar::Reciprocal, Scalar::Spherical] {
        let value = program(DType::F32, |b| {
            let x = b.input("x", &[17]);
            b.map(x, f)
        });
        let slope = program(DType::F32, |b| {
            let (x, d_y) = (b.input("x", &[17]), b.input("d", &[17]));
            b.push(Op::Elementwise(Elementwise::MapBackward { x, d_y, f }))[0]
        });
        for (what, program, buffers) in
            [("value", value, buffers(&[("x", &x)], &[])), ("slope", slope, buffers(&[("x", &x), ("d", &d)], &[]))]
        {
            let (found, expected) = (emulated(&program, &buffers), run(Cpu::<f32>::new(), &program, &buffers));
            for (i, (found, expected)) in found.into_iter().zip(expected).enumerate() {
                assert!(same(found, expected), "{what} of {f:?} at {}: {found:e}, not {expected:e}", x[i]);
            }
        }
    }
}

#[test]
fn bounds_let_nan_through() {
    let x = [f64::NAN, -2.0, -0.5, 0.25, 0.75, 3.0, f64::INFINITY];
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let clamp = program(dtype, |b| {
            let x = b.input("x", &[7]);
            b.clamp(x, -0.5, 0.75)
        });
        let found = emulated(&clamp, &buffers(&[("x", &x)], &[]));
        assert!(found[0].is_nan() && found[1..] == [-0.5, -0.5, 0.25, 0.75, 0.75, 0.75], "{found:?}");
        let step = program(dtype, |b| {
            let state = ["p", "x", "v", "b"].map(|name| b.input(name, &[7]));
            let scalars = b.scalars("scalars", 7);
            b.rmsprop(state, scalars)[0]
        });
        let zeros = [0.0; 7];
        let floats: [(&str, &[f64]); 5] = [
            ("p", &zeros),
            ("x", &x),
            ("v", &zeros),
            ("b", &zeros),
            ("scalars", &[1.0, 0.5, 0.5, 1.0, 1.0, -0.25, 0.25]),
        ];
        let found = emulated(&step, &buffers(&floats, &[]));
        assert!(found[0].is_nan() && found[1..].iter().all(|p| p.abs() <= 0.25), "{found:?}");
    }
}

/// A term whose coefficient is 0 is not read, the first one and those of a second launch included.
#[test]
fn combinations_leave_terms_out() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let combine = program(dtype, |b| {
            let good = b.input("good", &[33]);
            let bad = b.input("bad", &[33]);
            let coefficients = b.scalars("coefficients", 11);
            let terms: Vec<ValueId> = (0..11).map(|i| if i % 5 == 0 { bad } else { good }).collect();
            b.combine(&terms, coefficients)
        });
        let coefficients: Vec<f64> = (0..11).map(|i| if i % 5 == 0 { 0.0 } else { 0.25 }).collect();
        let floats: [(&str, &[f64]); 3] =
            [("good", &[2.0; 33]), ("bad", &[f64::NAN; 33]), ("coefficients", &coefficients)];
        assert_eq!(emulated(&combine, &buffers(&floats, &[])), [4.0; 33]);
        let scale = program(dtype, |b| {
            let (x, coefficients) = (b.input("bad", &[33]), b.scalars("coefficients", 11));
            b.push(Op::Update(Update::Scale { x, coefficients, index: 10 }))[0]
        });
        assert_eq!(emulated(&scale, &buffers(&floats[1..], &[])), [0.0; 33]);
    }
}

/// At every training step, as exact as the CPU, whose angles are rounded to f32 as the reference's are.
#[test]
fn sinusoids_of_timesteps() {
    let timesteps: Vec<f64> = (0..1000).map(f64::from).chain([4096.0, 999.5, -731.0]).collect();
    for (dim, flip, shift) in [(320, true, 0.0), (256, true, 0.0), (20, false, 1.0)] {
        let forward = program(DType::F32, |b| {
            let x = b.input("x", &[timesteps.len()]);
            b.sinusoidal(x, dim, flip, shift)
        });
        let buffers = buffers(&[("x", &timesteps)], &[]);
        let (found, expected) = (emulated(&forward, &buffers), run(Cpu::<f32>::new(), &forward, &buffers));
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 2e-7, "dim {dim}: off by {off:e}");
    }
}

#[test]
fn noise_is_the_samplers() {
    let (height, width, channels) = (5, 6, 3);
    let noise = program(DType::F32, |b| {
        let counter = b.input_i32("counter", &[2, 4]);
        b.noise(counter, &[2, height, width, channels])
    });
    let seeds = [42u64, 0x9876_5432_fedc_ba98];
    for draw in 0..3 {
        let mut expected = vec![];
        for seed in seeds {
            let (mut generator, mut drawn) = (Noise::new(Rng::Philox, seed), vec![0.0f32; height * width * channels]);
            (0..=draw).for_each(|_| generator.normal(&mut drawn));
            // Drawn channels first, held channels last.
            let pixels = (0..height * width).flat_map(|i| (0..channels).map(move |c| c * height * width + i));
            expected.extend(pixels.map(|n| f64::from(drawn[n])));
        }
        let words = seeds.iter().flat_map(|seed| [*seed as i32, (seed >> 32) as i32, draw, 0]).collect::<Vec<i32>>();
        let buffers = buffers(&[], &[("counter", &words)]);
        assert_eq!(emulated(&noise, &buffers), expected);
        assert_eq!(run(Cpu::<f32>::new(), &noise, &buffers), expected);
    }
}
