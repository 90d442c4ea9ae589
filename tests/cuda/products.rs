//! Products and convolutions on the emulated driver, forward and backward, with weights as checkpoints give them and as plain
//! inputs, by the kernels for any GPU and by those for Hopper: as exact as their storage allows, the same bits in any order of
//! threads and in any batch.

use crate::common::emulated::{cuda, cudas, wanted};
use crate::common::inputs::no_weights;
use crate::common::products::{self, Case, How, programs, rounded, run, stored};
use crate::common::tolerance::{TYPES, judge, report, round, side_by_side};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::{Copies, Cuda, Hopper, Order, Settings, product};
use rarebit::plan::plan;
use rarebit::program::{Activation, DType, Program};
use rarebit::weights::Model;
use std::collections::{BTreeSet, HashMap};

/// By `RAREBIT_CASES`.
fn cases() -> impl Iterator<Item = Case> {
    products::cases().into_iter().filter(|case| wanted(&format!("{case:?}")))
}

#[test]
fn as_exact_as_storage_allows() {
    report(side_by_side(cases(), |index, case| {
        let mut wrong = vec![];
        for (number, dtype) in TYPES.into_iter().enumerate() {
            let how = How::new(dtype, 1 + (index + number) % 3);
            let values = rounded(case.values(0, how.batch), dtype);
            let model = stored(&case.shapes(how.batch)[1], &values.w);
            let double = programs(case, How { dtype: DType::F64, ..how });
            let exact: Vec<Vec<f64>> =
                double.iter().map(|(_, double)| run(Cpu::<f64>::new(), double, &values, &model, 1)).collect();
            // The gradient to a weight has none to hold.
            for held in [false, true].into_iter().filter(|held| !held || !matches!(case, Case::Weight(_))) {
                for ((name, program), exact) in programs(case, How { held, ..how }).iter().zip(&exact) {
                    let honest = [exact.iter().map(|x| round(dtype, *x)).collect()];
                    for cuda in cudas(Settings::default(), program) {
                        let which = cuda.hopper();
                        let found = run(cuda.with_guards(true), program, &values, &model, 1);
                        let off = judge(&[found], std::slice::from_ref(exact), &honest);
                        let name = format!("{name} of {case:?} {dtype} held {held} Hopper {which:?}");
                        wrong.extend(off.map(|what| format!("{name}: {what}")));
                    }
                }
            }
        }
        wrong
    }));
}

#[test]
fn bits_depend_on_neither_the_order_of_threads_nor_the_batch() {
    report(side_by_side(cases(), |index, case| {
        let mut wrong = vec![];
        let is_weight = matches!(case, Case::Weight(_));
        let how = How { held: index % 2 == 0 && !is_weight, ..How::new(TYPES[index % 3], 3) };
        let values = rounded(case.values(0, 3), how.dtype);
        let model = if is_weight { no_weights() } else { stored(&case.shapes(3)[1], &values.w) };
        let one = rounded(case.values(2, 1), how.dtype);
        for ((name, program), (_, alone)) in programs(case, how).iter().zip(programs(case, How { batch: 1, ..how })) {
            let sums_over_the_batch = is_weight && name == "backward";
            for first in cudas(Settings::default(), program) {
                let which = first.hopper();
                let name = format!("{name} of {case:?} Hopper {which:?}");
                let on = |settings| cuda(settings).with_hopper(which);
                let expected = run(first, program, &values, &model, 2);
                for settings in
                    [Settings::new(Order::Reverse, Copies::Early, 1), Settings::new(Order::Random, Copies::Either, 2)]
                {
                    if run(on(settings), program, &values, &model, 1) != expected {
                        wrong.push(format!("{name} differs with {settings:?}"));
                    }
                }
                let found = run(on(Settings::default()), &alone, &one, &model, 1);
                if !sums_over_the_batch && found != expected[2 * found.len()..] {
                    wrong.push(format!("{name}: the third sample differs alone"));
                }
            }
        }
        wrong
    }));
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
                    for mut executor in cudas(Settings::default(), &program) {
                        reached.extend(kernels(&mut executor, program.clone(), model.unwrap_or(&no_weights())));
                    }
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
        assert!(reached.contains(&(format!("split_k_reduce_{dtype}"), false)));
        // A tile of 160 columns is for shapes that are too large here.
        let tiles = [("r_128", false), ("r_128", true), ("a_128", false), ("a_128", true)];
        for (tile, split) in tiles.into_iter().filter(|_| dtype != DType::F32) {
            let kernel = (format!("sm90_gemm_{tile}_{dtype}"), split);
            assert!(reached.contains(&kernel), "no case launches {} split {split}", kernel.0);
        }
    }
}

