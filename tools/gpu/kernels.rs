//! Every kernel of the build, in little time: cases at shapes of real models, and beside them a few small ones that launch all the
//! others. Which do is found by looking at launches, without running them.

use crate::common::cases::Case;
use crate::common::products::How;
use crate::common::real;
use crate::launches::{kernels, variants};
use crate::ops::{Spec, specs};
use crate::section::Item;
use rarebit::program::DType;
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
    let pool: Vec<Spec> = specs().into_iter().chain(second).collect();
    let launched: Vec<BTreeSet<String>> = pool.par_iter().map(launched).collect();
    let mut covered: BTreeSet<String> = first.iter().flat_map(self::launched).collect();
    let mut order: Vec<usize> = (0..pool.len()).collect();
    order.sort_by_key(|index| pool[*index].programs().iter().map(|program| program.flops()).sum::<u64>());
    let mut chosen = first;
    loop {
        // The one that adds the most, of those the cheapest.
        let added = |index: usize| launched[index].difference(&covered).count();
        let best = order.iter().rev().max_by_key(|index| added(**index)).copied();
        let Some(best) = best.filter(|best| added(*best) > 0) else { break };
        covered.extend(launched[best].iter().cloned());
        chosen.push(pool[best].clone());
    }
    chosen.into_iter().map(Spec::item).collect()
}

/// What all runs of a case launch.
fn launched(spec: &Spec) -> BTreeSet<String> {
    let of =
        |program| variants(&program).into_iter().flat_map(move |hopper| kernels(&program, hopper)).collect::<Vec<_>>();
    spec.programs().into_iter().flat_map(of).collect()
}
