//! Before differentiation: activations that are epilogues become ops of their own, so that what they read is a value.

use super::Between;
use crate::program::{Activation, Elementwise, Gemm, Node, Op, Origin, Program, Value, ValueId};

/// The program with every activated product between leaves and objectives taken apart, its values where they were and the new
/// ones after them; `kept` extended to those: the input of an activation is kept with its output.
pub fn unfuse(program: &Program, between: &Between, kept: Option<&[bool]>) -> (Program, Option<Vec<bool>>) {
    let mut out = Program { nodes: Vec::with_capacity(program.nodes.len()), ..program.clone() };
    let mut kept = kept.map(<[bool]>::to_vec);
    for node in &program.nodes {
        match &node.op {
            Op::Gemm(gemm) if gemm.activation != Activation::None && between.holds(node.outputs[0]) => {
                let mut apart = Apart { out: &mut out, kept: &mut kept, node };
                apart.gemm(gemm);
            }
            _ => out.nodes.push(node.clone()),
        }
    }
    for (index, node) in out.nodes.iter().enumerate() {
        for id in &node.outputs {
            out.values[id.index()].origin = Origin::Op(index);
        }
    }
    (out, kept)
}

/// One op on its way to become several.
struct Apart<'a> {
    out: &'a mut Program,
    kept: &'a mut Option<Vec<bool>>,
    node: &'a Node,
}

impl Apart<'_> {
    fn gemm(&mut self, gemm: &Gemm) {
        let y = self.node.outputs[0];
        let mut shape = self.out.shape(y).to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.out.shape(gemm.w)[1];
        }
        let x = self.value(shape);
        self.push(Op::Gemm(Gemm { activation: Activation::None, residual: None, ..gemm.clone() }), x);
        let activated = if gemm.residual.is_some() { self.value(self.out.shape(y).to_vec()) } else { y };
        let activate = match gemm.activation {
            Activation::Geglu => Elementwise::Geglu { x },
            activation => Elementwise::Activate { x, activation },
        };
        self.push(Op::Elementwise(activate), activated);
        if let Some(residual) = gemm.residual {
            self.push(Op::Elementwise(Elementwise::Add { a: activated, b: residual }), y);
        }
    }

    /// A new value, kept as the op's output is.
    fn value(&mut self, shape: Vec<usize>) -> ValueId {
        let dtype = self.out.value(self.node.outputs[0]).dtype;
        self.out.values.push(Value { shape, dtype, origin: Origin::Op(0) });
        if let Some(kept) = self.kept {
            kept.push(kept[self.node.outputs[0].index()]);
        }
        ValueId(self.out.values.len() as u32 - 1)
    }

    fn push(&mut self, op: Op, output: ValueId) {
        self.out.nodes.push(Node { op, outputs: vec![output], at: self.node.at });
    }
}
