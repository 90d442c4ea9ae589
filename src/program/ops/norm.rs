//! Group and layer normalisation, and plain reductions: inner products, sums.

use super::OpKind;
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Program, ValueId};

/// Means, inverse deviations and inner products are of the accumulator type ([`crate::program::DType::accumulator`]).
#[derive(Clone, Debug, PartialEq)]
pub enum Norm {
    /// Over each of `groups` channel groups of `x [B, .., C]`, biased variance, then SiLU if asked.
    /// Outputs: `y`, `mean [B, groups]`, `rstd [B, groups]`.
    Group { x: ValueId, gamma: ValueId, beta: ValueId, groups: usize, eps: f64, silu: bool },
    /// Gradient of `Group` to `x`.
    GroupBackward {
        x: ValueId,
        d_y: ValueId,
        gamma: ValueId,
        beta: ValueId,
        mean: ValueId,
        rstd: ValueId,
        groups: usize,
        silu: bool,
    },
    /// Over the last dimension. Outputs: `y`, `mean [..]`, `rstd [..]`.
    Layer { x: ValueId, gamma: ValueId, beta: ValueId, eps: f64 },
    /// Gradient of `Layer` to `x`.
    LayerBackward { x: ValueId, d_y: ValueId, gamma: ValueId, mean: ValueId, rstd: ValueId },
    /// Gradients of `Layer` to `gamma [C]` and `beta [C]`.
    LayerBackwardAffine { x: ValueId, d_y: ValueId, mean: ValueId, rstd: ValueId },
    /// Inner product per sample: `a`, `b [B, ..]` → `[B]`.
    Dot { a: ValueId, b: ValueId },
    /// Sums of channels: `x [B, .., C]` → `[B, C]`, or over the samples too `[1, C]` or `[C]` (`Rows`).
    Sum { x: ValueId, over: Over },
}

/// What [`Norm::Sum`] sums over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The middle dimensions: `[B, C]`.
    Middle,
    /// All but the last dimension, kept as one: `[1, C]`.
    Samples,
    /// All but the last dimension: `[C]`.
    Rows,
}

