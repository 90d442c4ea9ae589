//! What matrix products and convolutions share: `out = activation(left · right + bias + shift) + residual`, cut into tasks.
//!
//! A task is a chunk of rows times a group of panels. With many rows a task covers all panels and writes its rows of `out`
//! directly; with few rows the panels are dealt out too, each task fills a tile of the workspace, and a second pass copies the
//! tiles into `out` (rows of `out` interleave the panels of different tasks). Bits depend on neither cut: each element is
//! `bias + shift + residual`, plus its K blocks in order (see `microkernel`), the residual last where there is an activation.

use super::context::{Cx, Machine, Scratch};
use super::elementwise::activate;
use super::microkernel::{Blocks, Left, Right, Target, multiply};
use super::pack::Columns;
use super::real::Float;
use crate::program::{Activation, ValueId};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Longest K block: its rows of a panel stay close to the core while all rows of a chunk pass by.
pub const K_BLOCK: usize = 384;

/// Most rows of a task.
pub const MOST_ROWS: usize = 192;
/// Most rows of a task that turns its right operand first, so that more rows share the work.
pub const MOST_ROWS_TURNED: usize = 384;
/// Row chunks are multiples of this, so that tiles of 6 and 12 rows divide them.
const ROW_STEP: usize = 12;
/// Where panels are dealt out: enough tasks that a slow thread does not hold up the rest.
const TASKS_PER_THREAD: usize = 4;

/// The left operand of a whole product: makes the row slices of a chunk, with `scratch` to gather them into.
pub trait Operand<T: Float>: Sync {
    type Chunk<'c>: Left<T>
    where
        Self: 'c;
    /// Elements of scratch for a chunk of `rows` rows.
    fn scratch(&self, rows: usize) -> usize;
    fn chunk<'c>(&'c self, rows: Range<usize>, scratch: &'c mut [T]) -> Self::Chunk<'c>;
}

/// The right operand of a whole product: what a task reads, with `scratch` to prepare blocks in.
pub trait RightOperand<T: Float>: Copy + Sync {
    type Chunk<'c>: Right<T>
    where
        Self: 'c;
    /// Of a task.
    const MOST_ROWS: usize;
    fn columns(&self) -> Columns;
    /// Elements of scratch for blocks of up to `longest` rows.
    fn scratch(&self, longest: usize) -> usize;
    fn chunk<'c>(&self, scratch: &'c mut [T]) -> Self::Chunk<'c>
    where
        Self: 'c;
}

/// Added to every row of a sample: `values[sample or 0, at ..]`.
#[derive(Clone, Copy)]
pub struct Shift<'a, T> {
    pub values: &'a [T],
    pub stride: usize,
    pub samples: usize,
    pub rows_per_sample: usize,
}

#[derive(Clone, Copy)]
pub enum Residual<'a, T> {
    None,
    Of(&'a [T]),
    /// `out` holds it already.
    InPlace,
}

impl<'a, T: Float> Cx<'a, T> {
    /// What a product adds to: `in_place`, the output holds it already.
    pub fn residual(&self, id: Option<ValueId>, in_place: bool) -> Residual<'a, T> {
        match id {
            _ if in_place => Residual::InPlace,
            Some(id) => Residual::Of(self.value(id)),
            None => Residual::None,
        }
    }
}

/// One product. `right` has two column halves of `n` columns for GEGLU, else one.
pub struct Product<'a, T, O, R> {
    pub left: O,
    pub rows: usize,
    pub blocks: Blocks,
    pub right: &'a [R],
    pub bias: Option<&'a [T]>,
    pub shift: Option<Shift<'a, T>>,
    pub residual: Residual<'a, T>,
    pub activation: Activation,
}

/// How `rows` × `panels` is cut into tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub rows: usize,
    pub row_chunks: usize,
    /// Panels of a task.
    pub panels: usize,
    pub groups: usize,
}

impl Cut {
    /// Tasks of up to `most` rows.
    pub fn new(rows: usize, panels: usize, threads: usize, most: usize) -> Cut {
        let chunks = rows.div_ceil(most);
        if threads == 1 || rows >= threads * most {
            // Equal shares for all threads.
            let height = rows.div_ceil(chunks.next_multiple_of(threads)).next_multiple_of(ROW_STEP);
            return Cut { rows: height, row_chunks: rows.div_ceil(height), panels, groups: 1 };
        }
        let height = rows.div_ceil(chunks).next_multiple_of(ROW_STEP);
        let width = panels.div_ceil((TASKS_PER_THREAD * threads).div_ceil(chunks));
        Cut { rows: height, row_chunks: rows.div_ceil(height), panels: width, groups: panels.div_ceil(width) }
    }

