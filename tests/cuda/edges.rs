//! The kernels where the lists of cases do not go: at the ends of functions' domains, with operands that must not be read, at
//! timesteps as they are, and noise, which is the sampler's bit for bit.

use crate::common::emulated::cuda;
use crate::common::inputs::{no_weights, try_run};
use crate::common::naive::Buffers;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::Settings;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
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

/// Outputs that carry an input's name: written in its place where nothing reads that any more, copied at the end elsewhere.
#[test]
fn state_is_replaced_when_it_has_been_read() {
    let mut b = Builder::new("state", DType::F32);
    let [x, h, p] = ["x", "h", "p"].map(|name| b.input(name, &[4, 40]));
    let scalars = b.scalars("scalars", 2);
    let silu = b.activate(x, Activation::Silu);
    // The old one is read after the new one is there.
    let sum = b.add(silu, x);
    let shifted = b.affine(h, 2.0, 1.0);
    let [p_next, m_next] = b.nesterov([p, sum, h], scalars);
    let doubled = b.add(shifted, shifted);
    for (name, id) in
        [("x", silu), ("h", shifted), ("h twice", shifted), ("p", p_next), ("m", m_next), ("sum", doubled)]
    {
        b.output(name, id);
    }
    let program = b.finish().unwrap();
    let values =
        |seed: usize| -> Vec<f64> { (0..160).map(|i| f64::from(((i * seed) % 97) as f32 / 32.0 - 1.5)).collect() };
    let (x, h, p) = (values(7), values(31), values(53));
    let buffers = buffers(&[("x", &x), ("h", &h), ("p", &p), ("scalars", &[0.1, 0.9])], &[]);
    let expected = try_run(&mut Cpu::<f32>::new(), &program, &buffers, &no_weights(), 1).unwrap();
    for guards in [true, false] {
        let mut device = cuda(Settings::default()).with_guards(guards);
        // Launch by launch, recorded, and replayed.
        let found = try_run(&mut device, &program, &buffers, &no_weights(), 3).unwrap();
        for ((found, expected), (name, _)) in found.iter().zip(&expected).zip(&program.outputs) {
            assert!(found.iter().zip(expected).all(|(a, b)| same(*a, *b)), "{name}, guards {guards}");
        }
    }
}

/// Parts of buffers, on every executor alike.
#[test]
fn buffers_are_copied_in_part() {
    let mut b = Builder::new("copies", DType::F32);
    let (x, wide) = (b.input("x", &[2, 3]), b.input("wide", &[5, 3]));
    let at = b.input_i32("at", &[1]);
    let y = b.select(wide, at);
    let z = b.affine(x, 1.0, 0.0);
    b.output("y", y);
    b.output("z", z);
    let program = b.finish().unwrap();
    let mut executors: [Box<dyn Executor>; 2] = [Box::new(Cpu::<f32>::new()), Box::new(cuda(Settings::default()))];
    for executor in &mut executors {
        let planned = plan(program.clone(), |program, node| executor.workspace(program, node));
        executor.load(planned, &no_weights()).unwrap();
        executor.write("x", Data::F32(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])).unwrap();
        executor.copy(("x", 2), ("wide", 10), 4).unwrap();
        executor.copy(("wide", 11), ("wide", 0), 3).unwrap();
        let mut wide = [0.0; 15];
        executor.read("wide", DataMut::F32(&mut wide)).unwrap();
        assert_eq!(wide, [4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0]);
        let mut refused = |from, to, len, word: &str| {
            let error = executor.copy(from, to, len).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        };
        refused(("x", 3), ("wide", 0), 4, "'x'");
        refused(("x", 0), ("wide", 12), 4, "'wide'");
        refused(("wide", 0), ("wide", 2), 3, "over themselves");
        refused(("at", 0), ("wide", 2), 1, "i32");
        refused(("nothing", 0), ("wide", 2), 1, "'nothing'");
    }
}
