//! Transposition of small blocks, at the speed of the first-level cache.

use super::gemm_mainloop::K_BLOCK;
use super::real::Float;
use pulp::{Simd, WithSimd};

/// Query rows of a tile of the gradient of attention; a multiple of every register tile's height.
pub const ROWS_OF_TILE: usize = 96;
/// Rows that one pass of a gradient to a weight sums: `d_w` goes to memory and back once per pass.
pub const ROWS_OF_PASS: usize = 4 * K_BLOCK;

/// `out[c][r] = source[r][c]` for `rows` × `columns` values; rows of `source` are `stride` apart, rows of `out` `width`.
pub struct Transpose<'a, T> {
    pub source: &'a [T],
    pub stride: usize,
    pub rows: usize,
    pub columns: usize,
    pub out: &'a mut [T],
    pub width: usize,
}

impl<T: Float> WithSimd for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Transpose { source, stride, rows, columns, out, width } = self;
        let mut done = (0, 0);
        if size_of::<T>() == size_of::<f32>() && S::F32_LANES >= QUAD {
            let (source, out) = (bytemuck::cast_slice(source), bytemuck::cast_slice_mut(out));
            // Widths of panels, of query tiles, and of a pass over rows: known when compiled, they make half the instructions.
            let shape = [rows, columns];
            done = match width {
                8 => quads::<S, 2>(simd, source, stride, shape, out),
                16 => quads::<S, 4>(simd, source, stride, shape, out),
                32 => quads::<S, 8>(simd, source, stride, shape, out),
                48 => quads::<S, 12>(simd, source, stride, shape, out),
                64 => quads::<S, 16>(simd, source, stride, shape, out),
                ROWS_OF_TILE => quads::<S, { ROWS_OF_TILE / QUAD }>(simd, source, stride, shape, out),
                ROWS_OF_PASS => quads::<S, { ROWS_OF_PASS / QUAD }>(simd, source, stride, shape, out),
                _ => (0, 0),
            };
        }
        for row in 0..rows {
            let first = if row < done.0 { done.1 } else { 0 };
            for column in first..columns {
                out[column * width + row] = source[row * stride + column];
            }
        }
    }
}

/// Elements of 128 bits, within which every instruction set transposes.
const QUAD: usize = 4;

/// Whole groups of four rows by one vector, rows of `out` being `WIDTH` quads; returns the rows and columns they cover.
#[inline(always)]
fn quads<S: Simd, const WIDTH: usize>(
    simd: S,
    source: &[f32],
    stride: usize,
    [rows, columns]: [usize; 2],
    out: &mut [f32],
) -> (usize, usize) {
    // The last row of `out` may end before its width; its vector is then left to the caller.
    let len = out.len().min(columns * WIDTH * QUAD);
    let out = bytemuck::cast_slice_mut::<f32, [f32; QUAD]>(&mut out[..len - len % QUAD]);
    let lines = out.as_chunks_mut::<WIDTH>().0.chunks_exact_mut(S::F32_LANES);
    let covered = lines.len() * S::F32_LANES;
    for (column, out) in (0..columns).step_by(S::F32_LANES).zip(lines) {
        for quad in 0..(rows / QUAD).min(WIDTH) {
            let vectors: [S::f32s; QUAD] = std::array::from_fn(|i| {
                let values = &source[(quad * QUAD + i) * stride + column..][..S::F32_LANES];
                bytemuck::cast_slice(values)[0]
            });
            // Vector i of the result holds columns i, i + 4, ..: four rows of each, in 128 bits.
            for (i, vector) in simd.deinterleave_shfl_f32s(vectors).iter().enumerate() {
                let columns: &[[f32; QUAD]] = bytemuck::cast_slice(std::slice::from_ref(vector));
                for (j, rows) in columns.iter().enumerate() {
                    out[j * QUAD + i][quad] = *rows;
                }
            }
        }
    }
    (rows - rows % QUAD, covered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::Arch;

    fn check<T: Float>(arch: Arch) {
        for (rows, columns, width) in [
            (1, 1, 1),
            (3, 40, 8),
            (4, 16, 32),
            (64, 64, 64),
            (7, 35, 16),
            (30, 5, 48),
            (90, 40, ROWS_OF_TILE),
            (500, 20, ROWS_OF_PASS),
            (20, 33, 21),
        ] {
            let stride = columns + 3;
            let source: Vec<T> = (0..rows * stride).map(|i| T::from_f64(i as f64)).collect();
            // One value less where the last row allows it: rows of a bigger matrix end before their width.
            let mut out = vec![T::LOWEST; columns * width - usize::from(rows < width)];
            arch.dispatch(Transpose { source: &source, stride, rows, columns, out: &mut out, width });
            for (i, &found) in out.iter().enumerate() {
                let (column, row) = (i / width, i % width);
                let expected = if row < rows { source[row * stride + column] } else { T::LOWEST };
                assert!(found == expected, "{rows}x{columns} on {arch:?}: column {column} of row {row}");
            }
        }
    }

    #[test]
    fn every_instruction_set_transposes() {
        #[allow(unused_mut)]
        let mut archs = vec![Arch::new(), Arch::Scalar];
        #[cfg(target_arch = "x86_64")]
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        for arch in archs {
            check::<f32>(arch);
            check::<f64>(arch);
        }
    }
}
