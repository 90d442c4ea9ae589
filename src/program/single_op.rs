//! One op of a program as a program of its own: to time it, or to repeat it elsewhere; and which ops of a program are of one kind.

use super::{Node, Origin, Program, Value, ValueId};
use std::collections::HashMap;

/// Ops of a program that are the same but for the names of their operands.
pub struct Kind<'p> {
    /// The op and the shapes it reads: `conv2d stride 1 padding [1, 1, 1, 1] 2x64x64x320 3x3x320x320`.
    pub name: String,
    /// The first of them.
    pub node: &'p Node,
    /// How many there are.
    pub count: usize,
}

impl Program {
    /// Every kind of op, in the order of the first ones.
    pub fn kinds(&self) -> Vec<Kind<'_>> {
        let mut kinds: Vec<Kind<'_>> = vec![];
        let mut numbers: HashMap<String, usize> = HashMap::new();
        for node in &self.nodes {
            let name = self.kind(node);
            match numbers.get(&name) {
                Some(&number) => kinds[number].count += 1,
                None => {
                    numbers.insert(name.clone(), kinds.len());
                    kinds.push(Kind { name, node, count: 1 });
                }
            }
        }
        kinds
    }

    fn kind(&self, node: &Node) -> String {
        let single = self.single_op(node, 1);
        let op = single.show_op(&single.nodes[0].op);
        let is_name = |word: &str| word.starts_with('\'') || word.contains("weight") || word.contains("bias");
        let words = op.split(' ').filter(|word| !is_name(word)).map(str::to_string);
        let shape = |id: ValueId| single.shape(id).iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        words.chain(single.nodes[0].op.inputs().into_iter().map(shape)).collect::<Vec<_>>().join(" ")
    }

    /// A program of one op, done `times` times over, its inputs in the order in which it reads them: weights as they are, all else as
    /// buffers `alone.N`. Nothing is copied out of it.
    pub fn single_op(&self, node: &Node, times: usize) -> Program {
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
