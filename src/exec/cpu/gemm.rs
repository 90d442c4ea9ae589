//! Matrix product with its epilogue: `out = activation(x w + bias) + residual`.
//!
//! Contract: `x [.., K]` row-major, `w [K, N]` packed into column panels (a weight at load, an input into the workspace before
//! the product), `bias [N]`, `residual` and `out` `[.., N]`; GEGLU: `w [K, 2H]`, `out [.., H] = a * gelu(g)`, where value and
//! gate panels of the same columns are computed side by side and `[.., 2H]` never exists. Cut and bits: see `product`; the
//! K blocks depend on `K` only, so a row's bits depend on nothing but that row.

use super::microkernel::{Blocks, Dense};
use super::pack::{Columns, Packed, Tiling};
use super::product::{Cut, MOST_ROWS, Operand, Product, Residual, tile_scratch};
use super::real::Real;
use super::{Cx, Machine, Outputs};
use crate::program::{Activation, Gemm, Program};
use std::ops::Range;

/// Longest K block: its rows of a panel stay close to the core while all rows of a chunk pass by.
pub const K_BLOCK: usize = 384;

/// Rows of a matrix, as the left operand of a product.
pub struct Matrix<'a, T> {
    pub values: &'a [T],
    pub width: usize,
}

impl<T: Real> Operand<T> for Matrix<'_, T> {
    type Chunk<'c>
        = Dense<'c, T>
    where
        Self: 'c;

    fn scratch(&self, _: usize) -> usize {
        0
    }

    fn chunk<'c>(&'c self, rows: Range<usize>, _: &'c mut [T]) -> Dense<'c, T> {
        Dense { values: &self.values[rows.start * self.width..rows.end * self.width], stride: self.width }
    }
}

/// Column halves of the weight and columns of each.
pub fn halves(op: &Gemm, n: usize) -> (usize, usize) {
    if op.activation == Activation::Geglu { (2, n / 2) } else { (1, n) }
}

/// Elements of workspace: of the packed weight where it is an input, and of the product.
pub fn workspace(op: &Gemm, program: &Program, machine: &Machine) -> usize {
    let [k, n] = *program.shape(op.w) else { unreachable!("gemm weights are matrices") };
    let rows = program.value(op.x).len() / k;
    let (halves, n) = halves(op, n);
    let columns = Columns::new(n, machine.tiling);
    let packed = if super::is_weight(program, op.w) { 0 } else { halves * k * columns.padded() };
    packed + Cut::new(rows, columns.panels, machine.threads).workspace(columns)
}

pub fn scratch(op: &Gemm, program: &Program, tiling: Tiling) -> usize {
    let (_, n) = halves(op, program.shape(op.w)[1]);
    tile_scratch(Columns::new(n, tiling), op.activation, MOST_ROWS)
}

pub fn run<T: Real>(cx: &Cx<'_, T>, op: &Gemm, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, in_place } = outputs;
    let [k, n] = *cx.shape(op.w) else { unreachable!("gemm weights are matrices") };
    let (halves, n) = halves(op, n);
    let columns = Columns::new(n, cx.machine.tiling);
    let size = k * columns.padded();
    let (data, workspace): (&[T], _) = match cx.packed(op.w) {
        Some(data) => (data, workspace),
        None => {
            let (data, workspace) = workspace.split_at_mut(halves * size);
            for (half, data) in data.chunks_exact_mut(size).enumerate() {
                columns.pack(&cx.value(op.w)[half * n..], halves * n, k, data);
            }
            (data, workspace)
        }
    };
    let right = [0, halves - 1].map(|half| Packed { columns, k, data: &data[half * size..][..size] });
    let product = Product {
        left: Matrix { values: cx.value(op.x), width: k },
        rows: out.len() / n,
        blocks: Blocks::new(1, k, K_BLOCK),
        right: &right[..halves],
        bias: op.bias.map(|id| cx.value(id)),
        shift: None,
        residual: match op.residual {
            _ if in_place => Residual::InPlace,
            Some(id) => Residual::Of(cx.value(id)),
            None => Residual::None,
        },
        activation: op.activation,
    };
    product.run(&cx.machine, cx.scratch, out, workspace);
}
