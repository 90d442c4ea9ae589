//! Right operands of products as the executor holds them, read forwards (`w`) or transposed (`wᵀ`, by gradients to inputs).
//!
//! A weight is held once, in panels; what a product reads of it transposed is turned block by block in thread scratch, right
//! before all rows of a task pass by. Matrices that are no weights lie row by row and are copied to panels the same way.

use super::context::Cx;
use super::gemm_mainloop::{K_BLOCK, MOST_ROWS, MOST_ROWS_TURNED, RightOperand};
use super::microkernel::{Block, Right};
use super::pack::{Columns, Packed, Panel, Tiling};
use super::real::Float;
use super::store;
use super::transpose::Transpose;
use crate::program::{Origin, ValueId};
use pulp::Simd;

/// Elements of thread scratch for the blocks of a right operand of these columns, of either kind.
pub fn scratch(columns: Columns, tiling: Tiling) -> usize {
    (K_BLOCK + tiling.lanes * tiling.widest) * columns.widest()
}

/// A matrix `[K, N]`.
#[derive(Clone, Copy)]
pub enum Rhs<'a, T> {
    Panels(Packed<'a, T>),
    /// Row-major, rows `stride` apart.
    Rows {
        values: &'a [T],
        stride: usize,
        columns: Columns,
    },
}

impl<'a, T: Float> Rhs<'a, T> {
    /// A whole row-major matrix.
    pub fn rows(values: &'a [T], columns: Columns) -> Rhs<'a, T> {
        Rhs::Rows { values, stride: columns.n, columns }
    }

    /// One of the parts of its columns.
    pub fn part(&self, index: usize) -> Rhs<'a, T> {
        match *self {
            Rhs::Panels(packed) => Rhs::Panels(packed.part(index)),
            Rhs::Rows { values, stride, columns } => {
                let columns = columns.part();
                Rhs::Rows { values: &values[index * columns.n..], stride, columns }
            }
        }
    }

    /// What lies from row `k`, column `n` on: the values, how far apart their rows are, and for how many columns.
    #[inline(always)]
    fn from(&self, k: usize, n: usize) -> (&'a [T], usize, usize) {
        match self {
            Rhs::Panels(packed) => {
                let panel = packed.columns.panel(packed.columns.panel_of(n));
                let values = packed.rows(panel, 0, packed.k);
                let stride = packed.columns.padded_width(panel);
                (&values[k * stride + n - panel.start..], stride, panel.start + panel.width - n)
            }
            Rhs::Rows { values, stride, columns } => (&values[k * stride + n..], *stride, columns.n - n),
        }
    }
}

/// A right operand read by one task.
pub struct Straight<'c, T> {
    rhs: Rhs<'c, T>,
    scratch: &'c mut [T],
}

impl<'a, T: Float> RightOperand<T> for Rhs<'a, T> {
    type Chunk<'c>
        = Straight<'c, T>
    where
        Self: 'c;
    const MOST_ROWS: usize = MOST_ROWS;

    fn columns(&self) -> Columns {
        match self {
            Rhs::Panels(packed) => packed.columns,
            Rhs::Rows { columns, .. } => *columns,
        }
    }

    fn scratch(&self, longest: usize) -> usize {
        match self {
            Rhs::Panels(_) => 0,
            Rhs::Rows { columns, .. } => longest * columns.widest(),
        }
    }

    fn chunk<'c>(&self, scratch: &'c mut [T]) -> Straight<'c, T>
    where
        Self: 'c,
    {
        Straight { rhs: *self, scratch }
    }
}

