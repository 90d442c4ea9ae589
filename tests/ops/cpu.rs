//! The CPU executor computes what the ops say: f64 against plain loops, f32 against f64, and the same bits whatever the
//! batch, the number of threads and the runs before; no op touches memory that is not its own.

use crate::common::cases::Case;
use crate::common::inputs::{fill, lesser_archs, no_weights, noise, run, weights};
use crate::common::naive::Buffers;
use crate::common::{cases, naive};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Pack, Weight};

fn outputs(program: &Program, values: &[Vec<f64>]) -> Vec<Vec<f64>> {
    program.outputs.iter().map(|(_, id)| values[id.index()].clone()).collect()
}

/// Largest difference relative to the largest magnitude.
fn error(a: &[f64], b: &[f64]) -> f64 {
    let scale = b.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| if (a - b).is_nan() { f64::INFINITY } else { m.max((a - b).abs()) })
        / scale
}

fn every_case() -> Vec<Case> {
    cases::all().into_iter().chain(cases::across_samples()).collect()
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

#[test]
fn f64_agrees_with_plain_loops() {
    let model = no_weights();
    for case in every_case() {
        for through_op in [false, true] {
            let built = case.program(DType::F64, 2, through_op);
            let buffers = fill(&built, 0, 2);
            let expected = outputs(&built.program, &naive::evaluate(&built.program, &buffers));
            let found = run(Cpu::<f64>::new().with_guards(true), &built.program, &buffers, &model, 1);
            for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    error(a, b) < 1e-13,
                    "{} through_op {through_op}: output {i} is off by {:e}",
                    case.name,
                    error(a, b)
                );
            }
        }
    }
}

