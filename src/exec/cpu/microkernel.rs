//! The product core: `out += left · right` by register tiles, for left operands given as row slices per K block.
//!
//! A tile is `ROWS` rows by one panel (up to 4 vectors with AVX-512, 2 with AVX2). Its accumulators start at zero in every
//! K block and are added to `out` at the block's end. So an element of `out` is a fixed sum over K blocks of fixed chains of
//! fused multiply-adds: it does not depend on the tile, row chunk, column group or thread that computed it.

use super::pack::{Packed, Panel, Tiling};
use super::real::Real;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Columns of `out` that one pass over the K blocks covers, in elements of rows × columns: stays in the second-level cache.
const GROUP_ELEMENTS: usize = 64 * 1024;

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

    pub fn at(self, offset: usize) -> Blocks {
        Blocks { offset, ..self }
    }

    fn iter(self) -> impl Iterator<Item = Block> {
        (0..self.taps * self.per_tap).map(move |i| {
            let (tap, start) = (i / self.per_tap, i % self.per_tap * self.length);
            let len = self.length.min(self.depth - start);
            Block { tap, start, len, k: self.offset + tap * self.depth + start }
        })
    }
}

/// The left operand of one row chunk.
pub trait Left<T> {
    /// The values of row `row` in `block`, `block.len` of them.
    fn row(&self, row: usize, block: Block) -> &[T];
}

/// Rows of a matrix, `stride` apart.
pub struct Dense<'a, T> {
    pub values: &'a [T],
    pub stride: usize,
}

impl<T> Left<T> for Dense<'_, T> {
    #[inline(always)]
    fn row(&self, row: usize, block: Block) -> &[T] {
        &self.values[row * self.stride + block.start..][..block.len]
    }
}

/// The tiling of the instruction set at hand.
pub struct Detect<T>(pub std::marker::PhantomData<T>);

impl<T: Real> WithSimd for Detect<T> {
    type Output = Tiling;

    fn with_simd<S: Simd>(self, _: S) -> Tiling {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        Tiling { lanes, widest: if S::REGISTER_COUNT >= 32 { 4 } else { 2 } }
    }
}

/// `out[rows, columns of panels] (+)= left · right`; `out` begins at the first row and the first panel's first column and its
/// rows are `stride` apart. With `add` false the first K block overwrites.
#[inline(always)]
pub fn multiply<T: Real, S: Simd, L: Left<T>>(
    simd: S,
    left: &L,
    rows: usize,
    blocks: Blocks,
    right: Packed<'_, T>,
    panels: Range<usize>,
    out: &mut [T],
    stride: usize,
    add: bool,
) {
    let first = right.columns.panel(panels.start).start;
    let group = (GROUP_ELEMENTS / (rows * right.columns.widest())).max(1);
    for start in panels.clone().step_by(group) {
        for block in blocks.iter() {
            let add = add || block.k > blocks.offset;
            for index in start..panels.end.min(start + group) {
                let panel = right.columns.panel(index);
                let packed = right.rows(panel, block.k, block.len);
                let out = &mut out[panel.start - first..];
                match (panel.vectors, S::REGISTER_COUNT >= 32) {
                    (1, _) => strip::<T, S, L, 12, 1>(simd, left, rows, block, packed, panel, out, stride, add),
                    (2, true) => strip::<T, S, L, 12, 2>(simd, left, rows, block, packed, panel, out, stride, add),
                    (2, false) => strip::<T, S, L, 6, 2>(simd, left, rows, block, packed, panel, out, stride, add),
                    (3, true) => strip::<T, S, L, 8, 3>(simd, left, rows, block, packed, panel, out, stride, add),
                    (4, true) => strip::<T, S, L, 6, 4>(simd, left, rows, block, packed, panel, out, stride, add),
                    (vectors, _) => unreachable!("no tile of {vectors} vectors"),
                }
            }
        }
    }
}

/// All tiles of one panel and K block. The last tile repeats its last row and keeps only what exists.
#[inline(always)]
fn strip<T: Real, S: Simd, L: Left<T>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: &L,
    rows: usize,
    block: Block,
    packed: &[T],
    panel: Panel,
    out: &mut [T],
    stride: usize,
    add: bool,
) {
    simd.vectorize(Strip::<'_, T, L, ROWS, VECTORS> { left, rows, block, packed, panel, out, stride, add });
}

/// A function of its own per tile shape: the compiler allocates registers for one loop at a time.
struct Strip<'a, T, L, const ROWS: usize, const VECTORS: usize> {
    left: &'a L,
    rows: usize,
    block: Block,
    packed: &'a [T],
    panel: Panel,
    out: &'a mut [T],
    stride: usize,
    add: bool,
}

impl<T: Real, L: Left<T>, const ROWS: usize, const VECTORS: usize> WithSimd for Strip<'_, T, L, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in (0..self.rows).step_by(ROWS) {
            let present = ROWS.min(self.rows - row);
            let left: [&[T]; ROWS] = std::array::from_fn(|r| self.left.row(row + r.min(present - 1), self.block));
            let tile = accumulate::<T, S, ROWS, VECTORS>(simd, self.block.len, left, self.packed);
            for r in 0..ROWS {
                if r < present {
                    let out = &mut self.out[(row + r) * self.stride..][..self.panel.width];
                    store::<T, S, VECTORS>(simd, tile[r], out, self.add);
                }
            }
        }
    }
}

/// The innermost loop: `ROWS × VECTORS` accumulators over one K block.
#[inline(always)]
fn accumulate<T: Real, S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    len: usize,
    left: [&[T]; ROWS],
    packed: &[T],
) -> [[T::Vector<S>; VECTORS]; ROWS] {
    // Slices of one known length: no bounds checks inside the loop.
    let left = left.map(|row| &row[..len]);
    let (packed, _) = bytemuck::cast_slice::<T, T::Vector<S>>(packed).as_chunks::<VECTORS>();
    let packed = &packed[..len];
    let mut tile = [[T::splat(simd, T::ZERO); VECTORS]; ROWS];
    for k in 0..len {
        let columns = packed[k];
        for r in 0..ROWS {
            let value = T::splat(simd, left[r][k]);
            for v in 0..VECTORS {
                tile[r][v] = T::vector_fma(simd, value, columns[v], tile[r][v]);
            }
        }
    }
    tile
}

#[inline(always)]
fn store<T: Real, S: Simd, const VECTORS: usize>(simd: S, tile: [T::Vector<S>; VECTORS], out: &mut [T], add: bool) {
    let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
    if out.len() == VECTORS * lanes {
        for (out, value) in out.chunks_exact_mut(lanes).zip(tile) {
            let out: &mut [T::Vector<S>] = bytemuck::cast_slice_mut(out);
            out[0] = if add { T::vector_add(simd, out[0], value) } else { value };
        }
    } else {
        let values: &[T] = bytemuck::cast_slice(&tile);
        for (out, &value) in out.iter_mut().zip(values) {
            *out = if add { *out + value } else { value };
        }
    }
}