    /// Elements of workspace: the tiles of all tasks, where panels are dealt out.
    pub fn workspace(&self, columns: Columns) -> usize {
        if self.groups == 1 { 0 } else { self.groups * self.row_chunks * self.rows * self.panels * columns.widest() }
    }
}

/// Elements of thread scratch a product needs besides the gathering of its left operand: two tiles of one panel.
pub fn tile_scratch(columns: Columns, activation: Activation, rows: usize) -> usize {
    if activation == Activation::None { 0 } else { 2 * rows * columns.widest() }
}

impl<'a, T, R> Product<'a, T, (), R> {
    /// A bare product that still lacks its left operand.
    pub fn of(rows: usize, blocks: Blocks, right: &'a [R], residual: Residual<'a, T>) -> Product<'a, T, (), R> {
        let (bias, shift, activation) = (None, None, Activation::None);
        Product { left: (), rows, blocks, right, bias, shift, residual, activation }
    }

    /// The product with its left operand.
    pub fn with<O>(self, left: O) -> Product<'a, T, O, R> {
        let Product { rows, blocks, right, bias, shift, residual, activation, .. } = self;
        Product { left, rows, blocks, right, bias, shift, residual, activation }
    }
}

impl<'a, T: Float, O: Operand<T>, R: RightOperand<T>> Product<'a, T, O, R> {
    pub fn run(&self, machine: &Machine, scratch: &Scratch<T>, out: &mut [T], workspace: &mut [T]) {
        let columns = self.right[0].columns();
        let cut = Cut::new(self.rows, columns.panels, machine.threads, R::MOST_ROWS);
        if cut.groups == 1 {
            out.par_chunks_mut(cut.rows * columns.n).enumerate().for_each(|(i, out)| {
                let start = i * cut.rows;
                let rows = start..(start + cut.rows).min(self.rows);
                let residual = match self.residual {
                    Residual::Of(values) => Residual::Of(&values[start * columns.n..]),
                    other => other,
                };
                self.task(machine, scratch, rows, 0..columns.panels, residual, out, columns.n);
            });
            return;
        }
        let stride = cut.panels * columns.widest();
        let tiles = &mut workspace[..cut.workspace(columns)];
        let held: &[T] = out;
        tiles.par_chunks_mut(cut.rows * stride).enumerate().for_each(|(i, tile)| {
            let (group, start) = (i / cut.row_chunks, i % cut.row_chunks * cut.rows);
            let rows = start..(start + cut.rows).min(self.rows);
            let panels = group * cut.panels..((group + 1) * cut.panels).min(columns.panels);
            let at = start * columns.n + columns.panel(panels.start).start;
            let residual = match self.residual {
                Residual::Of(values) => Residual::Of(&values[at..]),
                Residual::InPlace => Residual::Of(&held[at..]),
                Residual::None => Residual::None,
            };
            self.task(machine, scratch, rows, panels, residual, tile, stride);
        });
        let tiles: &[T] = tiles;
        out.par_chunks_mut(columns.n).enumerate().for_each(|(row, out)| {
            for group in 0..cut.groups {
                let start = columns.panel(group * cut.panels).start;
                let end =
                    if group + 1 < cut.groups { columns.panel((group + 1) * cut.panels).start } else { columns.n };
                let tile = &tiles[(group * cut.row_chunks * cut.rows + row) * stride..];
                out[start..end].copy_from_slice(&tile[..end - start]);
            }
        });
    }

    /// Rows `rows` and the columns of `panels`, into `out` whose first element is theirs. A residual slice starts there too,
    /// with rows `n` apart.
    #[allow(clippy::too_many_arguments)]
    fn task(
        &self,
        machine: &Machine,
        scratch: &Scratch<T>,
        rows: Range<usize>,
        panels: Range<usize>,
        residual: Residual<'_, T>,
        out: &mut [T],
        stride: usize,
    ) {
        scratch.with(|scratch| {
            let (gather, scratch) = scratch.split_at_mut(self.left.scratch(rows.len()));
            let (block, scratch) = scratch.split_at_mut(self.right[0].scratch(self.blocks.longest()));
            let left = self.left.chunk(rows.clone(), gather);
            let task = Task { product: self, left, rows, panels, residual, out, stride, block, scratch };
            machine.arch.dispatch(task);
        });
    }

