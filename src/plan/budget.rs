//! Gradients under a budget of bytes: the fewest recomputed segments whose plan fits.

use super::{Planned, plan, show_bytes};
use crate::autodiff::{self, Request, differentiate};
use crate::program::{Node, Op, Program};
use crate::{Error, Result};

/// Numbers of segments that are tried, in this order; 1 keeps everything.
const SEGMENTS: [usize; 11] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48];

/// What a budget led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recompute {
    pub segments: usize,
    /// Products, convolutions and attentions of the forward that run twice.
    pub repeated: usize,
}

/// Differentiates with the fewest segments whose arena fits `budget` bytes; `workspace` as for [`plan`].
pub fn plan_gradient(
    program: &Program,
    request: &Request,
    budget: usize,
    workspace: impl Fn(&Program, &Node) -> usize,
) -> Result<(Planned, Recompute)> {
    let (mut least, mut all) = (usize::MAX, 0);
    for segments in SEGMENTS {
        let kept = (segments > 1).then(|| autodiff::kept(program, segments));
        let planned = plan(differentiate(program, request, kept.as_deref())?, &workspace);
        let forward = planned.program.nodes.iter().filter(|node| is_forward(&node.op)).count();
        if segments == 1 {
            all = forward;
        }
        if planned.plan.arena_bytes <= budget {
            return Ok((planned, Recompute { segments, repeated: forward - all }));
        }
        least = least.min(planned.plan.arena_bytes);
    }
    let (name, [least, budget]) = (&program.name, [least, budget].map(show_bytes));
    Err(Error::Memory(format!("the gradient of '{name}' needs {least} of activations at least; {budget} are allowed")))
}

fn is_forward(op: &Op) -> bool {
    matches!(op, Op::Gemm(_) | Op::Conv2d(_) | Op::Attention(_))
}
