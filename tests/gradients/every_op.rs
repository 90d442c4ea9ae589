//! Gradients against central differences in f64: every op alone, with respect to every operand that has one.

use crate::common::cases::{self, Case};
use crate::common::inputs::{fill, no_weights, noise, run};
use crate::common::naive::Buffers;
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::Cpu;
use rarebit::program::*;

const LIMIT: f64 = 1e-6;
const BATCH: usize = 2;

/// Operands that have no gradient: what is frozen in every model, and coefficients.
fn frozen(op: &Op, name: &str) -> bool {
    match op {
        Op::Conv2d(_) => matches!(name, "w" | "bias"),
        Op::Norm(Norm::Group { .. }) => matches!(name, "gamma" | "beta"),
        Op::Embedding(Embedding::Mix { .. }) => name == "table",
        Op::Update(_) => name == "coefficients",
        _ => false,
    }
}

/// ⟨a, b⟩.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The relative error of `slope` against central differences of `f` along a line, at the best step of a sweep.
fn best_error(f: impl Fn(f64) -> f64, slope: f64) -> f64 {
    let error = |h: f64| {
        let difference = (f(h) - f(-h)) / (2.0 * h);
        (difference - slope).abs() / slope.abs().max(difference.abs()).max(1e-9)
    };
    [1e-2, 1e-3, 1e-4, 1e-5, 1e-6].into_iter().map(error).fold(f64::INFINITY, f64::min)
}

/// Checks the gradient of Σ out0 · c with respect to every float input that has one; returns how many there were.
fn check(case: &Case) -> usize {
    let built = case.program(DType::F64, BATCH, false);
    let program = &built.program;
    let op = &program.nodes[0].op;
    let leaves: Vec<(ValueId, String)> = program
        .inputs
        .iter()
        .filter_map(|&id| match &program.value(id).origin {
            Origin::Input(name) if program.value(id).dtype == DType::F64 && !frozen(op, name) => {
                Some((id, name.clone()))
            }
            _ => None,
        })
        .collect();
    let (_, objective) = program.outputs[0];
    let request = Request {
        objectives: vec![(objective, Cotangent::Input("c".into()))],
        leaves: leaves.iter().map(|(id, name)| (*id, format!("d_{name}"))).collect(),
    };
    let mut gradient = differentiate(program, &request, None).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    gradient.outputs.retain(|(name, _)| name.starts_with("d_"));
    let model = no_weights();
    let mut buffers = fill(&built, 0, BATCH);
    let c = noise("c", 7, program.value(objective).len());
    buffers.floats.insert("c".into(), c.clone());
    let found = run(Cpu::<f64>::new().with_guards(true), &gradient, &only(&gradient, &buffers), &model, 2);
    buffers.floats.remove("c");

    for ((id, name), gradient) in leaves.iter().zip(&found) {
        let along = noise(&format!("along {name}"), 3, program.value(*id).len());
        let f = |h: f64| {
            let mut moved = buffers.clone();
            let x = moved.floats.get_mut(name).unwrap();
            x.iter_mut().zip(&along).for_each(|(x, a)| *x += h * a);
            dot(&run(Cpu::<f64>::new(), program, &moved, &model, 1)[0], &c)
        };
        let error = best_error(f, dot(gradient, &along));
        assert!(error <= LIMIT, "{}: the gradient to {name} is off by {error:e}", case.name);
    }
    leaves.len()
}

/// The buffers a program has.
fn only(program: &Program, buffers: &Buffers) -> Buffers {
    let named =
        |name: &String| program.inputs.iter().any(|id| program.value(*id).origin == Origin::Input(name.clone()));
    let mut out = buffers.clone();
    out.floats.retain(|name, _| named(name));
    out.ints.retain(|name, _| named(name));
    out
}

fn check_all(cases: Vec<Case>) {
    let leaves: usize = cases.iter().map(check).sum();
    println!("{} cases, {leaves} gradients", cases.len());
    assert!(leaves >= cases.len());
}

#[test]
fn gemm() {
    check_all(cases::gemms());
}

#[test]
fn conv2d() {
    check_all(cases::convolutions());
}

#[test]
fn attention() {
    check_all(cases::attentions());
}

#[test]
fn norm() {
    check_all(cases::norms());
}

#[test]
fn elementwise() {
    check_all(cases::elementwise());
}

#[test]
fn everything_else() {
    check_all(cases::rest());
    check_all(cases::moves_and_sums());
}
