//! Right operands of products, stored so that the microkernel streams them: panels of a few vectors of columns, `[k][columns]`.
//!
//! The columns of a matrix are padded to whole vectors and dealt into panels of nearly equal width, so a matrix whose width
//! is a multiple of the vector length wastes nothing. A matrix in equal parts (value and gate of GEGLU) is packed part by part:
//! read as a whole or by parts, its panels are the same.

use super::real::Float;
use crate::plan::show_bytes;
use crate::{Error, Result};
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
    /// Columns and panels of one part.
    part_n: usize,
    part_panels: usize,
    lanes: usize,
    /// Vectors of a panel; the first `wider` panels of a part have one more.
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
    /// Columns before it, with padding.
    offset: usize,
}

impl Columns {
    pub fn new(n: usize, tiling: Tiling) -> Columns {
        Columns::in_parts(n, 1, tiling)
    }

    /// `n` columns in `parts` equal parts.
    pub fn in_parts(n: usize, parts: usize, tiling: Tiling) -> Columns {
        let vectors = (n / parts).div_ceil(tiling.lanes);
        let panels = vectors.div_ceil(tiling.widest);
        Columns {
            n,
            panels: parts * panels,
            part_n: n / parts,
            part_panels: panels,
            lanes: tiling.lanes,
            vectors: vectors / panels,
            wider: vectors % panels,
        }
    }

    /// The columns of one part.
    pub fn part(&self) -> Columns {
        Columns { n: self.part_n, panels: self.part_panels, ..*self }
    }

    /// Columns with padding.
    pub fn padded(&self) -> usize {
        self.n / self.part_n * self.padded_part()
    }

    fn padded_part(&self) -> usize {
        (self.part_panels * self.vectors + self.wider) * self.lanes
    }

    /// Columns of the widest panel, with padding.
    pub fn widest(&self) -> usize {
        (self.vectors + usize::from(self.wider > 0)) * self.lanes
    }

    pub fn panel(&self, index: usize) -> Panel {
        let (part, index) = (index / self.part_panels, index % self.part_panels);
        let before = (index * self.vectors + index.min(self.wider)) * self.lanes;
        let vectors = self.vectors + usize::from(index < self.wider);
        let width = (vectors * self.lanes).min(self.part_n - before);
        Panel { start: part * self.part_n + before, width, vectors, offset: part * self.padded_part() + before }
    }

    /// The panel that holds a column.
    pub fn panel_of(&self, column: usize) -> usize {
        let (part, vector) = (column / self.part_n, column % self.part_n / self.lanes);
        let wide = self.wider * (self.vectors + 1);
        let index = if vector < wide { vector / (self.vectors + 1) } else { (vector - self.wider) / self.vectors };
        part * self.part_panels + index
    }

    /// Columns of a panel with padding.
    pub fn padded_width(&self, panel: Panel) -> usize {
        panel.vectors * self.lanes
    }

    /// Fills `data`, the packed form of a matrix of `k` rows, panel by panel in parallel.
    pub fn fill<T: Float>(&self, k: usize, data: &mut [T], write: impl Fn(Panel, &mut [T]) + Sync) {
        let size = |vectors: usize| vectors * self.lanes * k;
        for (part, data) in data[..self.padded() * k].chunks_exact_mut(self.padded_part() * k).enumerate() {
            let panel = |index: usize| self.panel(part * self.part_panels + index);
            let (wide, rest) = data.split_at_mut(self.wider * size(self.vectors + 1));
            let wide = wide.par_chunks_mut(size(self.vectors + 1)).enumerate();
            wide.for_each(|(i, out)| write(panel(i), out));
            let rest = rest.par_chunks_mut(size(self.vectors).max(1)).enumerate();
            rest.for_each(|(i, out)| write(panel(self.wider + i), out));
        }
    }

