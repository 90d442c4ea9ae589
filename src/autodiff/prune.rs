//! After differentiation: ops whose results nothing reads are removed, and values numbered anew.

use crate::Result;
use crate::program::{Origin, Program, Value, ValueId};

/// The program with only what its outputs need; inputs nobody reads go too.
pub fn prune(program: Program) -> Result<Program> {
    let mut needed = vec![false; program.values.len()];
    program.outputs.iter().for_each(|(_, id)| needed[id.index()] = true);
    let mut lives = vec![false; program.nodes.len()];
    for (index, node) in program.nodes.iter().enumerate().rev() {
        if node.outputs.iter().any(|id| needed[id.index()]) {
            lives[index] = true;
            // Every output of an op that runs is written.
            node.outputs.iter().chain(&node.op.inputs()).for_each(|id| needed[id.index()] = true);
        }
    }
    let mut numbers = vec![ValueId(0); program.values.len()];
    let mut values: Vec<Value> = Vec::new();
    for (index, value) in program.values.into_iter().enumerate().filter(|(index, _)| needed[*index]) {
        numbers[index] = ValueId(values.len() as u32);
        values.push(value);
    }
    let new = |id: ValueId| numbers[id.index()];
    let mut nodes: Vec<_> =
        program.nodes.into_iter().zip(lives).filter(|(_, lives)| *lives).map(|(node, _)| node).collect();
    for (index, node) in nodes.iter_mut().enumerate() {
        node.op = node.op.with_inputs(new);
        node.outputs.iter_mut().for_each(|id| *id = new(*id));
        for id in &node.outputs {
            values[id.index()].origin = Origin::Op(index);
        }
    }
    let inputs = program.inputs.into_iter().filter(|id| needed[id.index()]).map(new).collect();
    let outputs = program.outputs.into_iter().map(|(name, id)| (name, new(id))).collect();
    let program = Program { nodes, values, inputs, outputs, ..program };
    program.verify()?;
    Ok(program)
}
