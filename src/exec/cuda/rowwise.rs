//! Launches of what turns rows into rows. Contract: kernels/rowwise.cu.

use super::cx::Cx;
use super::kernels::constants::{HELD, PLAIN_THREADS as ELEMENTS, TEAM};
use super::launch::{Address, Launch};
use crate::program::{Rowwise, ValueId};
use bytemuck::{Pod, Zeroable};

const WARP: usize = 32;
/// Threads of a block of warps that have a row each.
const WARPS: usize = 128;

/// Matches `Rows` in kernels/rows.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Rows {
    count: i64,
    width: i32,
    team: i32,
    aligned: i32,
    unused: i32,
}
const _: () = assert!(size_of::<Rows>() == 24);

/// Matches `SoftmaxParams` in kernels/rowwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SoftmaxParams {
    rows: Rows,
    x: Address,
    d_y: Address,
    y: Address,
}
const _: () = assert!(size_of::<SoftmaxParams>() == 48);

/// Matches `UnitParams` in kernels/rowwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UnitParams {
    rows: Rows,
    x: Address,
    d_y: Address,
    y: Address,
    norm: Address,
    eps: f32,
    unused: i32,
}
const _: () = assert!(size_of::<UnitParams>() == 64);

/// Matches `CrossEntropyParams` in kernels/rowwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CrossEntropyParams {
    rows: Rows,
    logits: Address,
    targets: Address,
    loss: Address,
    lse: Address,
    d_logits: Address,
}
const _: () = assert!(size_of::<CrossEntropyParams>() == 64);

pub fn launches(op: &Rowwise, cx: &Cx) -> Vec<Launch> {
    let out = cx.address(cx.output(0));
    match *op {
        Rowwise::Softmax { x } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[x, cx.output(0)]);
            let params = SoftmaxParams { rows, x: cx.address(x), d_y: Address::NULL, y: out };
            vec![Launch::new(format!("softmax_{}", cx.dtype(x)), grid, block, 0, params)]
        }
        Rowwise::SoftmaxBackward { y, d_y } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[y, d_y, cx.output(0)]);
            let params = SoftmaxParams { rows, x: cx.address(y), d_y: cx.address(d_y), y: out };
            vec![Launch::new(format!("softmax_backward_{}", cx.dtype(y)), grid, block, 0, params)]
        }
        Rowwise::Unit { x, eps } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[x, cx.output(0)]);
            let (x_at, norm) = (cx.address(x), cx.address(cx.output(1)));
            let params = UnitParams { rows, x: x_at, d_y: Address::NULL, y: out, norm, eps: eps as f32, unused: 0 };
            vec![Launch::new(format!("unit_{}", cx.dtype(x)), grid, block, 0, params)]
        }
        Rowwise::UnitBackward { y, norm, d_y, eps } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[y, d_y, cx.output(0)]);
            let [y_at, d_y, norm] = [y, d_y, norm].map(|id| cx.address(id));
            let params = UnitParams { rows, x: y_at, d_y, y: out, norm, eps: eps as f32, unused: 0 };
            vec![Launch::new(format!("unit_backward_{}", cx.dtype(y)), grid, block, 0, params)]
        }
        Rowwise::CrossEntropy { logits, targets } => {
            let PerRow { rows, grid, block } = PerRow::new(cx, &[logits]);
            let [at, targets, lse] = [logits, targets, cx.output(1)].map(|id| cx.address(id));
            let params = CrossEntropyParams { rows, logits: at, targets, loss: out, lse, d_logits: Address::NULL };
            vec![Launch::new(format!("cross_entropy_{}", cx.dtype(logits)), grid, block, 0, params)]
        }
        Rowwise::CrossEntropyBackward { logits, targets, lse, d_loss } => {
            let PerRow { rows, .. } = PerRow::new(cx, &[logits, cx.output(0)]);
            let [at, targets, lse, loss] = [logits, targets, lse, d_loss].map(|id| cx.address(id));
            let params = CrossEntropyParams { rows, logits: at, targets, loss, lse, d_logits: out };
            let dtype = cx.dtype(logits);
            let grid = [rows.count as usize, cx.width(logits).div_ceil(ELEMENTS * 16 / dtype.bytes()), 1];
            vec![Launch::new(format!("cross_entropy_backward_{dtype}"), grid, ELEMENTS, 0, params)]
        }
    }
}

/// A launch over rows: a warp each where that many vectors hold one, else a block each.
pub struct PerRow {
    pub rows: Rows,
    pub grid: [usize; 3],
    pub block: usize,
}

impl PerRow {
    /// The rows of the first operand; all of them are as wide.
    pub fn new(cx: &Cx, operands: &[ValueId]) -> PerRow {
        let (dtype, width) = (cx.dtype(operands[0]), cx.width(operands[0]));
        let count = cx.len(operands[0]) / width;
        let vectors = (width * dtype.bytes()).div_ceil(16);
        let (team, block) = if vectors <= HELD * WARP {
            (WARP, WARPS)
        } else {
            let block = vectors.div_ceil(2).next_multiple_of(WARP).min(TEAM);
            (block, block)
        };
        let aligned =
            (width * dtype.bytes()).is_multiple_of(16) && operands.iter().all(|id| cx.address(*id).is_aligned());
        let (width, aligned) = (width as i32, i32::from(aligned));
        let rows = Rows { count: count as i64, width, team: team as i32, aligned, unused: 0 };
        PerRow { rows, grid: [count.div_ceil(block / team), 1, 1], block }
    }
}