impl OpKind for Norm {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        match self {
            Norm::Group { x, gamma, beta, .. } | Norm::Layer { x, gamma, beta, .. } => vec![x, gamma, beta],
            Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, .. } => vec![x, d_y, gamma, beta, mean, rstd],
            Norm::LayerBackward { x, d_y, gamma, mean, rstd } => vec![x, d_y, gamma, mean, rstd],
            Norm::LayerBackwardAffine { x, d_y, mean, rstd } => vec![x, d_y, mean, rstd],
            Norm::Sum { x, .. } => vec![x],
            Norm::Dot { a, b } => vec![a, b],
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        match *self {
            Norm::Group { x, gamma, beta, groups, .. } => {
                let stats = group_stats(cx, x, groups)?;
                let s = cx.shape(x);
                cx.exactly("gamma", gamma, &s[s.len() - 1..])?;
                cx.exactly("beta", beta, &s[s.len() - 1..])?;
                Ok(vec![cx.of(s.to_vec()), cx.accumulator(stats.clone()), cx.accumulator(stats)])
            }
            Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, groups, .. } => {
                let stats = group_stats(cx, x, groups)?;
                let s = cx.shape(x);
                cx.exactly("d_y", d_y, s)?;
                for (what, id) in [("gamma", gamma), ("beta", beta)] {
                    cx.exactly(what, id, &s[s.len() - 1..])?;
                }
                for (what, id) in [("mean", mean), ("rstd", rstd)] {
                    cx.statistic(what, id, &stats)?;
                }
                Ok(cx.one(s.to_vec()))
            }
            Norm::Layer { x, gamma, beta, .. } => {
                let s = cx.float(x, 2)?;
                let (rows, width) = s.split_at(s.len() - 1);
                cx.exactly("gamma", gamma, width)?;
                cx.exactly("beta", beta, width)?;
                Ok(vec![cx.of(s.to_vec()), cx.accumulator(rows.to_vec()), cx.accumulator(rows.to_vec())])
            }
            Norm::LayerBackward { x, d_y, gamma, mean, rstd } => {
                let s = layer_saved(cx, x, d_y, mean, rstd)?;
                cx.exactly("gamma", gamma, &s[s.len() - 1..])?;
                Ok(cx.one(s.to_vec()))
            }
            Norm::LayerBackwardAffine { x, d_y, mean, rstd } => {
                let s = layer_saved(cx, x, d_y, mean, rstd)?;
                let width = s[s.len() - 1..].to_vec();
                Ok(vec![cx.of(width.clone()), cx.of(width)])
            }
            Norm::Dot { a, b } => {
                let s = cx.float(a, 1)?;
                cx.exactly("b", b, s)?;
                Ok(vec![cx.accumulator(vec![s[0]])])
            }
            Norm::Sum { x, over } => {
                let s = cx.float(x, 2)?;
                let c = s[s.len() - 1];
                Ok(cx.one(match over {
                    Over::Middle => vec![s[0], c],
                    Over::Samples => vec![1, c],
                    Over::Rows => vec![c],
                }))
            }
        }
    }

    fn alias(&self) -> Option<ValueId> {
        match *self {
            Norm::Group { x, .. } | Norm::Layer { x, .. } => Some(x),
            Norm::GroupBackward { d_y, .. } | Norm::LayerBackward { d_y, .. } => Some(d_y),
            Norm::LayerBackwardAffine { .. } | Norm::Dot { .. } | Norm::Sum { .. } => None,
        }
    }

    fn show(&self, p: &Program) -> String {
        let v = |id: &ValueId| p.show(*id);
        match self {
            Norm::Group { x, gamma, groups, eps, silu, .. } => {
                format!(
                    "group_norm {} {} groups {groups} eps {eps:e}{}",
                    v(x),
                    v(gamma),
                    if *silu { " silu" } else { "" }
                )
            }
            Norm::GroupBackward { x, d_y, gamma, groups, silu, .. } => {
                let silu = if *silu { " silu" } else { "" };
                format!("group_norm_backward {} {} {} groups {groups}{silu}", v(d_y), v(x), v(gamma))
            }
            Norm::Layer { x, gamma, eps, .. } => format!("layer_norm {} {} eps {eps:e}", v(x), v(gamma)),
            Norm::LayerBackward { x, d_y, gamma, .. } => {
                format!("layer_norm_backward {} {} {}", v(d_y), v(x), v(gamma))
            }
            Norm::LayerBackwardAffine { x, d_y, .. } => format!("layer_norm_backward_affine {} {}", v(d_y), v(x)),
            Norm::Dot { a, b } => format!("dot {} {}", v(a), v(b)),
            Norm::Sum { x, over } => format!("sum {} over {over:?}", v(x)).to_lowercase(),
        }
    }
}

/// The shape of a group norm's statistics.
fn group_stats(cx: &Infer, x: ValueId, groups: usize) -> Result<Vec<usize>, String> {
    let s = cx.float(x, 3)?;
    let c = s[s.len() - 1];
    ensure!(groups > 0 && c % groups == 0, "{c} channels do not divide into {groups} groups");
    Ok(vec![s[0], groups])
}

/// The shape of `x`, when what a layer norm's backward reads fits it.
fn layer_saved<'a>(
    cx: &Infer<'a>,
    x: ValueId,
    d_y: ValueId,
    mean: ValueId,
    rstd: ValueId,
) -> Result<&'a [usize], String> {
    let s = cx.float(x, 2)?;
    cx.exactly("d_y", d_y, s)?;
    cx.statistic("mean", mean, &s[..s.len() - 1])?;
    cx.statistic("rstd", rstd, &s[..s.len() - 1])?;
    Ok(s)
}