    /// Starts each row of `out` with bias + shift (columns `columns` of column half `half`) + residual.
    #[inline(always)]
    fn start(
        &self,
        rows: &Range<usize>,
        columns: Range<usize>,
        half: usize,
        residual: Residual<'_, T>,
        out: &mut [T],
        stride: usize,
    ) {
        let n = self.right[0].columns().n;
        let bias = self.bias.map(|bias| &bias[half * n..][columns.clone()]);
        for (row, out) in out.chunks_mut(stride).take(rows.len()).enumerate() {
            let out = &mut out[..columns.len()];
            let shift = self.shift.map(|shift| shift.row(rows.start + row, &columns));
            match (residual, bias, shift) {
                (Residual::InPlace, Some(bias), Some(shift)) => {
                    for ((out, &bias), &shift) in out.iter_mut().zip(bias).zip(shift) {
                        *out += bias + shift;
                    }
                    continue;
                }
                (Residual::InPlace, bias, shift) => {
                    add(out, bias);
                    add(out, shift);
                    continue;
                }
                (Residual::None | Residual::Of(_), Some(bias), _) => out.copy_from_slice(bias),
                (Residual::None | Residual::Of(_), None, _) => out.fill(T::ZERO),
            }
            add(out, shift);
            if let Residual::Of(values) = residual {
                add(out, Some(&values[row * n..]));
            }
        }
    }
}

#[inline(always)]
fn add<T: Float>(out: &mut [T], values: Option<&[T]>) {
    if let Some(values) = values {
        for (out, &value) in out.iter_mut().zip(values) {
            *out += value;
        }
    }
}

impl<'a, T> Shift<'a, T> {
    /// The columns added to row `row` of the product.
    #[inline(always)]
    fn row(&self, row: usize, columns: &Range<usize>) -> &'a [T] {
        let sample = if self.samples == 1 { 0 } else { row / self.rows_per_sample };
        &self.values[sample * self.stride..][columns.clone()]
    }
}

struct Task<'t, 'a, T: Float, O: Operand<T> + 't, R> {
    product: &'t Product<'a, T, O, R>,
    left: O::Chunk<'t>,
    rows: Range<usize>,
    panels: Range<usize>,
    residual: Residual<'t, T>,
    out: &'t mut [T],
    stride: usize,
    /// Of the right operand.
    block: &'t mut [T],
    scratch: &'t mut [T],
}

impl<T: Float, O: Operand<T>, R: RightOperand<T>> WithSimd for Task<'_, '_, T, O, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.product.activation == Activation::None { self.plain(simd) } else { self.activated(simd) }
    }
}

impl<T: Float, O: Operand<T>, R: RightOperand<T>> Task<'_, '_, T, O, R> {
    /// Starts `out` with everything that is added, then multiplies into it.
    #[inline(always)]
    fn plain<S: Simd>(self, simd: S) {
        let Task { product, left, rows, panels, residual, out, stride, block, .. } = self;
        let columns = product.right[0].columns();
        let last = columns.panel(panels.end - 1);
        let columns = columns.panel(panels.start).start..last.start + last.width;
        let nothing = product.bias.is_none() && product.shift.is_none() && matches!(residual, Residual::None);
        let bare = nothing && !O::Chunk::SPARSE;
        if !bare {
            product.start(&rows, columns, 0, residual, out, stride);
        }
        let out = Target { values: out, stride, add: !bare };
        multiply(simd, &left, rows.len(), product.blocks, product.right[0].chunk(block), panels, out);
    }

    /// Panel by panel through a tile of scratch: product, activation, residual.
    #[inline(always)]
    fn activated<S: Simd>(self, simd: S) {
        let Product { blocks, right, activation, .. } = self.product;
        let (count, all) = (self.rows.len(), right[0].columns());
        let (widest, first) = (all.widest(), all.panel(self.panels.start).start);
        let (tile, scratch) = self.scratch.split_at_mut(count * widest);
        let gate = &mut scratch[..count * widest];
        for index in self.panels {
            let panel = all.panel(index);
            let columns = panel.start..panel.start + panel.width;
            for (half, (right, tile)) in right.iter().zip([&mut *tile, &mut *gate]).enumerate() {
                self.product.start(&self.rows, columns.clone(), half, Residual::None, tile, widest);
                let out = Target { values: tile, stride: widest, add: true };
                multiply(simd, &self.left, count, *blocks, right.chunk(self.block), index..index + 1, out);
            }
            // The whole tile in one loop, padding and all: long enough to hide the latency of the exponentials.
            if *activation == Activation::Geglu {
                activate::<T, S>(gate, Activation::Gelu);
                tile.iter_mut().zip(&*gate).for_each(|(value, &gate)| *value *= gate);
            } else {
                activate::<T, S>(tile, *activation);
            }
            let rows = self.out.chunks_mut(self.stride).zip(tile.chunks_exact(widest));
            for (row, (out, tile)) in rows.enumerate() {
                let (out, tile) = (&mut out[panel.start - first..][..panel.width], &tile[..panel.width]);
                match self.residual {
                    Residual::None => out.copy_from_slice(tile),
                    Residual::InPlace => add(out, Some(tile)),
                    Residual::Of(values) => {
                        out.copy_from_slice(&values[row * all.n + panel.start - first..][..panel.width]);
                        add(out, Some(tile));
                    }
                }
            }
        }
    }
}
