//! The product core: `out += left · right` by register tiles, for left operands given as row slices per K block.
//!
//! A tile is `ROWS` rows by one panel (up to 4 vectors with AVX-512, 2 with AVX2). Its accumulators start at zero in every
//! K block and are added to `out` at the block's end. So an element of `out` is a fixed sum over K blocks of fixed chains of
//! fused multiply-adds: it does not depend on the tile, row chunk, column group or thread that computed it.

use super::pack::{Columns, Packed, Panel, Tiling};
use super::real::Float;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Elements of `out` (rows × columns) that one pass over the K blocks covers: they stay in the second-level cache.
const GROUP_ELEMENTS: usize = 64 * 1024;

/// K values of a row that the innermost loop reads at a time.
const STEP: usize = 8;

/// A stretch of the K dimension: `len` values from `start` of one tap (kernel position), at row `k` of the right operand.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub tap: usize,
    pub start: usize,
    pub len: usize,
    pub k: usize,
}

/// The K dimension as `taps` × `depth`, cut into blocks of nearly equal length.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub taps: usize,
    pub depth: usize,
    per_tap: usize,
    length: usize,
    /// Row of the right operand at which the first tap begins.
    offset: usize,
}

impl Blocks {
    pub fn new(taps: usize, depth: usize, longest: usize) -> Blocks {
        let per_tap = depth.div_ceil(longest);
        Blocks { taps, depth, per_tap, length: depth.div_ceil(per_tap), offset: 0 }
    }

    /// With blocks that begin at multiples of `step`, which divides the longest block.
    pub fn stepped(self, step: usize) -> Blocks {
        let length = self.length.next_multiple_of(step);
        Blocks { per_tap: self.depth.div_ceil(length), length, ..self }
    }

    /// Length of the longest block.
    pub fn longest(&self) -> usize {
        self.length.min(self.depth)
    }

    pub fn at(self, offset: usize) -> Blocks {
        Blocks { offset, ..self }
    }

    /// All taps of one stretch of the depth, then the next stretch: neighbouring taps read the same pixels, still cached.
    fn iter(self) -> impl Iterator<Item = Block> {
        (0..self.taps * self.per_tap).map(move |i| {
            let (tap, start) = (i % self.taps, i / self.taps * self.length);
            let len = self.length.min(self.depth - start);
            Block { tap, start, len, k: self.offset + tap * self.depth + start }
        })
    }
}

/// The left operand of one row chunk.
pub trait Left<T> {
    /// Some rows take no part in some blocks. Products with such an operand always add to what is there.
    const SPARSE: bool = false;

    /// What gives the values of a row in `block`, `block.len` of them.
    fn rows<'s>(&'s self, block: Block) -> impl Fn(usize) -> &'s [T]
    where
        T: 's;

    /// Those of `rows` rows that take part in `block`.
    #[inline(always)]
    fn present(&self, rows: usize, _: Block) -> Range<usize> {
        0..rows
    }

    /// Where in the chunk the output of row `row` lies.
    #[inline(always)]
    fn place(&self, row: usize) -> usize {
        row
    }
}

/// The right operand of one task.
pub trait Right<T> {
    fn columns(&self) -> Columns;

    /// What a panel holds in `block`: `[block.len][columns of the panel, with padding]`.
    fn block<S: Simd>(&mut self, simd: S, panel: Panel, block: Block) -> &[T];
}

impl<T: Float> Right<T> for Packed<'_, T> {
    fn columns(&self) -> Columns {
        self.columns
    }

    #[inline(always)]
    fn block<S: Simd>(&mut self, _: S, panel: Panel, block: Block) -> &[T] {
        self.rows(panel, block.k, block.len)
    }
}

/// Rows of a matrix, `stride` apart.
pub struct Dense<'a, T> {
    pub values: &'a [T],
    pub stride: usize,
}

impl<T> Left<T> for Dense<'_, T> {
    #[inline(always)]
    fn rows<'s>(&'s self, block: Block) -> impl Fn(usize) -> &'s [T]
    where
        T: 's,
    {
        move |row| &self.values[row * self.stride + block.start..][..block.len]
    }
}

/// The tiling of the instruction set at hand.
pub struct Detect<T>(pub std::marker::PhantomData<T>);

impl<T: Float> WithSimd for Detect<T> {
    type Output = Tiling;

    fn with_simd<S: Simd>(self, _: S) -> Tiling {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        Tiling { lanes, widest: if S::REGISTER_COUNT >= 32 { 4 } else { 2 } }
    }
}

/// Where a product goes.
pub struct Target<'a, T> {
    /// Begins at the first row and the first panel's first column.
    pub values: &'a mut [T],
    /// Elements from row to row.
    pub stride: usize,
    /// Whether to add to what is there, or overwrite it.
    pub add: bool,
}

