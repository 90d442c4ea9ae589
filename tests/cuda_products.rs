//! Products and convolutions on the emulated driver, forward and backward, with weights as checkpoints give them and as plain
//! inputs: as exact as their storage allows, the same bits in any order of threads and in any batch.

mod common;

use common::emulated::{cuda, wanted};
use common::feed::no_weights;
use common::products::{self, Case, How, programs, rounded, run, stored};
use common::storage::{TYPES, judge, report, round};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::{Copies, Cuda, Order, Settings};
use rarebit::plan::plan;
use rarebit::program::{Activation, DType, Program};
use rarebit::weights::Model;
use std::collections::BTreeSet;

/// By `RAREBIT_CASES`.
fn cases() -> impl Iterator<Item = Case> {
    products::cases().into_iter().filter(|case| wanted(&format!("{case:?}")))
}

#[test]
fn as_exact_as_storage_allows() {
    let mut wrong = vec![];
    for (index, case) in cases().enumerate() {
        for (number, dtype) in TYPES.into_iter().enumerate() {
            let how = How::new(dtype, 1 + (index + number) % 3);
            let values = rounded(case.values(0, how.batch), dtype);
            let model = stored(&case.shapes(how.batch)[1], &values.w);
            let double = programs(&case, How { dtype: DType::F64, ..how });
            let exact: Vec<Vec<f64>> =
                double.iter().map(|(_, double)| run(Cpu::<f64>::new(), double, &values, &model, 1)).collect();
            // The gradient to a weight has none to hold.
            for held in [false, true].into_iter().filter(|held| !held || !matches!(case, Case::Weight(_))) {
                for ((name, program), exact) in programs(&case, How { held, ..how }).iter().zip(&exact) {
                    let honest = exact.iter().map(|x| round(dtype, *x)).collect();
                    let found = run(cuda(Settings::default()).with_guards(true), program, &values, &model, 1);
                    let off = judge(&[found], std::slice::from_ref(exact), &[honest]);
                    wrong.extend(off.map(|what| format!("{name} of {case:?} {dtype} held {held}: {what}")));
                }
            }
        }
    }
    report(wrong);
}

#[test]
fn bits_depend_on_neither_the_order_of_threads_nor_the_batch() {
    let mut wrong = vec![];
    for (index, case) in cases().enumerate() {
        let is_weight = matches!(case, Case::Weight(_));
        let how = How { held: index % 2 == 0 && !is_weight, ..How::new(TYPES[index % 3], 3) };
        let values = rounded(case.values(0, 3), how.dtype);
        let model = if is_weight { no_weights() } else { stored(&case.shapes(3)[1], &values.w) };
        let one = rounded(case.values(2, 1), how.dtype);
        for ((name, program), (_, alone)) in programs(&case, how).iter().zip(programs(&case, How { batch: 1, ..how })) {
            let expected = run(cuda(Settings::default()), program, &values, &model, 2);
            for settings in
                [Settings::new(Order::Reverse, Copies::Early, 1), Settings::new(Order::Random, Copies::Either, 2)]
            {
                if run(cuda(settings), program, &values, &model, 1) != expected {
                    wrong.push(format!("{name} of {case:?} differs with {settings:?}"));
                }
            }
            let sums_over_the_batch = is_weight && name == "backward";
            let found = run(cuda(Settings::default()), &alone, &one, &model, 1);
            if !sums_over_the_batch && found != expected[2 * found.len()..] {
                wrong.push(format!("{name} of {case:?}: the third sample differs alone"));
            }
        }
    }
    report(wrong);
}

/// Kernels that a program launches, and whether each is split.
fn kernels(executor: &mut Cuda, program: Program, model: &Model) -> Vec<(String, bool)> {
    let planned = plan(program, |program, node| executor.workspace(program, node));
    let id = executor.load(planned, model).unwrap();
    executor.launches(id).flatten().map(|launch| (launch.kernel.clone(), launch.grid[2] > 1)).collect()
}

#[test]
fn cases_reach_every_kernel() {
    let mut reached = BTreeSet::new();
    for case in products::cases() {
        let held = stored(&case.shapes(1)[1], &case.values(0, 1).w);
        for (dtype, batch) in TYPES.into_iter().flat_map(|dtype| [1, 3].map(|batch| (dtype, batch))) {
            for model in [Some(&held), None].into_iter().filter(|m| m.is_none() || !matches!(case, Case::Weight(_))) {
                let how = How { held: model.is_some(), ..How::new(dtype, batch) };
                for (_, program) in programs(&case, how) {
                    let mut executor = cuda(Settings::default());
                    reached.extend(kernels(&mut executor, program, model.unwrap_or(&no_weights())));
                }
            }
        }
    }
    let kinds = ["gemm_rr", "gemm_ra", "gemm_aa", "conv2d_r", "conv2d_a", "conv2d_backward_r", "conv2d_backward_a"];
    for dtype in TYPES {
        // f32 has no large tile, and no case is large enough to split one.
        let tiles: &[_] = if dtype == DType::F32 { &["64"] } else { &["64", "128"] };
        for (kind, tile) in kinds.iter().flat_map(|kind| tiles.iter().map(move |tile| (kind, tile))) {
            for split in [false, true].into_iter().filter(|split| !split || *tile == "64") {
                let kernel = (format!("{kind}_{tile}_{dtype}"), split);
                assert!(reached.contains(&kernel), "no case launches {} split {split}", kernel.0);
            }
        }
        assert!(reached.contains(&(format!("finish_{dtype}"), false)));
    }
}

/// A batch may have another tile than its samples alone, with the same splits: the same bits.
#[test]
fn bits_do_not_depend_on_the_tile() {
    let case = Case::Input([620, 1472, 160]);
    let how = How::new(DType::F16, 3);
    let [together, alone] = [3, 1].map(|batch| How { batch, ..how }.forward(&case, Activation::None));
    let ends = [(&together, "gemm_ra_128_f16"), (&alone, "gemm_ra_64_f16")];
    for (program, kernel) in ends {
        let launched = kernels(&mut cuda(Settings::default()), program.clone(), &no_weights());
        assert_eq!(launched[0], (kernel.to_string(), true));
    }
    let [values, one] = [case.values(0, 3), case.values(2, 1)].map(|values| rounded(values, how.dtype));
    let expected = run(cuda(Settings::default()), &together, &values, &no_weights(), 1);
    let found = run(cuda(Settings::default()), &alone, &one, &no_weights(), 1);
    assert!(found == expected[2 * found.len()..]);
}
