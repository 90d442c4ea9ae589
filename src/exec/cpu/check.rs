//! A check between ops: that its outputs are finite.

use super::real::Real;
use crate::Result;
use crate::exec::guard;
use crate::plan::Planned;

/// Fails when an output of op `index` holds an infinity or a NaN.
pub fn finite<T: Real>(planned: &Planned, index: usize, arena: &[T]) -> Result<()> {
    let Planned { program, plan } = planned;
    for id in &program.nodes[index].outputs {
        let Some(region) = plan.regions[id.index()] else { continue };
        let values = &arena[region.offset / size_of::<T>()..][..program.value(*id).len()];
        guard::finite(program, index, *id, values.iter().map(|x| x.to_f64()))?;
    }
    Ok(())
}
