//! How ops may read weights: those held for products by products alone.

use crate::program::{Activation, GemmBackward, Op, Origin, Program, ValueId};
use crate::weights::Pack;
use crate::{Error, Result};

/// Checks that every op reads weights the way they are held.
pub fn check(program: &Program) -> Result<()> {
    for node in &program.nodes {
        for id in node.op.inputs() {
            let Origin::Weight(weight) = &program.value(id).origin else { continue };
            let geglu = matches!(&node.op, Op::Gemm(op) if op.w == id && op.activation == Activation::Geglu);
            let wrong = if weight.pack.is_rhs() && rhs(&node.op) != Some(id) {
                "is read row by row"
            } else if weight.pack.is_rhs() && geglu && weight.pack != Pack::Geglu {
                "is read as that of a GEGLU"
            } else {
                continue;
            };
            let op = program.show_op(&node.op);
            let what = format!("{op}: weight '{}', packed as {:?}, {wrong}", weight.keys.join("+"), weight.pack);
            return Err(Error::Program { program: program.name.clone(), what, at: node.at.to_string() });
        }
    }
    Ok(())
}

/// The right operand of an op's product, given as a weight's `[.., N]`.
fn rhs(op: &Op) -> Option<ValueId> {
    match op {
        Op::Gemm(op) => Some(op.w),
        Op::GemmBackward(GemmBackward::Input { w, .. }) => Some(*w),
        Op::Conv2d(op) => Some(op.w),
        Op::Conv2dBackward(op) => Some(op.w),
        Op::GemmBackward(GemmBackward::Weight { .. })
        | Op::Attention(_)
        | Op::AttentionBackward(_)
        | Op::Norm(_)
        | Op::Rowwise(_)
        | Op::Elementwise(_)
        | Op::Resample(_)
        | Op::Embedding(_)
        | Op::Update(_) => None,
    }
}