/// `out[rows, columns of panels] (+)= left · right`.
#[inline(always)]
pub fn multiply<T: Float, S: Simd, L: Left<T>, R: Right<T>>(
    simd: S,
    left: &L,
    rows: usize,
    blocks: Blocks,
    mut right: R,
    panels: Range<usize>,
    out: Target<'_, T>,
) {
    let columns = right.columns();
    let first = columns.panel(panels.start).start;
    let group = (GROUP_ELEMENTS / (rows * columns.widest())).max(1);
    for start in panels.clone().step_by(group) {
        for (i, block) in blocks.iter().enumerate() {
            let rows = left.present(rows, block);
            if rows.is_empty() {
                continue;
            }
            for index in start..panels.end.min(start + group) {
                let panel = columns.panel(index);
                let packed = right.block(simd, panel, block);
                let values = &mut out.values[panel.start - first..];
                let out = Target { values, stride: out.stride, add: out.add || i > 0 };
                let strip = Strip { left, rows: rows.clone(), block, packed, panel, out };
                match (panel.vectors, S::REGISTER_COUNT >= 32) {
                    (1, _) => simd.vectorize(Tiles::<_, 12, 1>(strip)),
                    (2, true) => simd.vectorize(Tiles::<_, 12, 2>(strip)),
                    (2, false) => simd.vectorize(Tiles::<_, 6, 2>(strip)),
                    (3, true) => simd.vectorize(Tiles::<_, 8, 3>(strip)),
                    (4, true) => simd.vectorize(Tiles::<_, 6, 4>(strip)),
                    (vectors, _) => unreachable!("no tile of {vectors} vectors"),
                }
            }
        }
    }
}

/// Rows of one panel in one K block.
struct Strip<'a, T, L> {
    left: &'a L,
    rows: Range<usize>,
    block: Block,
    packed: &'a [T],
    panel: Panel,
    out: Target<'a, T>,
}

/// A strip cut into tiles of one shape: a function of its own, so that the compiler allocates registers for one loop only.
/// The last tile repeats its last row and keeps only what exists.
struct Tiles<P, const ROWS: usize, const VECTORS: usize>(P);

impl<T: Float, L: Left<T>, const ROWS: usize, const VECTORS: usize> WithSimd for Tiles<Strip<'_, T, L>, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Strip { left, rows, block, packed, panel, out: Target { values: out, stride, add } } = self.0;
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let values = left.rows(block);
        for row in rows.clone().step_by(ROWS) {
            let present = ROWS.min(rows.end - row);
            let mut slices: [&[T]; ROWS] = [&[]; ROWS];
            for (r, slice) in slices.iter_mut().enumerate() {
                *slice = values(row + r.min(present - 1));
            }
            let tile = accumulate::<T, S, ROWS, VECTORS>(simd, block.len, slices, packed);
            if present == ROWS && panel.width == VECTORS * lanes {
                for r in 0..ROWS {
                    let out = &mut out[left.place(row + r) * stride..][..VECTORS * lanes];
                    let out: &mut [T::Vector<S>] = bytemuck::cast_slice_mut(out);
                    for v in 0..VECTORS {
                        out[v] = if add { T::vector_add(simd, out[v], tile[r][v]) } else { tile[r][v] };
                    }
                }
            } else {
                // Through a copy: what is indexed at run time cannot stay in registers, and the tile must.
                let edge: [[T::Vector<S>; VECTORS]; ROWS] = std::array::from_fn(|r| tile[r]);
                for r in 0..present {
                    let out = &mut out[left.place(row + r) * stride..][..panel.width];
                    for (out, &value) in out.iter_mut().zip(bytemuck::cast_slice::<_, T>(&edge[r])) {
                        *out = if add { *out + value } else { value };
                    }
                }
            }
        }
    }
}

/// The innermost loop: `ROWS × VECTORS` accumulators over one K block.
#[inline(always)]
fn accumulate<T: Float, S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    len: usize,
    left: [&[T]; ROWS],
    packed: &[T],
) -> [[T::Vector<S>; VECTORS]; ROWS] {
    let packed = bytemuck::cast_slice::<T, T::Vector<S>>(packed).as_chunks::<VECTORS>().0;
    // Whole steps as arrays of known length: one bounds check per row and step, none per element.
    let (steps, rest) = packed[..len].as_chunks::<STEP>();
    let mut whole: [&[[T; STEP]]; ROWS] = [&[]; ROWS];
    for (whole, row) in whole.iter_mut().zip(left) {
        *whole = row[..len].as_chunks().0;
    }
    let mut tile = [[T::splat(simd, T::ZERO); VECTORS]; ROWS];
    for (i, step) in steps.iter().enumerate() {
        let left: [&[T; STEP]; ROWS] = std::array::from_fn(|r| &whole[r][i]);
        for k in 0..STEP {
            for r in 0..ROWS {
                let value = T::splat(simd, left[r][k]);
                for v in 0..VECTORS {
                    tile[r][v] = T::vector_fma(simd, value, step[k][v], tile[r][v]);
                }
            }
        }
    }
    for (k, columns) in rest.iter().enumerate() {
        for r in 0..ROWS {
            let value = T::splat(simd, left[r][steps.len() * STEP + k]);
            for v in 0..VECTORS {
                tile[r][v] = T::vector_fma(simd, value, columns[v], tile[r][v]);
            }
        }
    }
    tile
}
