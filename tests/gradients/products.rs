//! Gradients of products and convolutions on the CPU: f64 against plain loops and against central differences of the forward
//! op, f32 against f64, weights as held in panels against plain inputs, and the same bits whatever the batch, the number of
//! threads and the runs before; no op touches memory that is not its own.

use crate::common::inputs::{lesser_archs, no_weights, noise};
use crate::common::products::{Case, How, Values, cases, run, stored, weight};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::Pack;

/// Largest difference relative to the largest magnitude.
fn error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| if (a - b).is_nan() { f64::INFINITY } else { m.max((a - b).abs()) })
        / scale
}

#[test]
fn f64_agrees_with_plain_loops() {
    let model = no_weights();
    for case in cases() {
        for (residual, through_op) in [(false, false), (true, false), (true, true)] {
            let how = How { residual, through_op, ..How::new(DType::F64, 2) };
            let values = case.values(0, 2);
            let found = run(Cpu::<f64>::new().with_guards(true), &how.program(&case), &values, &model, 1);
            let off = error(&found, &case.naive(2, residual, &values));
            assert!(off < 1e-13, "{case:?} residual {residual} through_op {through_op}: off by {off:e}");
        }
    }
}

#[test]
fn f32_agrees_with_f64() {
    let model = no_weights();
    for case in cases() {
        let values = case.values(0, 3);
        let expected = run(Cpu::<f64>::new(), &How::new(DType::F64, 3).program(&case), &values, &model, 1);
        let single = How::new(DType::F32, 3).program(&case);
        let found = run(Cpu::<f32>::new().with_guards(true), &single, &values, &model, 1);
        let off = error(&found, &expected);
        assert!(off < 2e-6, "{case:?}: off by {off:e}");
    }
}