/// A batch may have another tile than its samples alone, with the same splits: the same bits.
#[test]
fn bits_do_not_depend_on_the_tile() {
    let (split, wide) = (Case::Input([620, 1472, 160]), Case::Input([2850, 64, 160]));
    let hopper = |lines: &str, dtype| [160, 128].map(|tile| format!("sm90_gemm_{lines}_{tile}_{dtype}"));
    let any = ["gemm_ra_128_f16", "gemm_ra_64_f16"].map(String::from);
    let ends = [
        (split, DType::F16, false, Hopper::Off, any),
        (wide.clone(), DType::F16, true, Hopper::Always, hopper("r", "f16")),
        (wide, DType::BF16, false, Hopper::Always, hopper("a", "bf16")),
    ];
    for (case, dtype, held, hopper, expected) in ends {
        let how = How { held, ..How::new(dtype, 3) };
        let on = || cuda(Settings::default()).with_hopper(hopper);
        let [values, one] = [case.values(0, 3), case.values(2, 1)].map(|values| rounded(values, dtype));
        let model = if held { stored(&case.shapes(3)[1], &values.w) } else { no_weights() };
        let programs = [3, 1].map(|batch| How { batch, ..how }.forward(&case, Activation::None));
        for (program, kernel) in programs.iter().zip(expected) {
            assert_eq!(kernels(&mut on(), program.clone(), &model)[0].0, kernel);
        }
        let together = run(on(), &programs[0], &values, &model, 1);
        let alone = run(on(), &programs[1], &one, &model, 1);
        assert!(alone == together[2 * alone.len()..], "{case:?} {dtype}");
        let double = How { dtype: DType::F64, held: false, ..how }.forward(&case, Activation::None);
        let exact = run(Cpu::<f64>::new(), &double, &values, &no_weights(), 1);
        let honest = exact.iter().map(|x| round(dtype, *x)).collect();
        assert_eq!(judge(&[together], &[exact], &[honest]), None, "{case:?} {dtype}");
    }
}

/// Tiles and rings change nothing but the time: of one kind of instructions all cuts into as many parts give the same bits.
#[test]
fn bits_do_not_depend_on_the_forced_cut() {
    let conv = |size, channels| Case::Conv(size, channels, [3, 3], 1, [1; 4]);
    let cases = [
        (Case::Input([20, 448, 168]), DType::F16, true),
        (Case::Input([9, 328, 136]), DType::BF16, false),
        (Case::Input([20, 500, 72]), DType::F32, true),
        (conv([5, 6], [64, 168]), DType::BF16, true),
        (conv([4, 3], [128, 136]), DType::F16, false),
    ];
    for (case, dtype, held) in cases {
        let how = How { held, ..How::new(dtype, 2) };
        let values = rounded(case.values(0, 2), dtype);
        let model = if held { stored(&case.shapes(2)[1], &values.w) } else { no_weights() };
        let program = how.forward(&case, Activation::None);
        let shape = product(&program, &program.nodes[0], Hopper::Auto).unwrap();
        let mut found: HashMap<(bool, usize), Vec<f64>> = HashMap::new();
        let legal = shape.legal();
        assert_eq!(legal.iter().any(|cut| cut.tile.hopper), dtype != DType::F32, "{case:?}");
        for cut in legal {
            let on = || cuda(Settings::default()).with_hopper(Hopper::Forced(cut));
            let (kernel, is_split) = kernels(&mut on(), program.clone(), &model).remove(0);
            let tile = format!("_{}_{dtype}", cut.tile.name);
            assert!(kernel.ends_with(&tile) && kernel.contains("sm90") == cut.tile.hopper, "{kernel} is no {cut:?}");
            assert_eq!(is_split, cut.splits > 1, "{cut:?}");
            let bits = run(on().with_guards(true), &program, &values, &model, 1);
            let first = found.entry((cut.tile.hopper, cut.splits)).or_insert_with(|| bits.clone());
            assert!(*first == bits, "{case:?} {dtype}: {cut:?}");
        }
        assert!(found.len() > 3, "{case:?}: {:?}", found.keys());
    }
}

#[test]
fn a_cut_that_a_shape_cannot_have_is_refused() {
    let program = |dtype| How::new(dtype, 2).forward(&Case::Input([70, 704, 168]), Activation::None);
    let half = program(DType::F16);
    let cut = product(&half, &half.nodes[0], Hopper::Always).unwrap().cut();
    let load = |program: Program| {
        let mut executor = cuda(Settings::default()).with_hopper(Hopper::Forced(cut));
        let planned = plan(program, |program, node| executor.workspace(program, node));
        executor.load(planned, &no_weights()).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(load(half), Ok(()));
    let message = load(program(DType::F32)).unwrap_err();
    assert!(message.contains("for Hopper") && message.contains("f32: kernels/sm90_gemm.cu cannot make"), "{message}");
}
