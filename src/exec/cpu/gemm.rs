//! Matrix product with its epilogue: `out = activation(x w + bias) + residual`, and its gradients.
//!
//! Contract: `x [.., K]` row-major, `w [K, N]` in column panels where it is a weight, else row-major (see `rhs`), `bias [N]`,
//! `residual` and `out` `[.., N]`; GEGLU: `w [K, 2H]`, `out [.., H] = a * gelu(g)`, where value and gate panels of the same
//! columns are computed side by side and `[.., 2H]` never exists. Cut and bits: see `gemm_mainloop`; the K blocks depend on `K`
//! only, so a row's bits depend on nothing but that row.
//!
//! Gradients: `d_x = d_y wᵀ + residual` is the same product with the same `w` read transposed. `d_w = xᵀ d_y` is a sum over
//! passes over rows, in order, of products whose left operand is `x` of these rows transposed chunk by chunk.

use super::context::{Cx, Machine, Outputs};
use super::gemm_mainloop::{Cut, K_BLOCK, MOST_ROWS, MOST_ROWS_TURNED, Operand, Product, Residual, tile_scratch};
use super::microkernel::{Blocks, Dense};
use super::pack::{Columns, Tiling};
use super::real::Float;
use super::rhs::{self, Rhs, Transposed};
use super::store;
use super::transpose::{ROWS_OF_PASS, Transpose};
use crate::program::{Activation, Gemm, GemmBackward, Program, ValueId};
use pulp::Arch;
use std::ops::Range;

/// K blocks of transposed operands begin at multiples of this: whole vectors, and mostly whole panels, are turned.
pub const K_STEP: usize = 64;

/// Rows of a matrix, as the left operand of a product.
pub struct Matrix<'a, T> {
    pub values: &'a [T],
    pub width: usize,
}

impl<T: Float> Operand<T> for Matrix<'_, T> {
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

/// Parts of the columns of `w` that are read apart.
fn parts(op: &Gemm) -> usize {
    if op.activation == Activation::Geglu { 2 } else { 1 }
}

/// The columns of `w`, and those of the output.
fn columns(op: &Gemm, program: &Program, tiling: Tiling) -> (Columns, Columns) {
    let columns = store::columns(program, op.w, parts(op), tiling);
    (columns, if op.activation == Activation::Geglu { columns.part() } else { columns })
}

/// Rows of a matrix.
fn rows(program: &Program, id: ValueId) -> usize {
    let shape = program.shape(id);
    shape[..shape.len() - 1].iter().product()
}

/// Elements of workspace.
pub fn workspace(op: &Gemm, program: &Program, machine: &Machine) -> usize {
    let (_, columns) = columns(op, program, machine.tiling);
    Cut::new(rows(program, op.x), columns.panels, machine.threads, MOST_ROWS).workspace(columns)
}

pub fn scratch(op: &Gemm, program: &Program, tiling: Tiling) -> usize {
    let (_, columns) = columns(op, program, tiling);
    rhs::scratch(columns, tiling) + tile_scratch(columns, op.activation, MOST_ROWS)
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Gemm, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, in_place } = outputs;
    let w = cx.rhs(op.w, parts(op));
    let k = cx.shape(op.w)[0];
    let halves: &[Rhs<'_, T>] = if parts(op) == 2 { &[w.part(0), w.part(1)] } else { &[w] };
    let product = Product {
        left: Matrix { values: cx.value(op.x), width: k },
        rows: rows(cx.program, op.x),
        blocks: Blocks::new(1, k, K_BLOCK),
        right: halves,
        bias: op.bias.map(|id| cx.value(id)),
        shift: None,
        residual: cx.residual(op.residual, in_place),
        activation: op.activation,
    };
    product.run(&cx.machine, cx.scratch, out, workspace);
}

/// The columns of a gradient.
fn backward_columns(op: &GemmBackward, program: &Program, tiling: Tiling) -> Columns {
    match *op {
        GemmBackward::Input { w, .. } => Columns::new(program.shape(w)[0], tiling),
        GemmBackward::Weight { d_y, .. } => store::columns(program, d_y, 1, tiling),
    }
}

/// Elements of workspace.
pub fn backward_workspace(op: &GemmBackward, program: &Program, machine: &Machine) -> usize {
    let columns = backward_columns(op, program, machine.tiling);
    let (rows, most) = match *op {
        GemmBackward::Input { d_y, .. } => (rows(program, d_y), MOST_ROWS_TURNED),
        GemmBackward::Weight { x, .. } => (program.value(x).len() / rows(program, x), MOST_ROWS),
    };
    Cut::new(rows, columns.panels, machine.threads, most).workspace(columns)
}

pub fn backward_scratch(op: &GemmBackward, program: &Program, tiling: Tiling) -> usize {
    let block = rhs::scratch(backward_columns(op, program, tiling), tiling);
    match op {
        GemmBackward::Input { .. } => block,
        GemmBackward::Weight { .. } => block + MOST_ROWS * ROWS_OF_PASS,
    }
}

pub fn backward<T: Float>(cx: &Cx<'_, T>, op: &GemmBackward, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, in_place } = outputs;
    let columns = backward_columns(op, cx.program, cx.machine.tiling);
    match *op {
        GemmBackward::Input { d_y, w, residual } => {
            let n = cx.shape(w)[1];
            let right = [Transposed::new(cx.rhs(w, 1), columns)];
            let blocks = Blocks::new(1, n, K_BLOCK).stepped(K_STEP);
            Product::of(rows(cx.program, d_y), blocks, &right, cx.residual(residual, in_place))
                .with(Matrix { values: cx.value(d_y), width: n })
                .run(&cx.machine, cx.scratch, out, workspace);
        }
        GemmBackward::Weight { x, d_y } => {
            let rows = rows(cx.program, d_y);
            let (k, n) = (cx.value(x).len() / rows, cx.value(d_y).len() / rows);
            for start in (0..rows).step_by(ROWS_OF_PASS) {
                let depth = ROWS_OF_PASS.min(rows - start);
                let left = Upright { values: &cx.value(x)[start * k..], width: k, depth, arch: cx.machine.arch };
                let right = [Rhs::rows(&cx.value(d_y)[start * n..], columns)];
                let residual = if start == 0 { Residual::None } else { Residual::InPlace };
                Product::of(k, Blocks::new(1, depth, K_BLOCK), &right, residual).with(left).run(
                    &cx.machine,
                    cx.scratch,
                    out,
                    workspace,
                );
            }
        }
    }
}

/// Columns of `depth` rows of a matrix, as rows of the left operand.
struct Upright<'a, T> {
    values: &'a [T],
    width: usize,
    depth: usize,
    arch: Arch,
}

impl<T: Float> Operand<T> for Upright<'_, T> {
    type Chunk<'c>
        = Dense<'c, T>
    where
        Self: 'c;

    fn scratch(&self, rows: usize) -> usize {
        rows * ROWS_OF_PASS
    }

    fn chunk<'c>(&'c self, rows: Range<usize>, scratch: &'c mut [T]) -> Dense<'c, T> {
        let (source, stride) = (&self.values[rows.start..], self.width);
        let (columns, out, width) = (rows.len(), &mut *scratch, ROWS_OF_PASS);
        self.arch.dispatch(Transpose { source, stride, rows: self.depth, columns, out, width });
        Dense { values: scratch, stride: ROWS_OF_PASS }
    }
}
