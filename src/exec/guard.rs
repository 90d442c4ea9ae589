//! Checks between ops, for tests: that an op wrote only where it may, and that it read only what is alive.

use crate::plan::{Planned, Region};
use crate::program::{DType, Origin, Program, ValueId};
use crate::{Error, Result};

/// The bytes of dead memory: NaN in every float type.
const POISON: u8 = 0xff;

/// One op in one line: its number, text, what is wrong, and the model line that appended it.
pub fn describe(program: &Program, index: usize, what: &str) -> String {
    let node = &program.nodes[index];
    format!("program '{}', op {index} ({}): {what} (appended at {})", program.name, program.show_op(&node.op), node.at)
}

/// The weights that op `index` reads.
pub fn weights(program: &Program, index: usize) -> impl Iterator<Item = ValueId> {
    let read = program.nodes[index].op.inputs().into_iter();
    read.filter(|id| matches!(program.value(*id).origin, Origin::Weight(_)))
}

/// Value `id`, which op `index` made, is an infinity or a NaN at element `at`, and so are some of the weights it read: the op, and
/// what can be done.
pub fn not_finite(program: &Program, index: usize, id: ValueId, (at, x): (usize, f64), weights: &[ValueId]) -> Error {
    let node = &program.nodes[index];
    let mut what = format!("%{} is {x} at element {at} of {:?}", id.0, program.shape(id));
    if let Some(weight) = weights.first() {
        what += &format!("; its weight {} is not finite: a damaged checkpoint?", program.show(*weight));
    }
    if [node.op.inputs(), node.outputs.clone()].concat().iter().any(|id| program.value(*id).dtype == DType::F16) {
        what += "; f16 ends at 65504, --dtype bf16 and f32 do not";
    }
    Error::Numeric(describe(program, index, &what))
}

/// A copy of the arena as it must be outside the ranges of the next op. Dead memory is NaN, so reading it shows.
pub struct Guard {
    expected: Vec<u8>,
}

impl Guard {
    pub fn new(arena: &mut [u8]) -> Guard {
        arena.fill(POISON);
        Guard { expected: arena.to_vec() }
    }

    /// After op `index`: nothing changed outside its outputs and workspace; what died is filled with NaN.
    pub fn check(&mut self, planned: &Planned, index: usize, arena: &mut [u8]) -> Result<()> {
        let Planned { program, plan } = planned;
        let bytes = |region: Region| region.offset..region.end();
        let outputs = program.nodes[index].outputs.iter().map(|id| plan.regions[id.index()]);
        for region in outputs.chain([plan.workspace[index]]).flatten() {
            self.expected[bytes(region)].copy_from_slice(&arena[bytes(region)]);
        }
        if let Some(at) = arena.iter().zip(&self.expected).position(|(a, b)| a != b) {
            let what = format!("wrote outside its outputs and workspace, at arena byte {at}");
            return Err(Error::Numeric(describe(program, index, &what)));
        }
        let dead = (0..program.values.len()).filter(|&i| dies(planned, index, ValueId(i as u32)));
        for region in dead.map(|i| plan.regions[i]).chain([plan.workspace[index]]).flatten() {
            arena[bytes(region)].fill(POISON);
            self.expected[bytes(region)].fill(POISON);
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
        let at = |id: ValueId| planned.plan.regions[id.index()].unwrap().offset;
        let mut arena = vec![0; planned.plan.arena_bytes];
        let mut guard = Guard::new(&mut arena);
        arena[at(y)..at(y) + 400].fill(1);
        guard.check(&planned, 0, &mut arena).unwrap();
        arena[at(z)..at(z) + 400].fill(2);
        let mut stray = arena.clone();
        stray[at(y) + 13] = 7;
        let mut copy = Guard { expected: guard.expected.clone() };
        let message = copy.check(&planned, 1, &mut stray).unwrap_err().to_string();
        assert!(message.contains("op 1 (add %1 %1): wrote outside"), "{message}");
        guard.check(&planned, 1, &mut arena).unwrap();
        assert!(arena[at(y)] == POISON && arena[at(z)] == 2);
    }
}
