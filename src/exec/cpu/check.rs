//! A check between ops: that its outputs are finite.

use super::real::Real;
use crate::exec::guard::describe;
use crate::plan::Planned;
use crate::{Error, Result};

/// Fails when an output of op `index` holds an infinity or a NaN.
pub fn finite<T: Real>(planned: &Planned, index: usize, arena: &[T]) -> Result<()> {
    let Planned { program, plan } = planned;
    for id in &program.nodes[index].outputs {
        let Some(region) = plan.regions[id.index()] else { continue };
        let values = &arena[region.offset / size_of::<T>()..][..program.value(*id).len()];
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            let what = format!("%{} is {} at element {at} of {:?}", id.0, values[at].to_f64(), program.shape(*id));
            return Err(Error::Numeric(describe(program, index, &what)));
        }
    }
    Ok(())
}
