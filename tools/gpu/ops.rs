//! The cases of the tests on the device: every op of every type is as exact as its storage allows (`tests/common/storage.rs`), by the
//! kernels for any GPU and by those for Hopper, has the same bits again, and the same bits in any batch.

use crate::common::cases::{self, Case};
use crate::common::gradients::{self, Gradient};
use crate::common::inputs::{no_weights, operands, run, try_run};
use crate::common::naive::{self, Buffers};
use crate::common::products::{self, How};
use crate::common::tolerance::{TYPES, differing_bits, round, verdict};
use crate::device::Device;
use crate::launches::{suffix, under_test, variants};
use crate::section::{Item, Row, Run};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::Hopper;
use rarebit::program::{DType, Elementwise, Node, Op, Program};
use rarebit::weights::Model;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

/// Of every kind the first, the middle and the last, in one type each; all of them in all types where `subset` is false.
fn choose<T, K: Eq + Hash>(
    cases: &'static [T],
    kind: impl Fn(&T) -> K,
    subset: bool,
) -> Vec<(usize, &'static T, DType)> {
    let all = cases.iter().enumerate();
    if !subset {
        return all.flat_map(|(index, case)| TYPES.map(|dtype| (index, case, dtype))).collect();
    }
    let mut kinds: HashMap<K, Vec<usize>> = HashMap::new();
    all.for_each(|(index, case)| kinds.entry(kind(case)).or_default().push(index));
    let mut chosen: Vec<usize> = kinds.values().flat_map(|of| [of[0], of[of.len() / 2], of[of.len() - 1]]).collect();
    chosen.sort_unstable();
    chosen.dedup();
    chosen.into_iter().enumerate().map(|(n, index)| (index, &cases[index], TYPES[n % 3])).collect()
}

/// The first word of a name: the op.
fn first_word(name: &str) -> String {
    name.split([' ', ',']).next().unwrap_or_default().to_string()
}