impl<T: Float> Right<T> for Straight<'_, T> {
    fn columns(&self) -> Columns {
        self.rhs.columns()
    }

    #[inline(always)]
    fn block<S: Simd>(&mut self, _: S, panel: Panel, block: Block) -> &[T] {
        match self.rhs {
            Rhs::Panels(packed) => packed.rows(panel, block.k, block.len),
            Rhs::Rows { values, stride, columns } => {
                let width = columns.padded_width(panel);
                let out = &mut self.scratch[..block.len * width];
                for (k, out) in (block.k..).zip(out.chunks_exact_mut(width)) {
                    let (out, padding) = out.split_at_mut(panel.width);
                    out.copy_from_slice(&values[k * stride + panel.start..][..panel.width]);
                    padding.fill(T::ZERO);
                }
                out
            }
        }
    }
}

/// `[taps · I, N]` with each tap transposed: the right operand `[taps · N, I]`.
#[derive(Clone, Copy)]
pub struct Transposed<'a, T> {
    rhs: Rhs<'a, T>,
    columns: Columns,
}

impl<'a, T: Float> Transposed<'a, T> {
    /// `columns` of `I`: all rows of the right operand, or those of one tap.
    pub fn new(rhs: Rhs<'a, T>, columns: Columns) -> Transposed<'a, T> {
        Transposed { rhs, columns }
    }
}

/// A transposed right operand read by one task.
pub struct Turned<'c, T> {
    from: Transposed<'c, T>,
    scratch: &'c mut [T],
}

impl<'a, T: Float> RightOperand<T> for Transposed<'a, T> {
    type Chunk<'c>
        = Turned<'c, T>
    where
        Self: 'c;
    const MOST_ROWS: usize = MOST_ROWS_TURNED;

    fn columns(&self) -> Columns {
        self.columns
    }

    fn scratch(&self, longest: usize) -> usize {
        (longest + self.rhs.columns().widest()) * self.columns.widest()
    }

    fn chunk<'c>(&self, scratch: &'c mut [T]) -> Turned<'c, T>
    where
        Self: 'c,
    {
        Turned { from: *self, scratch }
    }
}

impl<T: Float> Right<T> for Turned<'_, T> {
    fn columns(&self) -> Columns {
        self.from.columns
    }

    #[inline(always)]
    fn block<S: Simd>(&mut self, simd: S, panel: Panel, block: Block) -> &[T] {
        let Transposed { rhs, columns } = self.from;
        let (depth, width) = (rhs.columns().n, columns.padded_width(panel));
        let (near, scratch) = self.scratch.split_at_mut(columns.widest() * rhs.columns().widest());
        let out = &mut scratch[..block.len * width];
        if panel.width < width {
            out.fill(T::ZERO);
        }
        // A block may cover several taps, and a tap several panels of the right operand.
        let mut at = 0;
        while at < block.len {
            let (tap, n) = ((block.k + at) / depth, (block.k + at) % depth);
            let (source, stride, available) = rhs.from(tap * columns.n + panel.start, n);
            let count = available.min(block.len - at);
            let mut source = &source[..(panel.width - 1) * stride + count];
            if let Rhs::Panels(_) = rhs {
                // Read in one go first: the weight comes from afar, and the turning would wait for each of its lines.
                near[..source.len()].copy_from_slice(source);
                source = near;
            }
            let out = &mut out[at * width..];
            simd.vectorize(Transpose { source, stride, rows: panel.width, columns: count, out, width });
            at += count;
        }
        out
    }
}

impl<'a, T: Float> Cx<'a, T> {
    /// The right operand of a product, its columns in `parts` parts where that is not settled by how it is held.
    pub fn rhs(&self, id: ValueId, parts: usize) -> Rhs<'a, T> {
        let columns = store::columns(self.program, id, parts, self.machine.tiling);
        let values = self.value(id);
        match &self.program.value(id).origin {
            Origin::Weight(weight) if weight.pack.is_rhs() => {
                let k = self.program.value(id).len() / columns.n;
                Rhs::Panels(Packed { columns, k, data: values })
            }
            Origin::Weight(_) | Origin::Input(_) | Origin::Op(_) => Rhs::rows(values, columns),
        }
    }
}
