//! The cases of the tests on the device: every op of every type is as exact as its storage allows (`tests/common/storage.rs`), has the
//! same bits again, and the same bits in any batch.

use crate::common::cases::{self, Built, Case};
use crate::common::feed::{no_weights, operands, run, try_run};
use crate::common::gradients::{self, Gradient};
use crate::common::naive::{self, Buffers};
use crate::common::products;
use crate::common::storage::{TYPES, round, same_bits, verdict};
use crate::device::Device;
use crate::section::{Item, Row};
use rarebit::exec::cpu::Cpu;
use rarebit::program::{DType, Elementwise, Node, Op, Program};
use std::collections::HashMap;
use std::hash::Hash;

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

/// What an item of one op needs on the device.
struct Prepared {
    name: String,
    dtype: DType,
    built: Built,
    buffers: Buffers,
    exact: Vec<Vec<f64>>,
    honest: Vec<Vec<f64>>,
}

impl Prepared {
    fn judge(self, device: &Device) -> rarebit::Result<Vec<Row>> {
        let mut rows = vec![];
        for (mut cuda, which) in device.cudas(true, &self.built.program) {
            let found = try_run(&mut cuda, &self.built.program, &self.buffers, &no_weights(), 1)?;
            let verdict = verdict(&found, &self.exact, &self.honest);
            let name = format!("{}{which}", self.name);
            rows.push(Row::new(name, self.dtype, verdict.error, verdict.allowed, verdict.what));
        }
        Ok(rows)
    }
}

fn batch_and_source(index: usize, dtype: DType) -> (usize, bool) {
    let number = index + TYPES.iter().position(|of| *of == dtype).unwrap_or_default();
    (1 + number % 5, number.is_multiple_of(2))
}

/// Every op forward, and the backward ops of attention and norms.
pub fn ops(subset: bool) -> Vec<Item> {
    let lists = [cases::all(), cases::registers(), cases::across_samples(), cases::casts()];
    let cases: &[Case] = Vec::leak(lists.into_iter().flatten().collect());
    let chosen = choose(cases, |case| first_word(&case.name), subset);
    let item = |(index, case, dtype): (usize, &'static Case, DType)| {
        let (batch, through_op) = batch_and_source(index, dtype);
        let name = format!("{} batch {batch}", case.name);
        Item::new(name.clone(), dtype, move || {
            let built = case.program(dtype, batch, through_op);
            let buffers = operands(&built, 0, batch);
            let double = case.program(DType::F64, batch, through_op).program;
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
            let prepared = Prepared { name: name.clone(), dtype, built, buffers, exact, honest };
            move |device: &Device| prepared.judge(device)
        })
    };
    chosen.into_iter().map(item).collect()
}

/// The backward ops of elementwise functions, resampling, embeddings and updates.
pub fn gradients(subset: bool) -> Vec<Item> {
    let cases: &[Gradient] = Vec::leak(gradients::all());
    let chosen = choose(cases, |case| first_word(&case.name), subset);
    let item = |(index, case, dtype): (usize, &'static Gradient, DType)| {
        let (batch, through_op) = batch_and_source(index, dtype);
        let name = format!("gradient of {} batch {batch}", case.name);
        Item::new(name.clone(), dtype, move || {
            let built = case.backward(dtype, batch, through_op);
            let mut buffers = operands(&built, 0, batch);
            if let Some(leaf) = buffers.floats.get_mut("leaf") {
                leaf.iter_mut().for_each(|x| *x = round(dtype, (case.domain)(*x)));
            }
            let double = case.backward(DType::F64, batch, through_op).program;
            let exact = run(Cpu::<f64>::new(), &double, &buffers, &no_weights(), 1);
            let type_of = |output: usize| built.program.value(built.program.outputs[output].1).dtype;
            let rounded =
                |(output, values): (usize, &Vec<f64>)| values.iter().map(|x| round(type_of(output), *x)).collect();
            let honest = exact.iter().enumerate().map(rounded).collect();
            let prepared = Prepared { name: name.clone(), dtype, built, buffers, exact, honest };
            move |device: &Device| prepared.judge(device)
        })
    };
    chosen.into_iter().map(item).collect()
}