/// A case in one type: programs of one op, with the same operands.
#[derive(Clone)]
pub enum Spec {
    Op(&'static Case, How),
    Gradient(&'static Gradient, How),
    /// All of its programs, or the one of that name.
    Product(&'static products::Case, How, Option<&'static str>),
}

/// One program and what must come of it.
struct Prepared {
    name: String,
    dtype: DType,
    program: Program,
    buffers: Buffers,
    model: Arc<Model>,
    exact: Vec<Vec<f64>>,
    honest: Vec<Vec<f64>>,
}

impl Spec {
    fn name(&self) -> String {
        match self {
            Spec::Op(case, how) => format!("{} batch {}", case.name, how.batch),
            Spec::Gradient(case, how) => format!("gradient of {} batch {}", case.name, how.batch),
            Spec::Product(case, how, program) => {
                let of = program.map_or(String::new(), |program| format!("{program} of "));
                format!("{of}{case:?} batch {} held {}", how.batch, how.held)
            }
        }
    }

    fn dtype(&self) -> DType {
        let (Spec::Op(_, how) | Spec::Gradient(_, how) | Spec::Product(_, how, _)) = self;
        how.dtype
    }

    pub fn programs(&self) -> Vec<Program> {
        match self {
            Spec::Op(case, how) => vec![case.program(how.dtype, how.batch, how.through_op).program],
            Spec::Gradient(case, how) => vec![case.backward(how.dtype, how.batch, how.through_op).program],
            Spec::Product(case, how, which) => {
                chosen(case, *how, *which).into_iter().map(|(_, program)| program).collect()
            }
        }
    }

    pub fn item(self) -> Item {
        let prepare = {
            let spec = self.clone();
            move || Ok(spec.prepare().into_iter().flat_map(Prepared::runs).collect())
        };
        Item::new(self.name(), self.dtype(), prepare)
    }

    fn prepare(&self) -> Vec<Prepared> {
        match self {
            Spec::Op(case, how) => vec![prepare_op(self.name(), case, *how)],
            Spec::Gradient(case, how) => vec![prepare_gradient(self.name(), case, *how)],
            Spec::Product(case, how, which) => prepare_product(case, *how, *which),
        }
    }
}

fn prepare_op(name: String, case: &Case, how: How) -> Prepared {
    let built = case.program(how.dtype, how.batch, how.through_op);
    let buffers = operands(&built, 0, how.batch);
    let double = case.program(DType::F64, how.batch, how.through_op).program;
    let outputs = |values: Vec<Vec<f64>>| {
        built.program.outputs.iter().map(|(_, id)| values[id.index()].clone()).collect::<Vec<_>>()
    };
    // The CPU's executor is of one type; plain loops cast.
    let is_cast = |node: &Node| matches!(node.op, Op::Elementwise(Elementwise::Cast { .. }));
    let exact = if double.nodes.iter().any(is_cast) {
        outputs(naive::evaluate(&double, &buffers))
    } else {
        run(Cpu::<f64>::new(), &double, &buffers, &no_weights(), 1)
    };
    let honest = outputs(naive::evaluate_rounded(&built.program, &buffers, round));
    let model = Arc::new(no_weights());
    Prepared { name, dtype: how.dtype, program: built.program, buffers, model, exact, honest }
}

fn prepare_gradient(name: String, case: &Gradient, how: How) -> Prepared {
    let built = case.backward(how.dtype, how.batch, how.through_op);
    let mut buffers = operands(&built, 0, how.batch);
    if let Some(leaf) = buffers.floats.get_mut("leaf") {
        leaf.iter_mut().for_each(|x| *x = round(how.dtype, (case.domain)(*x)));
    }
    let double = case.backward(DType::F64, how.batch, how.through_op).program;
    let exact = run(Cpu::<f64>::new(), &double, &buffers, &no_weights(), 1);
    let type_of = |output: usize| built.program.value(built.program.outputs[output].1).dtype;
    let rounded = |(output, values): (usize, &Vec<f64>)| values.iter().map(|x| round(type_of(output), *x)).collect();
    let honest = exact.iter().enumerate().map(rounded).collect();
    let model = Arc::new(no_weights());
    Prepared { name, dtype: how.dtype, program: built.program, buffers, model, exact, honest }
}

/// The programs of a product, or the one of that name.
fn chosen(case: &products::Case, how: How, which: Option<&str>) -> Vec<(String, Program)> {
    let mut programs = products::programs(case, how);
    programs.retain(|(name, _)| which.is_none_or(|which| which == name));
    programs
}

fn prepare_product(case: &products::Case, how: How, which: Option<&str>) -> Vec<Prepared> {
    let dtype = how.dtype;
    let products::Values { x, w, d_y, residual } = products::rounded(case.values(0, how.batch), dtype);
    let model = products::stored(&case.shapes(how.batch)[1], &w);
    let (model, none) = (Arc::new(model), no_weights());
    let operands = [("x", x), ("w", w), ("d_y", d_y), ("residual", residual)];
    let double = How { dtype: DType::F64, held: false, ..how };
    let programs = chosen(case, how, which).into_iter().zip(chosen(case, double, which));
    let prepared = programs.map(|((what, program), (_, double))| {
        let of = |program: &Program| {
            let is_input = |(name, _): &&(&str, Vec<f64>)| program.input(name).is_some();
            let floats = operands.iter().filter(is_input).map(|(name, values)| (name.to_string(), values.clone()));
            Buffers { floats: floats.collect(), ..Buffers::default() }
        };
        let exact = run(Cpu::<f64>::new(), &double, &of(&double), &none, 1);
        let honest = exact.iter().map(|values| values.iter().map(|x| round(dtype, *x)).collect()).collect();
        let name = format!("{what} of {case:?} batch {} held {}", how.batch, how.held);
        Prepared { name, dtype, buffers: of(&program), program, model: model.clone(), exact, honest }
    });
    prepared.collect()
}

impl Prepared {
    /// By the kernels for any GPU; by those for Hopper, also held against what those for any GPU gave on the same device.
    fn runs(self) -> Vec<Run> {
        let prepared = Arc::new(self);
        let by_any: Arc<Mutex<Option<Vec<Vec<f64>>>>> = Arc::default();
        let run = |hopper| {
            let (prepared, by_any) = (prepared.clone(), by_any.clone());
            let about = under_test(&prepared.program, hopper);
            let name = format!("{}{}", prepared.name, suffix(hopper));
            let on_device = move |device: &Device| {
                let found = prepared.found(device, hopper)?;
                let mut by_any = by_any.lock().map_err(|error| rarebit::Error::Device(error.to_string()))?;
                let rows = prepared.judge(&found, by_any.as_deref(), hopper);
                *by_any = Some(found);
                Ok(rows)
            };
            Run::new(name, on_device).about(about).for_hopper(hopper != Hopper::Off)
        };
        variants(&prepared.program).into_iter().map(run).collect()
    }

    fn found(&self, device: &Device, hopper: Hopper) -> rarebit::Result<Vec<Vec<f64>>> {
        try_run(&mut device.cuda(true, hopper), &self.program, &self.buffers, &self.model, 1)
    }

    fn judge(&self, found: &[Vec<f64>], by_any: Option<&[Vec<f64>]>, hopper: Hopper) -> Vec<Row> {
        let row = |what: &str, expected: &[Vec<f64>], honest: &[Vec<f64>]| {
            let verdict = verdict(found, expected, honest);
            let name = format!("{}{}{what}", self.name, suffix(hopper));
            Row::new(name, self.dtype, verdict.error, verdict.allowed, verdict.what)
        };
        let mut rows = vec![row("", &self.exact, &self.honest)];
        if let Some(by_any) = by_any {
            // As far from each other as both may be from exact: twice what storage makes, from where the other one is.
            let moved = |((any, exact), honest): ((&Vec<f64>, &Vec<f64>), &Vec<f64>)| {
                any.iter().zip(exact).zip(honest).map(|((any, exact), honest)| any + 2.0 * (honest - exact)).collect()
            };
            let honest: Vec<Vec<f64>> = by_any.iter().zip(&self.exact).zip(&self.honest).map(moved).collect();
            rows.push(row(" beside any GPU's", by_any, &honest));
        }
        rows
    }
}

/// Batch and whether operands come out of an op: every case and type another.
fn how(index: usize, dtype: DType) -> How {
    let number = index + TYPES.iter().position(|of| *of == dtype).unwrap_or_default();
    How { through_op: number.is_multiple_of(2), ..How::new(dtype, 1 + number % 5) }
}

fn op_specs(subset: bool) -> Vec<Spec> {
    let lists = [cases::all(), cases::registers(), cases::across_samples(), cases::casts()];
    let cases: &[Case] = Vec::leak(lists.into_iter().flatten().collect());
    let chosen = choose(cases, |case| first_word(&case.name), subset).into_iter();
    chosen.map(|(index, case, dtype)| Spec::Op(case, how(index, dtype))).collect()
}

fn gradient_specs(subset: bool) -> Vec<Spec> {
    let cases: &[Gradient] = Vec::leak(gradients::all());
    let chosen = choose(cases, |case| first_word(&case.name), subset).into_iter();
    chosen.map(|(index, case, dtype)| Spec::Gradient(case, how(index, dtype))).collect()
}

fn product_specs(subset: bool) -> Vec<Spec> {
    let cases: &[products::Case] = Vec::leak(products::cases());
    let chosen = choose(cases, std::mem::discriminant, subset).into_iter();
    // The gradient to a weight has none to hold.
    let both = |(index, case, dtype): (usize, &'static products::Case, DType)| {
        let holds = if matches!(case, products::Case::Weight(_)) { vec![false] } else { vec![true, false] };
        let number = index + TYPES.iter().position(|of| *of == dtype).unwrap_or_default();
        let how = move |held| How { held, ..How::new(dtype, 1 + number % 3) };
        holds.into_iter().take(if subset { 1 } else { 2 }).map(move |held| Spec::Product(case, how(held), None))
    };
    chosen.flat_map(both).collect()
}

/// Every case of the three sections below in every type, products also in batches large enough for the larger tile.
pub fn specs() -> Vec<Spec> {
    let products = product_specs(false);
    let larger = products.iter().map(|spec| match *spec {
        Spec::Product(case, how, which) => Spec::Product(case, How { batch: 3, ..how }, which),
        Spec::Op(..) | Spec::Gradient(..) => spec.clone(),
    });
    let larger = larger.collect();
    [op_specs(false), gradient_specs(false), products, larger].concat()
}

/// Every op forward, and the backward ops of attention and norms.
pub fn ops(subset: bool) -> Vec<Item> {
    op_specs(subset).into_iter().map(Spec::item).collect()
}

/// The backward ops of elementwise functions, resampling, embeddings and updates.
pub fn gradients(subset: bool) -> Vec<Item> {
    gradient_specs(subset).into_iter().map(Spec::item).collect()
}

/// Products and convolutions with weights as checkpoints give them, forward and backward.
pub fn products(subset: bool) -> Vec<Item> {
    product_specs(subset).into_iter().map(Spec::item).collect()
}

/// Bits: twice in a row, and the first and the last sample of four alone.
pub fn invariance(subset: bool) -> Vec<Item> {
    let cases: &[Case] = Vec::leak(cases::all());
    let thinned = |(number, _): &(usize, _)| subset || number % 4 == 0;
    let chosen = choose(cases, |case| first_word(&case.name), subset);
    let item = |(_, (_, case, dtype)): (usize, (usize, &'static Case, DType))| {
        Item::new(case.name.clone(), dtype, move || {
            let program = case.program(dtype, 4, true).program;
            let run = |hopper| {
                let name = format!("{}{}", case.name, suffix(hopper));
                Run::new(name.clone(), move |device| batches(&name, case, dtype, hopper, device))
                    .about(under_test(&program, hopper))
                    .for_hopper(hopper != Hopper::Off)
            };
            Ok(variants(&program).into_iter().map(run).collect())
        })
    };
    chosen.into_iter().enumerate().filter(thinned).map(item).collect()
}

fn batches(name: &str, case: &Case, dtype: DType, hopper: Hopper, device: &Device) -> rarebit::Result<Vec<Row>> {
    let model = no_weights();
    let run =
        |program: &Program, buffers: &Buffers| try_run(&mut device.cuda(true, hopper), program, buffers, &model, 1);
    let built = case.program(dtype, 4, true);
    let buffers = operands(&built, 0, 4);
    let together = run(&built.program, &buffers)?;
    let row = |name: String, differing: Vec<String>, what: &str| {
        let what = differing.first().map_or(what, |first| first);
        Row::new(name, dtype, differing.len() as f64, 0.0, what)
    };
    let again = differing_bits(&run(&built.program, &buffers)?, &together);
    let mut rows = vec![row(format!("{name}, again"), again.into_iter().collect(), "runs whose bits differ")];
    let mut differing = vec![];
    for sample in [0, 3] {
        let one = case.program(dtype, 1, true);
        let mut buffers = operands(&one, sample, 1);
        for ((_, all), (name, alone)) in built.ints.iter().zip(&one.ints) {
            buffers.ints.insert(name.clone(), all[sample * alone.len()..][..alone.len()].to_vec());
        }
        let alone = run(&one.program, &buffers)?;
        let of_sample: Vec<Vec<f64>> =
            together.iter().zip(&alone).map(|(all, one)| all[sample * one.len()..][..one.len()].to_vec()).collect();
        differing.extend(differing_bits(&of_sample, &alone).map(|what| format!("sample {sample}: {what}")));
    }
    rows.push(row(format!("{name}, alone"), differing, "samples whose bits differ from a batch"));
    Ok(rows)
}
