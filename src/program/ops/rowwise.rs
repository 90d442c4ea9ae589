//! Rows to rows: softmax, unit vectors, cross-entropy, and their gradients.

use super::OpKind;
use crate::program::infer::{Infer, Types};
use crate::program::{Program, ValueId};

/// Norms, log-sum-exps and losses are of the accumulator type ([`crate::program::DType::accumulator`]).
#[derive(Clone, Debug, PartialEq)]
pub enum Rowwise {
    /// Over the last dimension.
    Softmax { x: ValueId },
    /// `y (d_y - Σ y d_y)`.
    SoftmaxBackward { y: ValueId, d_y: ValueId },
    /// `x / max(‖x‖, eps)` over the last dimension. Outputs: `y`, `‖x‖ [..]`.
    Unit { x: ValueId, eps: f64 },
    /// Gradient of `Unit` from its outputs; where the norm is below `eps`, `d_y / eps`.
    UnitBackward { y: ValueId, norm: ValueId, d_y: ValueId, eps: f64 },
    /// `-log softmax(logits)[target]` per row: `logits [.., V]`, `targets [..]` i32, a negative one counts 0.
    /// Outputs: `loss [..]`, log-sum-exp `[..]`.
    CrossEntropy { logits: ValueId, targets: ValueId },
    /// `d_loss (softmax(logits) - onehot(target))`; 0 in rows with a negative target.
    CrossEntropyBackward { logits: ValueId, targets: ValueId, lse: ValueId, d_loss: ValueId },
}

impl OpKind for Rowwise {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        match self {
            Rowwise::Softmax { x } | Rowwise::Unit { x, .. } => vec![x],
            Rowwise::SoftmaxBackward { y, d_y } => vec![y, d_y],
            Rowwise::UnitBackward { y, norm, d_y, .. } => vec![y, norm, d_y],
            Rowwise::CrossEntropy { logits, targets } => vec![logits, targets],
            Rowwise::CrossEntropyBackward { logits, targets, lse, d_loss } => vec![logits, targets, lse, d_loss],
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        match *self {
            Rowwise::Softmax { x } => Ok(cx.one(cx.float(x, 1)?.to_vec())),
            Rowwise::SoftmaxBackward { y, d_y } => {
                let s = cx.float(y, 1)?;
                cx.exactly("d_y", d_y, s)?;
                Ok(cx.one(s.to_vec()))
            }
            Rowwise::Unit { x, .. } => {
                let s = cx.float(x, 2)?;
                Ok(vec![cx.of(s.to_vec()), cx.accumulator(s[..s.len() - 1].to_vec())])
            }
            Rowwise::UnitBackward { y, norm, d_y, .. } => {
                let s = cx.float(y, 2)?;
                cx.statistic("norm", norm, &s[..s.len() - 1])?;
                cx.exactly("d_y", d_y, s)?;
                Ok(cx.one(s.to_vec()))
            }
            Rowwise::CrossEntropy { logits, targets } => {
                let s = cx.float(logits, 2)?;
                let rows = &s[..s.len() - 1];
                cx.index("targets", targets, rows)?;
                Ok(vec![cx.accumulator(rows.to_vec()), cx.accumulator(rows.to_vec())])
            }
            Rowwise::CrossEntropyBackward { logits, targets, lse, d_loss } => {
                let s = cx.float(logits, 2)?;
                let rows = &s[..s.len() - 1];
                cx.index("targets", targets, rows)?;
                cx.statistic("lse", lse, rows)?;
                cx.statistic("d_loss", d_loss, rows)?;
                Ok(cx.one(s.to_vec()))
            }
        }
    }

    fn alias(&self) -> Option<ValueId> {
        match *self {
            Rowwise::Softmax { x } | Rowwise::Unit { x, .. } => Some(x),
            Rowwise::SoftmaxBackward { d_y, .. } | Rowwise::UnitBackward { d_y, .. } => Some(d_y),
            Rowwise::CrossEntropyBackward { logits, .. } => Some(logits),
            Rowwise::CrossEntropy { .. } => None,
        }
    }

    fn show(&self, p: &Program) -> String {
        let v = |id: &ValueId| p.show(*id);
        match self {
            Rowwise::Softmax { x } => format!("softmax {}", v(x)),
            Rowwise::SoftmaxBackward { y, d_y } => format!("softmax_backward {} {}", v(d_y), v(y)),
            Rowwise::Unit { x, eps } => format!("unit {} eps {eps:e}", v(x)),
            Rowwise::UnitBackward { y, d_y, .. } => format!("unit_backward {} {}", v(d_y), v(y)),
            Rowwise::CrossEntropy { logits, targets } => format!("cross_entropy {} {}", v(logits), v(targets)),
            Rowwise::CrossEntropyBackward { logits, targets, d_loss, .. } => {
                format!("cross_entropy_backward {} {} {}", v(d_loss), v(logits), v(targets))
            }
        }
    }
}
