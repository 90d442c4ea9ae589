//! Every kernel of the build, in little time: cases at shapes of real models, and for each other kernel one that launches it. Which do
//! is found by looking at launches, without running them.

use crate::common::cases::Case;
use crate::common::products::How;
use crate::common::real;
use crate::launches::{kernels, variants};
use crate::ops::{Spec, specs};
use crate::section::Item;
use rarebit::program::{DType, Program};
use rayon::prelude::*;
use std::collections::BTreeSet;

pub fn items(subset: bool) -> Vec<Item> {
    let ops: &[Case] = Vec::leak(real::ops());
    let products: &[real::Product] = Vec::leak(real::products());
    let product =
        |one: &'static real::Product, how| Spec::Product(&one.case, How { held: one.held, ..how }, Some(one.program));
    let in_type = |dtype| {
        let how = How { through_op: false, ..How::new(dtype, 1) };
        let ops = ops.iter().map(move |case| Spec::Op(case, how));
        ops.chain(products.iter().map(move |one| product(one, how)))
    };
    let [half, other] = [DType::F16, DType::BF16].map(|dtype| in_type(dtype).collect::<Vec<_>>());
    // Of a subset each in one type, by turns, where the other one launches no kernel of its own.
    let (first, second): (Vec<Spec>, Vec<Spec>) = match subset {
        true => {
            half.into_iter().zip(other).enumerate().map(|(n, (a, b))| if n % 2 == 0 { (a, b) } else { (b, a) }).unzip()
        }
        false => (half.into_iter().chain(other).collect(), vec![]),
    };
    let mut pool: Vec<(u64, Spec)> = specs().into_iter().chain(second).map(|spec| (work(&spec), spec)).collect();
    // Of small ones the largest.
    pool.sort_by_key(|(work, _)| if *work > SMALL { *work } else { SMALL - work });
    let launched_by: Vec<BTreeSet<String>> = pool.par_iter().map(|(_, spec)| launched(spec)).collect();
    let mut covered: BTreeSet<String> = first.iter().flat_map(launched).collect();
    let mut chosen = first;
    for ((_, spec), kernels) in pool.into_iter().zip(launched_by) {
        if !kernels.is_subset(&covered) {
            covered.extend(kernels);
            chosen.push(spec);
        }
    }
    chosen.into_iter().map(Spec::item).collect()
}

/// What takes the emulation no time to speak of, as [`work`] counts.
const SMALL: u64 = 50_000_000;

/// What a case costs, about: its arithmetic, and its bytes, which are looked at after each op.
fn work(spec: &Spec) -> u64 {
    let of = |program: &Program| {
        let bytes: usize = program.nodes.iter().map(|node| program.bytes_of(node)).sum();
        program.flops() + 8 * bytes as u64
    };
    spec.programs().iter().map(of).sum()
}

/// What all runs of a case launch.
fn launched(spec: &Spec) -> BTreeSet<String> {
    let of =
        |program| variants(&program).into_iter().flat_map(move |hopper| kernels(&program, hopper)).collect::<Vec<_>>();
    spec.programs().into_iter().flat_map(of).collect()
}