#[test]
fn f32_agrees_with_f64() {
    let model = no_weights();
    for case in every_case() {
        for through_op in [false, true] {
            let double = case.program(DType::F64, 3, through_op);
            let buffers = fill(&double, 0, 3);
            let expected = run(Cpu::<f64>::new(), &double.program, &buffers, &model, 1);
            let single = case.program(DType::F32, 3, through_op);
            let found = run(Cpu::<f32>::new().with_guards(true), &single.program, &buffers, &model, 1);
            for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    error(a, b) < 2e-6,
                    "{} through_op {through_op}: output {i} is off by {:e}",
                    case.name,
                    error(a, b)
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let model = no_weights();
    for case in cases::all() {
        let built = case.program(DType::F32, 4, true);
        let together = run(Cpu::<f32>::new(), &built.program, &fill(&built, 0, 4), &model, 1);
        for sample in 0..4 {
            let one = case.program(DType::F32, 1, true);
            let mut buffers = fill(&one, sample, 1);
            for ((_, all), (name, alone)) in built.ints.iter().zip(&one.ints) {
                let values = all[sample * alone.len()..][..alone.len()].to_vec();
                buffers.ints.insert(name.clone(), values);
            }
            let alone = run(Cpu::<f32>::new(), &one.program, &buffers, &model, 1);
            for (together, alone) in together.iter().zip(&alone) {
                let of_sample = &together[sample * alone.len()..][..alone.len()];
                assert!(of_sample == alone, "{}: sample {sample} differs in a batch", case.name);
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_earlier_runs() {
    let model = no_weights();
    for case in every_case() {
        let built = case.program(DType::F32, 2, true);
        let buffers = fill(&built, 0, 2);
        let result = |threads, times, guards| {
            pool(threads)
                .install(|| run(Cpu::<f32>::new().with_guards(guards), &built.program, &buffers, &model, times))
        };
        let expected = result(1, 1, false);
        for (threads, times, guards) in [(2, 1, false), (4, 1, false), (7, 2, false), (2, 2, true)] {
            assert!(result(threads, times, guards) == expected, "{} with {threads} threads, {times} runs", case.name);
        }
    }
}

#[test]
fn other_instruction_sets_agree() {
    let model = no_weights();
    let archs = lesser_archs();
    for case in every_case() {
        let built = case.program(DType::F32, 1, false);
        let buffers = fill(&built, 0, 1);
        let expected = run(Cpu::<f32>::new(), &built.program, &buffers, &model, 1);
        for &arch in &archs {
            let found = run(Cpu::<f32>::on(arch).with_guards(true), &built.program, &buffers, &model, 1);
            for (a, b) in found.iter().zip(&expected) {
                assert!(error(a, b) < 2e-6, "{} on {arch:?}: {:e}", case.name, error(a, b));
            }
        }
    }
}

/// Runs gemm or convolution with its operand `w` as a packed weight of a checkpoint, and as an input.
#[test]
fn weights_agree_with_inputs() {
    for (pack, shape, activation) in [
        (Pack::Linear, vec![70, 96], Activation::None),
        (Pack::Geglu, vec![33, 2 * 50], Activation::Geglu),
        (Pack::LinearTransposed, vec![20, 33], Activation::Gelu),
        (Pack::Conv, vec![3, 3, 40, 72], Activation::None),
        (Pack::Conv, vec![3, 3, 4, 20], Activation::None),
    ] {
        let len: usize = shape.iter().product();
        let (n, k) = (shape[shape.len() - 1], len / shape[shape.len() - 1]);
        let value = noise("w", 0, len);
        let bias = noise("bias", 0, n);
        // The order in which checkpoints store it.
        let (inputs, taps) = (shape[shape.len() - 2], k / shape[shape.len() - 2]);
        let stored: Vec<f32> = match pack {
            Pack::LinearTransposed => value.iter().map(|&x| x as f32).collect(),
            _ => (0..len)
                .map(|i| {
                    let (o, i_in, tap) = (i / k, i % k / taps, i % taps);
                    value[(tap * inputs + i_in) * n + o] as f32
                })
                .collect(),
        };
        let stored_shape = match pack {
            Pack::Linear | Pack::Geglu => vec![n, k],
            Pack::LinearTransposed => vec![k, n],
            _ => vec![n, inputs, shape[0], shape[1]],
        };
        let model = weights(&[
            ("down_blocks.w", stored_shape, stored),
            ("down_blocks.b", vec![n], bias.iter().map(|&x| x as f32).collect()),
        ]);
        let program = |from_checkpoint: bool| {
            let mut b = Builder::new("p", DType::F32);
            let weight = |key: &str, pack, shape: &[usize]| Weight {
                component: Component::Unet,
                keys: vec![key.to_string()],
                pack,
                shape: shape.to_vec(),
            };
            let (w, bias) = if from_checkpoint {
                (b.weight(weight("down_blocks.w", pack, &shape)), b.weight(weight("down_blocks.b", Pack::Vector, &[n])))
            } else {
                (b.input("w", &shape), b.input("bias", &[n]))
            };
            let out = if pack == Pack::Conv {
                let x = b.input("x", &[2, 6, 7, inputs]);
                let bias = Some(bias);
                b.conv2d(Conv2d { x, w, bias, shift: None, residual: None, stride: 1, padding: [1; 4] })
            } else {
                let x = b.input("x", &[5, k]);
                b.gemm(Gemm { x, w, bias: Some(bias), residual: None, activation })
            };
            b.output("out", out);
            b.finish().unwrap()
        };
        let mut buffers = Buffers::default();
        let rows = if pack == Pack::Conv { 2 * 6 * 7 } else { 5 };
        buffers.floats.insert("x".into(), noise("x", 0, rows * if pack == Pack::Conv { inputs } else { k }));
        let from_checkpoint = run(Cpu::<f32>::new(), &program(true), &buffers, &model, 1);
        buffers.floats.insert("w".into(), value);
        buffers.floats.insert("bias".into(), bias);
        let from_input = run(Cpu::<f32>::new(), &program(false), &buffers, &model, 1);
        assert!(from_checkpoint == from_input, "{pack:?} {shape:?}");
    }
}

/// A zero coefficient leaves its term out, whatever it holds, in place or not.
#[test]
fn combine_skips_terms_with_coefficient_zero() {
    let model = no_weights();
    let case = cases::rest().into_iter().find(|c| c.name == "combine 2").unwrap();
    for (through_op, coefficients) in [(false, [0.0, 0.5]), (true, [0.0, 0.5]), (true, [0.5, 0.0])] {
        let built = case.program(DType::F32, 1, through_op);
        let mut buffers = fill(&built, 0, 1);
        let dead = if coefficients[0] == 0.0 { "x0" } else { "x1" };
        buffers.floats.get_mut(dead).unwrap().fill(f64::NAN);
        buffers.floats.insert("coefficients".into(), coefficients.to_vec());
        let out = run(Cpu::<f32>::new(), &built.program, &buffers, &model, 1);
        assert!(out[0].iter().all(|x| x.is_finite()));
    }
}

/// What the caller does wrong is an error that says so.
#[test]
fn misuse_is_an_error() {
    let model = no_weights();
    let program = |dtype, width| {
        let mut b = Builder::new("p", dtype);
        let x = b.input("x", &[2, width]);
        let ids = b.input_i32("at", &[1]);
        let y = b.select(x, ids);
        b.output("y", y);
        b.finish().unwrap()
    };
    let planned = |program: Program| plan(program, |_, _| 0);
    let mut cpu = Cpu::<f32>::new();
    let says = |result: rarebit::Result<()>, what: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    };
    says(cpu.load(planned(program(DType::F64, 3)), &model).map(|_| ()), "f64");
    let id = cpu.load(planned(program(DType::F32, 3)), &model).unwrap();
    says(cpu.load(planned(program(DType::F32, 4)), &model).map(|_| ()), "'x'");
    says(cpu.write("z", Data::F32(&[1.0])), "'z'");
    says(cpu.write("x", Data::F32(&[1.0])), "[2, 3]");
    says(cpu.write("at", Data::F32(&[1.0])), "i32");
    says(cpu.read("y", DataMut::F32(&mut [0.0])), "[1, 3]");
    cpu.write("at", Data::I32(&[2])).unwrap();
    says(cpu.run(id), "entry 2 is not in 0..2");
    cpu.write("at", Data::I32(&[1])).unwrap();
    cpu.write("x", Data::F32(&[0.0, 0.0, 0.0, 1.0, f32::NAN, 2.0])).unwrap();
    cpu.run(id).unwrap();
    let mut cpu = Cpu::<f32>::new().check_finite(true);
    let id = cpu.load(planned(program(DType::F32, 3)), &model).unwrap();
    cpu.write("x", Data::F32(&[f32::INFINITY; 6])).unwrap();
    says(cpu.run(id), "op 0");
}