/// Products and convolutions with weights as checkpoints give them, forward and backward.
pub fn products(subset: bool) -> Vec<Item> {
    let cases: &[products::Case] = Vec::leak(products::cases());
    let chosen = choose(cases, std::mem::discriminant, subset);
    // The gradient to a weight has none to hold.
    let both = |(index, case, dtype): (usize, &'static products::Case, DType)| {
        let holds = if matches!(case, products::Case::Weight(_)) { vec![false] } else { vec![true, false] };
        holds.into_iter().take(if subset { 1 } else { 2 }).map(move |held| (index, case, dtype, held))
    };
    let item = |(index, case, dtype, held): (usize, &'static products::Case, DType, bool)| {
        let number = index + TYPES.iter().position(|of| *of == dtype).unwrap_or_default();
        let how = products::How { held, ..products::How::new(dtype, 1 + number % 3) };
        let name = format!("{case:?} batch {} held {held}", how.batch);
        Item::new(name, dtype, move || {
            let values = products::rounded(case.values(0, how.batch), dtype);
            let model = products::stored(&case.shapes(how.batch)[1], &values.w);
            let double = products::How { dtype: DType::F64, held: false, ..how };
            let exact: Vec<Vec<f64>> = products::programs(case, double)
                .iter()
                .map(|(_, program)| products::run(Cpu::<f64>::new(), program, &values, &model, 1))
                .collect();
            move |device: &Device| {
                let mut rows = vec![];
                for ((what, program), exact) in products::programs(case, how).iter().zip(exact) {
                    let (honest, exact) = ([exact.iter().map(|x| round(dtype, *x)).collect()], [exact]);
                    for (cuda, which) in device.cudas(true, program) {
                        let found = products::run(cuda, program, &values, &model, 1);
                        let verdict = verdict(&[found], &exact, &honest);
                        let name = format!("{what} of {case:?} batch {} held {held}{which}", how.batch);
                        rows.push(Row::new(name, dtype, verdict.error, verdict.allowed, verdict.what));
                    }
                }
                Ok(rows)
            }
        })
    };
    chosen.into_iter().flat_map(both).map(item).collect()
}

/// Bits: twice in a row, and the first and the last sample of four alone.
pub fn invariance(subset: bool) -> Vec<Item> {
    let cases: &[Case] = Vec::leak(cases::all());
    let thinned = |(number, _): &(usize, _)| subset || number % 4 == 0;
    let chosen = choose(cases, |case| first_word(&case.name), subset).into_iter().enumerate().filter(thinned);
    let item = |(_, (_, case, dtype)): (usize, (usize, &'static Case, DType))| {
        let name = case.name.clone();
        Item::new(name.clone(), dtype, move || {
            let name = name.clone();
            move |device: &Device| batches(name, case, dtype, device)
        })
    };
    chosen.map(item).collect()
}

fn batches(name: String, case: &Case, dtype: DType, device: &Device) -> rarebit::Result<Vec<Row>> {
    let model = no_weights();
    let run = |program: &Program, buffers: &Buffers| try_run(&mut device.cuda(true), program, buffers, &model, 1);
    let built = case.program(dtype, 4, true);
    let buffers = operands(&built, 0, 4);
    let together = run(&built.program, &buffers)?;
    let differ = |different: bool| f64::from(u8::from(different));
    let again = differ(!same_bits(&together, &run(&built.program, &buffers)?));
    let mut rows = vec![Row::new(format!("{name}, again"), dtype, again, 0.0, "runs whose bits differ")];
    let mut different = 0.0;
    for sample in [0, 3] {
        let one = case.program(dtype, 1, true);
        let mut buffers = operands(&one, sample, 1);
        for ((_, all), (name, alone)) in built.ints.iter().zip(&one.ints) {
            buffers.ints.insert(name.clone(), all[sample * alone.len()..][..alone.len()].to_vec());
        }
        let alone = run(&one.program, &buffers)?;
        let of_sample: Vec<Vec<f64>> =
            together.iter().zip(&alone).map(|(all, one)| all[sample * one.len()..][..one.len()].to_vec()).collect();
        different += differ(!same_bits(&of_sample, &alone));
    }
    rows.push(Row::new(format!("{name}, alone"), dtype, different, 0.0, "samples whose bits differ from a batch"));
    Ok(rows)
}
