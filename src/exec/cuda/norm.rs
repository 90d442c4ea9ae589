//! Launches of normalisations. Contract: kernels/layer_norm.cu; group_norm and reduce have the others'.

use super::cx::Cx;
use super::launch::{Address, Launch};
use super::rowwise::{PerRow, Rows};
use super::{group_norm, reduce};
use crate::program::{Norm, Program};
use bytemuck::{Pod, Zeroable};

pub fn workspace(op: &Norm, program: &Program) -> usize {
    match *op {
        Norm::Group { x, groups, .. } | Norm::GroupBackward { x, groups, .. } => {
            group_norm::workspace(program, x, groups)
        }
        Norm::LayerBackwardAffine { x, .. } => reduce::affine_workspace(program, x),
        Norm::Dot { a, .. } => reduce::dot_workspace(program, a),
        Norm::Sum { x, over } => reduce::sum_workspace(program, x, over),
        Norm::Layer { .. } | Norm::LayerBackward { .. } => 0,
    }
}

/// Matches `LayerNormParams` in kernels/layer_norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LayerNormParams {
    rows: Rows,
    x: Address,
    gamma: Address,
    beta: Address,
    y: Address,
    mean: Address,
    rstd: Address,
    eps: f32,
    unused: i32,
}
const _: () = assert!(size_of::<LayerNormParams>() == 80);

/// Matches `LayerNormBackwardParams` in kernels/layer_norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LayerNormBackwardParams {
    rows: Rows,
    x: Address,
    d_y: Address,
    gamma: Address,
    mean: Address,
    rstd: Address,
    d_x: Address,
}
const _: () = assert!(size_of::<LayerNormBackwardParams>() == 72);

pub fn launches(op: &Norm, cx: &Cx) -> Vec<Launch> {
    let out = cx.address(cx.output(0));
    match *op {
        Norm::Group { x, gamma, beta, groups, eps, silu } => {
            group_norm::forward(cx, [x, gamma, beta], groups, eps, silu)
        }
        Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, groups, silu } => {
            group_norm::backward(cx, [x, d_y, gamma, beta, mean, rstd], groups, silu)
        }
        Norm::Layer { x, gamma, beta, eps } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[x, gamma, beta, cx.output(0)]);
            let [mean, rstd] = [1, 2].map(|i| cx.address(cx.output(i)));
            let [x_at, gamma, beta] = [x, gamma, beta].map(|id| cx.address(id));
            let params = LayerNormParams { rows, x: x_at, gamma, beta, y: out, mean, rstd, eps: eps as f32, unused: 0 };
            vec![Launch::new(format!("layer_norm_{}", cx.dtype(x)), grid, block, 0, params)]
        }
        Norm::LayerBackward { x, d_y, gamma, mean, rstd } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[x, d_y, gamma, cx.output(0)]);
            let [x_at, d_y, gamma, mean, rstd] = [x, d_y, gamma, mean, rstd].map(|id| cx.address(id));
            let params = LayerNormBackwardParams { rows, x: x_at, d_y, gamma, mean, rstd, d_x: out };
            vec![Launch::new(format!("layer_norm_backward_{}", cx.dtype(x)), grid, block, 0, params)]
        }
        Norm::LayerBackwardAffine { x, d_y, mean, rstd } => reduce::affine(cx, [x, d_y, mean, rstd]),
        Norm::Dot { a, b } => reduce::dot(cx, a, b),
        Norm::Sum { x, over } => reduce::sum(cx, x, over),
    }
}
