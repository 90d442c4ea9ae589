//! The gradients of elementwise ops, resampling, embeddings and updates are those of their forward ops, with the same bits
//! whatever the batch and the threads, and touch no memory that is not theirs.

use crate::common::cases::Built;
use crate::common::gradients::{self, Gradient};
use crate::common::inputs::{self, lesser_archs, no_weights, noise};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor, ProgramId};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::Model;
use std::collections::HashMap;

type Buffers = HashMap<String, Vec<f64>>;

/// Contents of the float buffers; sample `i` of a batched buffer is that of sample `first + i` in any batch.
fn fill(case: &Gradient, built: &Built, first: usize, batch: usize) -> Buffers {
    let mut buffers = inputs::fill(built, first, batch).floats;
    if let Some(leaf) = buffers.get_mut("leaf") {
        leaf.iter_mut().for_each(|x| *x = (case.domain)(*x) as f32 as f64);
    }
    buffers
}

/// A program with its buffers filled.
struct Loaded<T> {
    cpu: Cpu<T>,
    id: ProgramId,
    len: usize,
}

fn load<T: Real>(mut cpu: Cpu<T>, built: &Built, buffers: &Buffers, model: &Model) -> Loaded<T> {
    let planned = plan(built.program.clone(), |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, model).unwrap();
    buffers.iter().for_each(|(name, values)| cpu.write(name, Data::F64(values)).unwrap());
    built.ints.iter().for_each(|(name, values)| cpu.write(name, Data::I32(values)).unwrap());
    Loaded { cpu, id, len: built.program.value(built.program.outputs[0].1).len() }
}

impl<T: Real> Loaded<T> {
    fn run(&mut self) -> Vec<f64> {
        self.cpu.run(self.id).unwrap();
        let mut out = vec![0.0; self.len];
        self.cpu.read("out", DataMut::F64(&mut out)).unwrap();
        out
    }
}

fn gradient<T: Real>(cpu: Cpu<T>, case: &Gradient, batch: usize, through_op: bool, model: &Model) -> Vec<f64> {
    let built = case.backward(T::DTYPE, batch, through_op);
    load(cpu, &built, &fill(case, &built, 0, batch), model).run()
}

