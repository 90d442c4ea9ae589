//! The specification of the IR, as checks: order, single assignment, types, names.

use super::*;
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};

pub fn verify(program: &Program) -> Result<()> {
    let fail = |what: String, at: String| Err(Error::Program { program: program.name.clone(), what, at });
    let mut defined: HashSet<ValueId> = HashSet::new();
    let mut names: HashMap<&str, (&Shape, DType)> = HashMap::new();
    let mut weights: HashSet<(&Weight, DType)> = HashSet::new();

    // Inputs and weights exist before the first op; no two inputs share a name.
    for (i, value) in program.values.iter().enumerate() {
        match &value.origin {
            Origin::Input(name) => {
                if names.insert(name, (&value.shape, value.dtype)).is_some() {
                    return fail(format!("two inputs are named '{name}'"), "inputs".into());
                }
                if !program.inputs.contains(&ValueId(i as u32)) {
                    return fail(format!("input '{name}' is not listed"), "inputs".into());
                }
                defined.insert(ValueId(i as u32));
            }
            Origin::Weight(weight) => {
                if weight.shape != value.shape || !weights.insert((weight, value.dtype)) {
                    return fail(format!("weight '{}' is listed twice", weight.keys.join("+")), "weights".into());
                }
                defined.insert(ValueId(i as u32));
            }
            Origin::Op(_) => {}
        }
    }

    // Ops read only what is defined, write each value once, and every output has the type the op infers.
    for (index, node) in program.nodes.iter().enumerate() {
        let at = || node.at.to_string();
        for id in node.op.inputs() {
            if !defined.contains(&id) {
                return fail(format!("op {index} reads %{} before it is written", id.0), at());
            }
        }
        let types = match infer::infer(program, &node.op) {
            Ok(types) => types,
            Err(what) => return fail(format!("op {index}: {what}"), at()),
        };
        if types.len() != node.outputs.len() {
            return fail(format!("op {index} has {} outputs, needs {}", node.outputs.len(), types.len()), at());
        }
        for (&id, (shape, dtype)) in node.outputs.iter().zip(types) {
            let value = program.value(id);
            if value.origin != Origin::Op(index) || !defined.insert(id) {
                return fail(format!("op {index} does not own %{}", id.0), at());
            }
            if value.shape != shape || value.dtype != dtype {
                return fail(format!("%{} is {:?}, op {index} yields {shape:?}", id.0, value.shape), at());
            }
        }
        if node.op.may_alias().is_some_and(|id| !node.op.inputs().contains(&id)) {
            return fail(format!("op {index} may alias a value it does not read"), at());
        }
    }

    // Outputs are computed by ops; one that carries an input's name has its type.
    let mut outputs = HashSet::new();
    for (name, id) in &program.outputs {
        if !defined.contains(id) || !matches!(program.value(*id).origin, Origin::Op(_)) {
            return fail(format!("output '{name}' is computed by no op"), "outputs".into());
        }
        if !outputs.insert(name) {
            return fail(format!("two outputs are named '{name}'"), "outputs".into());
        }
        let value = program.value(*id);
        if names.get(name.as_str()).is_some_and(|&(shape, dtype)| *shape != value.shape || dtype != value.dtype) {
            return fail(format!("output '{name}' differs in type from the input of that name"), "outputs".into());
        }
    }
    Ok(())
}
