//! Right operands of products, stored so that the microkernel streams them: panels of a few vectors of columns, `[k][columns]`.
//!
//! The columns of a matrix are padded to whole vectors and dealt into panels of nearly equal width, so a matrix whose width
//! is a multiple of the vector length wastes nothing.

use super::real::Real;
use rayon::prelude::*;

/// What the instruction set wants: lanes of a vector and vectors of the widest panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    pub lanes: usize,
    pub widest: usize,
}

/// The split of `n` columns into panels.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    pub n: usize,
    pub panels: usize,
    lanes: usize,
    /// Vectors of a panel; the first `wider` panels have one more.
    vectors: usize,
    wider: usize,
}

/// One panel's place among the columns.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// First column.
    pub start: usize,
    /// Columns that exist; the rest of the vectors is padding.
    pub width: usize,
    pub vectors: usize,
}

impl Columns {
    pub fn new(n: usize, tiling: Tiling) -> Columns {
        let vectors = n.div_ceil(tiling.lanes);
        let panels = vectors.div_ceil(tiling.widest);
        Columns { n, panels, lanes: tiling.lanes, vectors: vectors / panels, wider: vectors % panels }
    }

    /// Columns with padding.
    pub fn padded(&self) -> usize {
        (self.panels * self.vectors + self.wider) * self.lanes
    }

    /// Columns of the widest panel, with padding.
    pub fn widest(&self) -> usize {
        (self.vectors + usize::from(self.wider > 0)) * self.lanes
    }

    pub fn panel(&self, index: usize) -> Panel {
        let start = (index * self.vectors + index.min(self.wider)) * self.lanes;
        let vectors = self.vectors + usize::from(index < self.wider);
        Panel { start, width: (vectors * self.lanes).min(self.n - start), vectors }
    }

    /// Fills `data`, the packed form of a matrix of `k` rows, panel by panel in parallel.
    pub fn fill<T: Real>(&self, k: usize, data: &mut [T], write: impl Fn(Panel, &mut [T]) + Sync) {
        let bytes = |vectors: usize| vectors * self.lanes * k;
        let (wide, rest) = data[..self.padded() * k].split_at_mut(self.wider * bytes(self.vectors + 1));
        let wide = wide.par_chunks_mut(bytes(self.vectors + 1)).enumerate();
        wide.for_each(|(i, panel)| write(self.panel(i), panel));
        let rest = rest.par_chunks_mut(bytes(self.vectors).max(1)).enumerate();
        rest.for_each(|(i, panel)| write(self.panel(self.wider + i), panel));
    }

    /// Packs a row-major `[k, n]` matrix whose rows are `stride` apart.
    pub fn pack<T: Real>(&self, source: &[T], stride: usize, k: usize, data: &mut [T]) {
        self.fill(k, data, |panel, out| {
            for (row, out) in out.chunks_exact_mut(panel.vectors * self.lanes).enumerate() {
                let (values, padding) = out.split_at_mut(panel.width);
                values.copy_from_slice(&source[row * stride + panel.start..][..panel.width]);
                padding.fill(T::ZERO);
            }
        });
    }

    /// Packs the transpose, times `scale`, of `n` rows of `k` values that are `stride` apart.
    pub fn pack_transposed<T: Real>(&self, source: &[T], stride: usize, k: usize, scale: T, data: &mut [T]) {
        self.fill(k, data, |panel, out| {
            let width = panel.vectors * self.lanes;
            for column in 0..width {
                if column < panel.width {
                    let values = &source[(panel.start + column) * stride..][..k];
                    for (out, &value) in out[column..].iter_mut().step_by(width).zip(values) {
                        *out = value * scale;
                    }
                } else {
                    out[column..].iter_mut().step_by(width).for_each(|out| *out = T::ZERO);
                }
            }
        });
    }
}

/// A packed matrix `[k, columns]`.
#[derive(Clone, Copy)]
pub struct Packed<'a, T> {
    pub columns: Columns,
    pub k: usize,
    pub data: &'a [T],
}

impl<'a, T> Packed<'a, T> {
    /// Rows `k .. k + len` of a panel.
    #[inline(always)]
    pub fn rows(&self, panel: Panel, k: usize, len: usize) -> &'a [T] {
        let width = panel.vectors * self.columns.lanes;
        &self.data[panel.start * self.k + k * width..][..len * width]
    }
}

/// Zeroed memory that starts on a cache line: vector loads then never straddle two.
pub struct Aligned<T> {
    memory: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Real> Aligned<T> {
    pub fn zeroed(len: usize) -> Aligned<T> {
        const LINE: usize = 64;
        // Whole pages of zeros come from the system untouched; the margin is for moving the start to a line.
        let memory = vec![T::ZERO; len + LINE / size_of::<T>()];
        let start = memory.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Aligned { memory, start, len }
    }

    pub fn as_slice(&self) -> &[T] {
        &self.memory[self.start..][..self.len]
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.len]
    }
}