    /// `fill` on this thread alone, for tasks that must not wait for others.
    pub fn fill_here<T>(&self, k: usize, mut data: &mut [T], mut write: impl FnMut(Panel, &mut [T])) {
        for panel in (0..self.panels).map(|index| self.panel(index)) {
            let (own, rest) = data.split_at_mut(panel.vectors * self.lanes * k);
            write(panel, own);
            data = rest;
        }
    }

    /// Packs a row-major `[k, n]` matrix whose rows are `stride` apart.
    pub fn pack<T: Float>(&self, source: &[T], stride: usize, k: usize, data: &mut [T]) {
        self.fill(k, data, |panel, out| self.pack_panel(panel, source, stride, out));
    }

    /// One panel of `pack`.
    pub fn pack_panel<T: Float>(&self, panel: Panel, source: &[T], stride: usize, out: &mut [T]) {
        for (row, out) in out.chunks_exact_mut(panel.vectors * self.lanes).enumerate() {
            let (values, padding) = out.split_at_mut(panel.width);
            values.copy_from_slice(&source[row * stride + panel.start..][..panel.width]);
            padding.fill(T::ZERO);
        }
    }

    /// Packs the transpose, times `scale`, of `n` rows of `k` values that are `stride` apart.
    pub fn pack_transposed<T: Float>(&self, source: &[T], stride: usize, k: usize, scale: T, data: &mut [T]) {
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
        &self.data[panel.offset * self.k + k * width..][..len * width]
    }

    /// One of the parts of its columns.
    pub fn part(&self, index: usize) -> Packed<'a, T> {
        let columns = self.columns.part();
        let size = self.k * columns.padded();
        Packed { columns, k: self.k, data: &self.data[index * size..][..size] }
    }
}

/// So many zeros, whole pages of which come from the system untouched; an error where it does not give them.
pub fn zeros<T: bytemuck::Zeroable>(len: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| {
        let bytes = show_bytes(len.saturating_mul(size_of::<T>()));
        Error::Memory(format!(
            "the system has no {bytes} more for this process; a smaller --size or --batch needs less"
        ))
    })
}

/// Zeroed memory that starts on a cache line: vector loads then never straddle two.
pub struct Aligned<T> {
    memory: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Float> Aligned<T> {
    pub fn empty() -> Aligned<T> {
        Aligned { memory: vec![], start: 0, len: 0 }
    }

    /// An error where the system does not give as much.
    pub fn zeroed(len: usize) -> Result<Aligned<T>> {
        const LINE: usize = 64;
        // The margin is for moving the start to a line.
        let memory: Vec<T> = zeros(len.saturating_add(LINE / size_of::<T>()))?;
        let start = memory.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Ok(Aligned { memory, start, len })
    }

    pub fn as_slice(&self) -> &[T] {
        &self.memory[self.start..][..self.len]
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panels cover the columns one after another, whole or by parts, and both find the same values.
    #[test]
    fn parts_and_the_whole_are_the_same_panels() {
        for (n, parts) in [(1, 1), (2, 2), (7, 1), (160, 1), (100, 2), (154, 2), (2560, 2)] {
            let columns = Columns::in_parts(n, parts, Tiling { lanes: 8, widest: 3 });
            let source: Vec<f32> = (0..2 * n).map(|i| i as f32).collect();
            let mut data = vec![-1.0; 2 * columns.padded()];
            columns.pack(&source, n, 2, &mut data);
            let packed = Packed { columns, k: 2, data: &data };
            let mut start = 0;
            for index in 0..columns.panels {
                let panel = columns.panel(index);
                assert_eq!(panel.start, start);
                start += panel.width;
                for column in panel.start..start {
                    assert_eq!(columns.panel_of(column), index);
                    assert_eq!(packed.rows(panel, 1, 1)[column - panel.start], (n + column) as f32);
                }
                let (part, index) = (index / columns.part().panels, index % columns.part().panels);
                let of_part = packed.part(part);
                assert_eq!(of_part.rows(of_part.columns.panel(index), 0, 2), packed.rows(panel, 0, 2));
            }
            assert_eq!(start, n);
        }
    }
}
