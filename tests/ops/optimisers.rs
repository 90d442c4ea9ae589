//! Optimisers step as torch's do (`tests/data/optimisers.json`, by `tools/reference/dump_optimisers.py`) and as the released code
//! of DPO-Diff; parameters and state are named buffers that a run replaces.

use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::Model;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Appends an optimiser to parameter, gradient and state; returns the next parameter and state.
type Step = fn(&mut Builder, [ValueId; 2], &[ValueId; 2], ValueId) -> Vec<ValueId>;

/// The scalars of a step, counted from 1.
type Scalars = fn(i32) -> Vec<f64>;

fn adamw(b: &mut Builder, [p, g]: [ValueId; 2], &[m, v]: &[ValueId; 2], scalars: ValueId) -> Vec<ValueId> {
    b.adamw([p, g, m, v], scalars).to_vec()
}

fn rmsprop(b: &mut Builder, [p, g]: [ValueId; 2], &[v, buffer]: &[ValueId; 2], scalars: ValueId) -> Vec<ValueId> {
    b.rmsprop([p, g, v, buffer], scalars).to_vec()
}

fn nesterov(b: &mut Builder, [p, g]: [ValueId; 2], &[buffer, _]: &[ValueId; 2], scalars: ValueId) -> Vec<ValueId> {
    b.nesterov([p, g, buffer], scalars).to_vec()
}

/// No bound.
const FREE: f64 = f64::INFINITY;

/// Parameters after every step.
fn trace<T: Real>(step: Step, start: &[f64], gradients: &[Vec<f64>], scalars: Scalars) -> Vec<Vec<f64>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    serialize_to_file([("model.diffusion_model.unused", view)], None, &path).unwrap();

    let mut b = Builder::new("step", T::DTYPE);
    let names = ["p", "a", "b"];
    let [p, g, first, second] = ["p", "g", "a", "b"].map(|name| b.input(name, &[start.len()]));
    let numbers = b.scalars("scalars", scalars(1).len());
    let next = step(&mut b, [p, g], &[first, second], numbers);
    next.iter().zip(names).for_each(|(&id, name)| b.output(name, id));
    let mut cpu = Cpu::<T>::new().with_guards(true);
    let planned = plan(b.finish().unwrap(), |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, &Model::open(&path).unwrap()).unwrap();
    cpu.write("p", Data::F64(start)).unwrap();
    let step = |(i, gradient): (usize, &Vec<f64>)| {
        cpu.write("g", Data::F64(gradient)).unwrap();
        cpu.write("scalars", Data::F64(&scalars(i as i32 + 1))).unwrap();
        cpu.run(id).unwrap();
        let mut p = vec![0.0; start.len()];
        cpu.read("p", DataMut::F64(&mut p)).unwrap();
        p
    };
    gradients.iter().enumerate().map(step).collect()
}

/// The largest difference over all steps.
fn worst(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| if a.is_nan() { f64::INFINITY } else { (a - b).abs() }).fold(0.0, f64::max)
}

#[test]
fn steps_are_those_of_torch() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../data/optimisers.json")).unwrap();
    let start: Vec<f64> = serde_json::from_value(golden["start"].clone()).unwrap();
    let gradients: Vec<Vec<f64>> = serde_json::from_value(golden["gradients"].clone()).unwrap();
    let optimisers: [(&str, Step, Scalars); 3] = [
        ("adamw", adamw, |t| vec![0.01, 0.1, 0.001, 1e-8, 0.1, 1.0 - 0.9f64.powi(t), 1.0 - 0.999f64.powi(t)]),
        ("rmsprop", rmsprop, |_| vec![0.1, 0.99, 0.5, 1e-8, FREE, -FREE, FREE]),
        ("nesterov", nesterov, |_| vec![0.05, 0.9]),
    ];
    for (name, step, scalars) in optimisers {
        let expected: Vec<Vec<f64>> = serde_json::from_value(golden[name].clone()).unwrap();
        let double = worst(&trace::<f64>(step, &start, &gradients, scalars), &expected);
        let single = worst(&trace::<f32>(step, &start, &gradients, scalars), &expected);
        assert!(double < 1e-12 && single < 2e-5, "{name}: f64 {double:e} f32 {single:e}");
        // Many elements step as few do, whatever the threads.
        let many = |values: &[f64]| values.repeat(3000);
        let gradients: Vec<Vec<f64>> = gradients.iter().take(3).map(|g| many(g)).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| trace::<f32>(step, &many(&start), &gradients, scalars))
        };
        let alone = run(1);
        assert!(alone == run(2) && alone == run(3), "{name}");
        assert!(alone[2].chunks_exact(start.len()).all(|p| p == &alone[2][..start.len()]), "{name}");
    }
}

/// The moves a constant gradient makes.
fn moves(gradient: f64, steps: usize) -> Vec<f64> {
    let scalars = |_| vec![0.1, 0.99, 0.5, 1e-8, 0.025, -FREE, FREE];
    let after = trace::<f64>(rmsprop, &[1.0], &vec![vec![gradient]; steps], scalars);
    let before = [vec![vec![1.0]], after.clone()].concat();
    before.iter().zip(&after).map(|(before, after)| before[0] - after[0]).collect()
}

#[test]
fn rmsprop_moves_as_in_dpo_diff() {
    let near = |found: &[f64], expected: &[f64]| {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");
    };
    near(&moves(0.01, 5), &[1.0, 1.2089, 1.1847, 1.0961, 0.9998]);
    near(&moves(1e-8, 3), &[0.0909, 0.1331, 0.1518]);
    assert_eq!(moves(7.0, 4), moves(0.025, 4), "the gradient is bounded");
    let scalars = |_| vec![0.1, 0.99, 0.5, 1e-8, 0.025, 0.0, 3.0];
    let held = trace::<f64>(rmsprop, &[1.0, 2.0], &vec![vec![0.01, -0.01]; 6], scalars);
    assert!(held.iter().flatten().all(|p| (0.0..=3.0).contains(p)) && held[5] == [0.0, 3.0]);
}

/// A gradient that is not a number is not hidden by the bounds.
#[test]
fn nan_stays() {
    let scalars = |_| vec![0.1, 0.99, 0.5, 1e-8, 0.025, 0.0, 3.0];
    assert!(trace::<f32>(rmsprop, &[1.0], &[vec![f64::NAN]], scalars)[0][0].is_nan());
}
