//! A check between ops: that its outputs are finite.

use super::context::{Loaded, Place};
use super::real::Float;
use super::store::Store;
use crate::Result;
use crate::exec::guard;
use crate::program::ValueId;

/// Fails when an output of op `index` holds an infinity or a NaN.
pub fn finite<T: Float>(loaded: &Loaded, index: usize, arena: &[T], store: &Store<T>) -> Result<()> {
    let Loaded { planned, places, .. } = loaded;
    let program = &planned.program;
    for &id in &program.nodes[index].outputs {
        let Some(region) = planned.plan.regions[id.index()] else { continue };
        let values = &arena[region.offset / size_of::<T>()..][..program.value(id).len()];
        let Some(at) = values.iter().position(|x| !x.is_finite()) else { continue };
        let is_spoiled = |id: &ValueId| match places[id.index()] {
            Place::Weight(weight) => store.weights[weight].as_slice().iter().any(|x| !x.is_finite()),
            Place::Arena(..) | Place::Buffer(_) => false,
        };
        let spoiled: Vec<_> = guard::weights(program, index).filter(is_spoiled).collect();
        return Err(guard::not_finite(program, index, id, (at, values[at].to_f64()), &spoiled));
    }
    Ok(())
}
