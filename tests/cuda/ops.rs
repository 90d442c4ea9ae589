//! The kernels, on the emulated driver: every op of every type is as exact as its storage allows, writes only what is its own, and
//! has the same bits in whatever order threads run and copies land, and in whatever batch.
//!
//! `RAREBIT_CASES` runs only the cases whose names contain one of its parts, separated by `|`.

use crate::common::cases::{Built, Case};
use crate::common::emulated::{cuda, cudas, wanted};
use crate::common::gradients::{self, Gradient};
use crate::common::inputs::{no_weights, operands, run, try_run};
use crate::common::tolerance::{TYPES, judge, report, round, same_bits, side_by_side};
use crate::common::{cases, naive};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::{Copies, Cuda, Order, Settings};
use rarebit::program::*;

/// Cases in which each sample is its own.
fn alone() -> impl Iterator<Item = Case> {
    cases::all().into_iter().chain(cases::registers()).filter(|case| wanted(&case.name))
}

fn every_case() -> impl Iterator<Item = Case> {
    let others = cases::across_samples().into_iter().chain(cases::casts());
    alone().chain(others.filter(|case| wanted(&case.name)))
}

fn every_gradient() -> impl Iterator<Item = Gradient> {
    gradients::all().into_iter().filter(|case| wanted(&case.name))
}

#[test]
fn as_exact_as_storage_allows() {
    let model = no_weights();
    report(side_by_side(every_case(), |index, case| {
        let mut wrong = vec![];
        for (number, dtype) in TYPES.into_iter().enumerate() {
            let (batch, through_op) = (1 + (index + number) % 5, (index + number) % 2 == 0);
            let built = case.program(dtype, batch, through_op);
            let buffers = operands(&built, 0, batch);
            let double = case.program(DType::F64, batch, through_op).program;
            let outputs = |values: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
                built.program.outputs.iter().map(|(_, id)| values[id.index()].clone()).collect()
            };
            let exact = outputs(naive::evaluate(&double, &buffers));
            let honest = outputs(naive::evaluate_rounded(&built.program, &buffers, round));
            for cuda in cudas(Settings::default(), &built.program) {
                let name = format!("{} {dtype} batch {batch} Hopper {:?}", case.name, cuda.hopper());
                match try_run(&mut cuda.with_guards(true), &built.program, &buffers, &model, 1) {
                    Ok(found) => wrong.extend(judge(&found, &exact, &honest).map(|what| format!("{name}: {what}"))),
                    Err(error) => wrong.push(format!("{name}: {error}")),
                }
            }
        }
        wrong
    }));
}

#[test]
fn gradients_as_exact_as_storage_allows() {
    let model = no_weights();
    report(side_by_side(every_gradient(), |index, case| {
        let mut wrong = vec![];
        for (number, dtype) in TYPES.into_iter().enumerate() {
            let (batch, through_op) = (1 + (index + number) % 5, (index + number) % 2 == 0);
            let built = case.backward(dtype, batch, through_op);
            let mut buffers = operands(&built, 0, batch);
            if let Some(leaf) = buffers.floats.get_mut("leaf") {
                leaf.iter_mut().for_each(|x| *x = round(dtype, (case.domain)(*x)));
            }
            let double = case.backward(DType::F64, batch, through_op).program;
            let exact = run(Cpu::<f64>::new(), &double, &buffers, &model, 1);
            let type_of = |output: usize| built.program.value(built.program.outputs[output].1).dtype;
            let rounded =
                |(output, values): (usize, &Vec<f64>)| values.iter().map(|x| round(type_of(output), *x)).collect();
            let honest: Vec<Vec<f64>> = exact.iter().enumerate().map(rounded).collect();
            let mut executor = cuda(Settings::default()).with_guards(true);
            let name = format!("gradient of {} {dtype} batch {batch}", case.name);
            match try_run(&mut executor, &built.program, &buffers, &model, 1) {
                Ok(found) => wrong.extend(judge(&found, &exact, &honest).map(|what| format!("{name}: {what}"))),
                Err(error) => wrong.push(format!("{name}: {error}")),
            }
        }
        wrong
    }));
}

/// Threads in any order, copies at any time, one warp far ahead: the same bits, twice in a row.
#[test]
fn bits_do_not_depend_on_the_order_of_threads() {
    let model = no_weights();
    let check = |name: &str, built: Built| {
        let mut wrong = vec![];
        let buffers = operands(&built, 0, 2);
        for hopper in cudas(Settings::default(), &built.program).iter().map(Cuda::hopper) {
            let name = format!("{name} Hopper {hopper:?}");
            let result = |settings, times| {
                let mut executor = cuda(settings).with_hopper(hopper).with_guards(times == 1);
                try_run(&mut executor, &built.program, &buffers, &model, times)
            };
            let expected = result(Settings::default(), 2);
            let others = [
                Settings::new(Order::Reverse, Copies::Early, 1),
                Settings::new(Order::Random, Copies::Either, 2),
                Settings::new(Order::Random, Copies::Early, 3),
            ];
            for settings in others {
                match (&expected, result(settings, 1)) {
                    (Ok(expected), Ok(found)) if same_bits(expected, &found) => {}
                    (Ok(_), Ok(_)) => wrong.push(format!("{name} differs with {settings:?}")),
                    (Err(error), _) => wrong.push(format!("{name}: {error}")),
                    (_, Err(error)) => wrong.push(format!("{name} with {settings:?}: {error}")),
                }
            }
        }
        wrong
    };
    report(side_by_side(every_case(), |index, case| {
        check(&case.name, case.program(TYPES[index % 3], 2, index % 2 == 0))
    }));
    report(side_by_side(every_gradient(), |index, case| {
        check(&case.name, case.backward(TYPES[index % 3], 2, index % 2 == 0))
    }));
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let model = no_weights();
    let mut wrong = vec![];
    for (index, case) in alone().enumerate() {
        let dtype = TYPES[index % 3];
        let built = case.program(dtype, 4, true);
        let together = match try_run(&mut cuda(Settings::default()), &built.program, &operands(&built, 0, 4), &model, 1)
        {
            Ok(together) => together,
            Err(error) => {
                wrong.push(format!("{}: {error}", case.name));
                continue;
            }
        };
        for sample in [0, 3] {
            let one = case.program(dtype, 1, true);
            let mut buffers = operands(&one, sample, 1);
            for ((_, all), (name, alone)) in built.ints.iter().zip(&one.ints) {
                buffers.ints.insert(name.clone(), all[sample * alone.len()..][..alone.len()].to_vec());
            }
            let alone = run(cuda(Settings::default()), &one.program, &buffers, &model, 1);
            let of_sample: Vec<Vec<f64>> = together
                .iter()
                .zip(&alone)
                .map(|(together, alone)| together[sample * alone.len()..][..alone.len()].to_vec())
                .collect();
            if !same_bits(&of_sample, &alone) {
                wrong.push(format!("{}: sample {sample} differs in a batch", case.name));
            }
        }
    }
    report(wrong);
}
