//! Products and convolutions on the emulated driver, forward and backward, with weights as checkpoints give them and as plain
//! inputs: as exact as their storage allows, the same bits in any order of threads and in any batch.

mod common;

use common::emulated::{cuda, wanted};
use common::feed::no_weights;
use common::products::{self, Case, How, programs, rounded, run, stored};
use common::storage::{TYPES, judge, report, round};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::{Copies, Order, Settings};
use rarebit::program::DType;

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
