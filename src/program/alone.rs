//! One op of a program as a program of its own: to time it, or to repeat it elsewhere.

use super::{Node, Origin, Program, Value, ValueId};
use std::collections::HashMap;

impl Program {
    /// A program of one op, done `times` times over, its inputs in the order in which it reads them: weights as they are, all else as
    /// buffers `alone.N`. Nothing is copied out of it.
    pub fn alone(&self, node: &Node, times: usize) -> Program {
        let mut numbers: HashMap<ValueId, ValueId> = HashMap::new();
        let (mut values, mut inputs): (Vec<Value>, _) = (vec![], vec![]);
        for id in node.op.inputs() {
            if numbers.contains_key(&id) {
                continue;
            }
            let number = ValueId(values.len() as u32);
            let mut value = self.value(id).clone();
            if !matches!(value.origin, Origin::Weight(_)) {
                value.origin = Origin::Input(format!("alone.{}", number.0));
                inputs.push(number);
            }
            values.push(value);
            numbers.insert(id, number);
        }
        let mut nodes = vec![];
        for op in 0..times {
            let mut outputs = vec![];
            for id in &node.outputs {
                outputs.push(ValueId(values.len() as u32));
                values.push(Value { origin: Origin::Op(op), ..self.value(*id).clone() });
            }
            nodes.push(Node { op: node.op.with_inputs(|id| numbers[&id]), outputs, at: node.at });
        }
        Program { name: "alone".into(), dtype: self.dtype, nodes, values, inputs, outputs: vec![] }
    }
}