/// ‖a - b‖ / ‖b‖, or ‖a - b‖ where b is small.
fn error(a: &[f64], b: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    if off.is_nan() { f64::INFINITY } else { off / norm(&mut b.iter().copied()).max(1.0) }
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Elements of the leaf that are looked at.
const MOST: usize = 120;

/// Central differences of ⟨d_y, forward⟩ at the best step; of linear ops also their matrix, column by column, without error.
#[test]
fn gradients_are_those_of_the_forward_ops() {
    let model = no_weights();
    for case in gradients::all() {
        let found = gradient(Cpu::<f64>::new().with_guards(true), &case, 2, true, &model);
        let d_y = fill(&case, &case.backward(DType::F64, 2, false), 0, 2).remove("d_y").unwrap();
        let built = case.forward(2);
        let buffers = fill(&case, &built, 0, 2);
        let leaf = &buffers["leaf"];
        let mut forward = load(Cpu::<f64>::new().with_guards(true), &built, &buffers, &model);
        let mut loss = |at: usize, to: f64| {
            let mut moved = leaf.clone();
            moved[at] = to;
            forward.cpu.write("leaf", Data::F64(&moved)).unwrap();
            inner(&d_y, &forward.run())
        };
        let looked_at: Vec<usize> = (0..leaf.len()).step_by(leaf.len().div_ceil(MOST)).collect();
        let chosen: Vec<f64> = looked_at.iter().map(|&i| found[i]).collect();
        let best = (3..=7).map(|digits| {
            let h = 10f64.powi(-digits);
            let slope = |&i: &usize| (loss(i, leaf[i] + h) - loss(i, leaf[i] - h)) / (2.0 * h);
            error(&chosen, &looked_at.iter().map(slope).collect::<Vec<_>>())
        });
        let best = best.fold(f64::INFINITY, f64::min);
        assert!(best <= 1e-6, "{}: {best:e} from differences", case.name);
        if case.linear {
            let exact: Vec<f64> = looked_at.iter().map(|&i| loss(i, 1.0) - loss(i, 0.0)).collect();
            assert!(error(&chosen, &exact) < 1e-11, "{}: {:e} from the matrix", case.name, error(&chosen, &exact));
        }
    }
}

#[test]
fn f32_agrees_with_f64() {
    let model = no_weights();
    for case in gradients::all() {
        let expected = gradient(Cpu::<f64>::new(), &case, 3, false, &model);
        for through_op in [false, true] {
            let found = gradient(Cpu::<f32>::new().with_guards(true), &case, 3, through_op, &model);
            let off = error(&found, &expected);
            assert!(off < 1e-6, "{} through_op {through_op}: {off:e}", case.name);
        }
    }
}

#[test]
fn bits_do_not_depend_on_place_threads_or_batch() {
    let model = no_weights();
    for case in gradients::all() {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let expected = gradient(Cpu::<f32>::new(), &case, 3, false, &model);
        assert!(gradient(Cpu::<f32>::new(), &case, 3, true, &model) == expected, "{} in place", case.name);
        for threads in [1, 2, 3] {
            let found = pool(threads).install(|| gradient(Cpu::<f32>::new(), &case, 3, true, &model));
            assert!(found == expected, "{} with {threads} threads", case.name);
        }
        if !case.per_sample {
            continue;
        }
        let (together, alone) = (case.backward(DType::F32, 3, true), case.backward(DType::F32, 1, true));
        for (sample, expected) in expected.chunks_exact(expected.len() / 3).enumerate() {
            let ints = together.ints.iter().map(|(name, values)| {
                let len = values.len() / 3;
                (name.clone(), values[sample * len..][..len].to_vec())
            });
            let built = Built { ints: ints.collect(), batched: alone.batched.clone(), program: alone.program.clone() };
            let found = load(Cpu::<f32>::new(), &built, &fill(&case, &built, sample, 1), &model).run();
            assert!(found == expected, "{}: sample {sample} differs in a batch", case.name);
        }
    }
}

#[test]
fn other_instruction_sets_agree() {
    let model = no_weights();
    let archs = lesser_archs();
    for case in gradients::all() {
        let expected = gradient(Cpu::<f32>::new(), &case, 1, false, &model);
        for &arch in &archs {
            let found = gradient(Cpu::<f32>::on(arch), &case, 1, false, &model);
            assert!(error(&found, &expected) < 1e-6, "{} on {arch:?}", case.name);
        }
    }
}

/// Runs one op on named buffers.
fn evaluate<T: Real>(
    inputs: &[(&str, &[usize], &[f64])],
    ints: &[(&str, &[usize], &[i32])],
    op: impl Fn(&mut Builder, &[ValueId]) -> ValueId,
) -> rarebit::Result<Vec<f64>> {
    let mut b = Builder::new("p", T::DTYPE);
    let mut ids: Vec<ValueId> = inputs.iter().map(|(name, shape, _)| b.input(*name, shape)).collect();
    ids.extend(ints.iter().map(|(name, shape, _)| b.input_i32(*name, shape)));
    let out = op(&mut b, &ids);
    b.output("out", out);
    let built = Built {
        program: b.finish()?,
        batched: vec![],
        ints: ints.iter().map(|(name, _, values)| (name.to_string(), values.to_vec())).collect(),
    };
    let buffers = inputs.iter().map(|(name, _, values)| (name.to_string(), values.to_vec())).collect();
    let Loaded { mut cpu, id, len } = load(Cpu::<T>::new(), &built, &buffers, &no_weights());
    cpu.run(id)?;
    let mut out = vec![0.0; len];
    cpu.read("out", DataMut::F64(&mut out))?;
    Ok(out)
}

/// GEGLU as an op gives the bits of gemm's epilogue: here of a product with the unit matrix.
#[test]
fn geglu_is_the_epilogue_of_gemm() {
    const WIDTH: usize = 37;
    let shape = [5, 2 * WIDTH];
    let x: Vec<f64> = noise("x", 0, shape.iter().product()).iter().map(|x| 2.0 * x).collect();
    let unit: Vec<f64> = (0..4 * WIDTH * WIDTH).map(|i| f64::from(i % (2 * WIDTH + 1) == 0)).collect();
    let alone = evaluate::<f32>(&[("x", &shape, &x)], &[], |b, ids| b.geglu(ids[0])).unwrap();
    let fused = evaluate::<f32>(&[("x", &shape, &x), ("w", &[2 * WIDTH; 2], &unit)], &[], |b, ids| {
        b.gemm(Gemm { x: ids[0], w: ids[1], bias: None, residual: None, activation: Activation::Geglu })
    });
    assert!(alone == fused.unwrap());
}

fn map_backward<T: Real>(x: &[f64], f: Scalar) -> Vec<f64> {
    let shape = [x.len()];
    let d_y = vec![2.0; x.len()];
    evaluate::<T>(&[("x", &shape, x), ("d_y", &shape, &d_y)], &[], |b, ids| {
        b.push(Op::Elementwise(Elementwise::MapBackward { x: ids[0], d_y: ids[1], f }))[0]
    })
    .unwrap()
}

/// -θ / sin θ is -(1 + δ/3 + 2δ²/15 + ...) of the cosine 1 - δ.
#[test]
fn the_spherical_distance_is_smooth_at_its_ends() {
    for digits in 3..=16 {
        let delta = 1.0 - (1.0 - 10f64.powi(-digits));
        let found = map_backward::<f64>(&[1.0 - delta], Scalar::Spherical)[0];
        let expected = -2.0 * (1.0 + delta / 3.0 + 2.0 * delta * delta / 15.0);
        assert!((found - expected).abs() < 1e-6 * delta + 1e-14, "{digits}: {found} {expected}");
    }
    let beyond = [1.0, 1.0 + 1e-6, -1.0, -1.0 - 1e-6];
    for slopes in [map_backward::<f32>(&beyond, Scalar::Spherical), map_backward::<f64>(&beyond, Scalar::Spherical)] {
        assert!(slopes[..2] == [-2.0; 2] && slopes[2..].iter().all(|d| (-1e5..-1e4).contains(d)), "{slopes:?}");
    }
    let values = |b: &mut Builder, ids: &[ValueId]| b.map(ids[0], Scalar::Spherical);
    let found = evaluate::<f32>(&[("x", &[4], &beyond)], &[], values).unwrap();
    let half = std::f64::consts::PI.powi(2) / 2.0;
    assert!(found[..2] == [0.0; 2] && found[2..].iter().all(|x| (x - half).abs() < 1e-6), "{found:?}");
    assert_eq!(map_backward::<f32>(&[0.0, 4.0], Scalar::Sqrt), [0.0, 0.5]);
}

/// What is clamped away has no gradient, even where that is not finite; NaN passes the clamp.
#[test]
fn clamp_at_its_bounds() {
    let (x, d_y) = ([-1.0, -0.5, 1.0, 1.5], [f64::NAN, 3.0, 4.0, f64::INFINITY]);
    let found = evaluate::<f32>(&[("x", &[4], &x), ("d_y", &[4], &d_y)], &[], |b, ids| {
        b.push(Op::Elementwise(Elementwise::ClampBackward { x: ids[0], d_y: ids[1], low: -0.5, high: 1.0 }))[0]
    });
    assert_eq!(found.unwrap(), [0.0, 3.0, 4.0, 0.0]);
    let clamped = evaluate::<f32>(&[("x", &[3], &[f64::NAN, 7.0, -7.0])], &[], |b, ids| b.clamp(ids[0], -0.5, 1.0));
    let clamped = clamped.unwrap();
    assert!(clamped[0].is_nan() && clamped[1..] == [1.0, -0.5]);
    let message = evaluate::<f32>(&[("x", &[1], &[0.0])], &[], |b, ids| b.clamp(ids[0], 1.0, 0.0)).unwrap_err();
    assert!(message.to_string().contains("clamp to 1..0"), "{message}");
}

#[test]
fn bad_indices_are_errors_that_name_them() {
    let says = |found: rarebit::Result<Vec<f64>>, what: &str| {
        let message = found.unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    };
    let (table, extra, positions) = ([0.0; 6], [0.0; 2], [0.0; 4]);
    let rows: [(&str, &[usize], &[f64]); 3] =
        [("table", &[3, 2], &table), ("extra", &[1, 2], &extra), ("positions", &[2, 2], &positions)];
    for (ids, what) in [([0, 4], "token id 4 is not in 0..4"), ([-1, 3], "token id -1 is not in 0..4")] {
        let tokens = |b: &mut Builder, v: &[ValueId]| b.tokens_with(v[3], v[0], v[1], v[2]);
        says(evaluate::<f32>(&rows, &[("ids", &[1, 2], &ids)], tokens), what);
    }
    let weights: (&str, &[usize], &[f64]) = ("weights", &[1, 2], &[1.0, 1.0]);
    let choices: (&str, &[usize], &[i32]) = ("ids", &[1, 2], &[-1, 3]);
    says(evaluate::<f32>(&[weights, rows[0]], &[choices], |b, v| b.mix(v[0], v[2], v[1])), "token id 3 is not in 0..3");
    let d_y: (&str, &[usize], &[f64]) = ("d_y", &[1, 2], &[1.0, 1.0]);
    let back = |op: fn(&[ValueId]) -> Embedding| move |b: &mut Builder, v: &[ValueId]| b.push(Op::Embedding(op(v)))[0];
    let mix = back(|v| Embedding::MixBackward { d_y: v[0], table: v[1], ids: v[2] });
    says(evaluate::<f32>(&[d_y, rows[0]], &[choices], mix), "token id 3 is not in 0..3");
    let at: (&str, &[usize], &[i32]) = ("at", &[1], &[5]);
    let pool = back(|v| Embedding::PoolBackward { d_y: v[0], at: v[1], rows: 5 });
    says(evaluate::<f32>(&[d_y], &[at], pool), "position 5 is not in 0..5");
    let select = back(|v| Embedding::SelectBackward { d_y: v[0], at: v[1], shape: vec![4, 2] });
    says(evaluate::<f32>(&[d_y], &[at], select), "entry 5 is not in 0..4");
}
