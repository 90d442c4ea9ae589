//! The textual form: one line per op, readable without the source.

use super::*;
use std::fmt;

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "program {} ({})", self.name, self.dtype)?;
        for &id in &self.inputs {
            let v = self.value(id);
            writeln!(f, "  {} = input {} {:?}", self.show(id), v.dtype, v.shape)?;
        }
        for node in &self.nodes {
            let outputs: Vec<String> = node.outputs.iter().map(|o| format!("%{}", o.0)).collect();
            let first = self.value(node.outputs[0]);
            writeln!(f, "  {} {:?} = {}", outputs.join(" "), first.shape, self.show_op(&node.op))?;
        }
        for (name, id) in &self.outputs {
            writeln!(f, "  output '{name}' = {}", self.show(*id))?;
        }
        Ok(())
    }
}

impl Program {
    /// A value as it is written in a line: `%7`, `'latents'`, or a weight's key.
    pub(crate) fn show(&self, id: ValueId) -> String {
        match &self.value(id).origin {
            Origin::Input(name) => format!("'{name}'"),
            Origin::Weight(w) if w.keys.len() == 1 => w.keys[0].clone(),
            Origin::Weight(w) => format!("{}+{}", w.keys[0], w.keys.len() - 1),
            Origin::Op(_) => format!("%{}", id.0),
        }
    }

    /// One op with its operands and attributes.
    pub fn show_op(&self, op: &Op) -> String {
        op.show(self)
    }
}