/// `⟨d_y, f(x + h v) - f(x - h v)⟩ / 2h` against `⟨d_x, v⟩`, and the same for the weight.
#[test]
fn f64_agrees_with_central_differences() {
    let model = no_weights();
    for case in cases() {
        let values = case.values(0, 2);
        let how = How { residual: false, ..How::new(DType::F64, 2) };
        let gradient = run(Cpu::<f64>::new(), &how.program(&case), &values, &model, 1);
        let mut b = Builder::new("forward", DType::F64);
        let [x, w, _] = case.shapes(2);
        let (x, w) = (b.input("x", &x), b.input("w", &w));
        let y = case.forward(&mut b, x, w);
        b.output("out", y);
        let forward = b.finish().unwrap();
        let direction = noise("direction", 0, gradient.len());
        let loss = |h: f64| {
            let moved = |from: &[f64]| from.iter().zip(&direction).map(|(x, v)| x + h * v).collect();
            let (mut x, mut w) = (values.x.clone(), values.w.clone());
            match case {
                Case::Weight(_) => w = moved(&w),
                Case::Input(_) | Case::Conv(..) => x = moved(&x),
            }
            let values = Values { x, w, d_y: vec![], residual: vec![] };
            run(Cpu::<f64>::new(), &forward, &values, &model, 1)
        };
        let along = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let expected = along(&gradient, &direction);
        let off = |h: f64| {
            let difference: Vec<f64> = loss(h).iter().zip(loss(-h)).map(|(up, down)| (up - down) / (2.0 * h)).collect();
            (along(&difference, &values.d_y) - expected).abs() / expected.abs().max(1e-3)
        };
        let best = (3..=7).map(|i| off(10f64.powi(-i))).fold(f64::INFINITY, f64::min);
        assert!(best < 1e-6, "{case:?}: off by {best:e}");
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let model = no_weights();
    for case in cases().into_iter().filter(|case| !matches!(case, Case::Weight(_))) {
        let how = How::new(DType::F32, 3);
        let together = run(Cpu::<f32>::new(), &how.program(&case), &case.values(0, 3), &model, 1);
        for (sample, of_sample) in together.chunks_exact(together.len() / 3).enumerate() {
            let one = How { batch: 1, ..how }.program(&case);
            let alone = run(Cpu::<f32>::new(), &one, &case.values(sample, 1), &model, 1);
            assert!(alone == of_sample, "{case:?}: sample {sample} differs in a batch");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_earlier_runs() {
    let model = no_weights();
    for case in cases() {
        let (program, values) = (How::new(DType::F32, 2).program(&case), case.values(0, 2));
        let result = |threads, times, guards| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(Cpu::<f32>::new().with_guards(guards), &program, &values, &model, times))
        };
        let expected = result(1, 1, false);
        for (threads, times, guards) in [(2, 1, false), (3, 1, true), (7, 2, false)] {
            assert!(result(threads, times, guards) == expected, "{case:?} with {threads} threads, {times} runs");
        }
    }
}

#[test]
fn other_instruction_sets_agree() {
    let model = no_weights();
    let archs = lesser_archs();
    for case in cases() {
        let (program, values) = (How::new(DType::F32, 1).program(&case), case.values(0, 1));
        let expected = run(Cpu::<f32>::new(), &program, &values, &model, 1);
        for &arch in &archs {
            let off = error(&run(Cpu::<f32>::on(arch).with_guards(true), &program, &values, &model, 1), &expected);
            assert!(off < 2e-6, "{case:?} on {arch:?}: off by {off:e}");
        }
    }
}

/// What the forward packed gives the bits of the plain matrix.
#[test]
fn weights_agree_with_inputs() {
    for case in cases().into_iter().filter(|case| !matches!(case, Case::Weight(_))) {
        let (how, values) = (How::new(DType::F32, 2), case.values(0, 2));
        let model = stored(&case.shapes(2)[1], &values.w);
        let from_input = run(Cpu::<f32>::new(), &how.program(&case), &values, &model, 1);
        let held = How { held: true, ..how }.program(&case);
        let from_weight = run(Cpu::<f32>::new(), &held, &values, &model, 1);
        assert!(from_weight == from_input, "{case:?}");
    }
}

/// A GEGLU's weight, whose halves are packed apart, read by the fused op, by a plain product of all its columns and by the
/// gradient, all in one executor; and a weight packed otherwise is refused.
#[test]
fn all_readers_of_a_geglu_share_its_weight() {
    for (k, n) in [(33, 2 * 50), (20, 2), (64, 2 * 128), (40, 2 * 77)] {
        let values = Case::Input([5, k, n]).values(0, 1);
        let model = stored(&[k, n], &values.w);
        let build = |reader: usize, pack: Option<Pack>| {
            let mut b = Builder::new("reader", DType::F32);
            let w = match pack {
                Some(pack) => b.weight(weight(pack, &[k, n])),
                None => b.input("w", &[k, n]),
            };
            let activation = if reader == 0 { Activation::Geglu } else { Activation::None };
            let op = if reader == 2 {
                let d_y = b.input("d_y", &[1, 5, n]);
                Op::GemmBackward(GemmBackward::Input { d_y, w, residual: None })
            } else {
                let x = b.input("x", &[1, 5, k]);
                Op::Gemm(Gemm { x, w, bias: None, residual: None, activation })
            };
            let out = b.push(op)[0];
            b.output(format!("out{reader}"), out);
            b.finish().unwrap()
        };
        let mut cpu = Cpu::<f32>::new();
        for reader in 0..3 {
            let read = |cpu: &mut Cpu<f32>, program: Program| {
                let mut out = vec![0.0f32; program.value(program.outputs[0].1).len()];
                let planned = plan(program, |program, node| cpu.workspace(program, node));
                let id = cpu.load(planned, &model).unwrap();
                for (name, data) in [("x", &values.x), ("d_y", &values.d_y), ("w", &values.w)] {
                    // Not all are there yet.
                    let _ = cpu.write(name, Data::F64(data));
                }
                cpu.run(id).unwrap();
                cpu.read(&format!("out{reader}"), DataMut::F32(&mut out)).unwrap();
                out
            };
            let held = read(&mut cpu, build(reader, Some(Pack::Geglu)));
            assert!(held == read(&mut cpu, build(reader, None)), "{k}x{n}: reader {reader}");
        }
        let planned = plan(build(0, Some(Pack::Linear)), |_, _| 0);
        let message = cpu.load(planned, &model).unwrap_err().to_string();
        assert!(message.contains("packed as Linear, is read as that of a GEGLU"), "{message}");
    }
}
