//! Checks between ops: that an op wrote only where it may and read only what is alive, and that its outputs are finite.

use super::real::Real;
use crate::plan::{Planned, Region};
use crate::program::{Program, ValueId};
use crate::{Error, Result};

/// One op in one line: its number, text, what is wrong, and the model line that appended it.
pub fn describe(program: &Program, index: usize, what: &str) -> String {
    let node = &program.nodes[index];
    format!("program '{}', op {index} ({}): {what} (appended at {})", program.name, program.show_op(&node.op), node.at)
}

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

/// A copy of the arena as it must be outside the ranges of the next op. Dead memory is NaN, so reading it shows.
pub struct Guard<T> {
    expected: Vec<T>,
}

impl<T: Real> Guard<T> {
    pub fn new(arena: &mut [T]) -> Guard<T> {
        arena.fill(T::NAN);
        Guard { expected: arena.to_vec() }
    }

    /// After op `index`: nothing changed outside its outputs and workspace; what died is filled with NaN.
    pub fn check(&mut self, planned: &Planned, index: usize, arena: &mut [T]) -> Result<()> {
        let Planned { program, plan } = planned;
        let elements = |r: Region| r.offset / size_of::<T>()..r.end().div_ceil(size_of::<T>());
        let outputs = program.nodes[index].outputs.iter().map(|id| plan.regions[id.index()]);
        for region in outputs.chain([plan.workspace[index]]).flatten() {
            self.expected[elements(region)].copy_from_slice(&arena[elements(region)]);
        }
        if let Some(at) = arena.iter().zip(&self.expected).position(|(a, b)| !a.same(*b)) {
            let what = format!("wrote outside its outputs and workspace, at arena element {at}");
            return Err(Error::Numeric(describe(program, index, &what)));
        }
        let dead = (0..program.values.len()).filter(|&i| dies(planned, index, ValueId(i as u32)));
        for region in dead.map(|i| plan.regions[i]).chain([plan.workspace[index]]).flatten() {
            arena[elements(region)].fill(T::NAN);
            self.expected[elements(region)].fill(T::NAN);
        }
        Ok(())
    }
}

/// Whether op `index` is the last to touch a value, and no output took over its memory.
fn dies(planned: &Planned, index: usize, id: ValueId) -> bool {
    let Planned { program, plan } = planned;
    let node = &program.nodes[index];
    let touched = node.outputs.contains(&id) || node.op.inputs().contains(&id);
    let later = program.nodes[index + 1..].iter().any(|node| node.op.inputs().contains(&id));
    let output = program.outputs.iter().any(|(_, output)| *output == id);
    touched && !later && !output && plan.in_place[index] != Some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan;
    use crate::program::{Activation, Builder, DType};

    /// Three ops in a row; the second writes where it must not, and what the first made is dead after it.
    #[test]
    fn the_guard_sees_stray_writes_and_poisons_dead_memory() {
        let mut b = Builder::new("p", DType::F32);
        let x = b.input("x", &[100]);
        let y = b.activate(x, Activation::Silu);
        let z = b.add(y, y);
        let out = b.affine(z, 1.0, 2.0);
        b.output("out", out);
        let planned = plan(b.finish().unwrap(), |_, _| 0);
        let at = |id: ValueId| planned.plan.regions[id.index()].unwrap().offset / size_of::<f32>();
        let mut arena = vec![0.0f32; planned.plan.arena_bytes / size_of::<f32>()];
        let mut guard = Guard::new(&mut arena);
        arena[at(y)..at(y) + 100].fill(1.0);
        guard.check(&planned, 0, &mut arena).unwrap();
        arena[at(z)..at(z) + 100].fill(2.0);
        let mut stray = arena.clone();
        stray[at(y) + 3] = 7.0;
        let mut copy = Guard { expected: guard.expected.clone() };
        let message = copy.check(&planned, 1, &mut stray).unwrap_err().to_string();
        assert!(message.contains("op 1 (add %1 %1): wrote outside"), "{message}");
        guard.check(&planned, 1, &mut arena).unwrap();
        assert!(arena[at(y)].is_nan() && arena[at(z)] == 2.0);
    }
}
