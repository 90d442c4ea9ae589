//! Elementwise ops that move or add up whole rows and columns.
//!
//! Contract: see `program::Elementwise`. A task is a chunk of output rows; every element is a copy or a sum in a fixed order.

use super::chunks::{add, last, transform_rows};
use super::real::Float;
use rayon::prelude::*;

/// Rows `a_s + b_b`.
pub fn outer_add<T: Float>(out: &mut [T], a: &[T], b: &[T], width: usize) {
    out.par_chunks_mut(b.len()).zip(a.par_chunks(width)).for_each(|(out, a)| {
        for (out, b) in out.chunks_exact_mut(width).zip(b.chunks_exact(width)) {
            out.iter_mut().zip(a).zip(b).for_each(|((out, &a), &b)| *out = a + b);
        }
    });
}

/// Sums of `d_y [S, B, C]` over `B` and over `S`, taken in f64.
pub fn outer_add_backward<T: Float>(d_a: &mut [T], d_b: &mut [T], d_y: &[T], shape: &[usize]) {
    let (samples, width) = (shape[1], shape[2]);
    let plane = samples * width;
    d_a.par_chunks_mut(width).zip(d_y.par_chunks(plane)).for_each(|(d_a, d_y)| sum_rows(d_a, d_y, width));
    d_b.par_chunks_mut(width).enumerate().for_each(|(sample, d_b)| sum_rows(d_b, &d_y[sample * width..], plane));
}

/// Sums, in f64, of the rows of `values` that start `stride` apart.
pub fn sum_rows<T: Float>(out: &mut [T], values: &[T], stride: usize) {
    for (column, out) in out.iter_mut().enumerate() {
        let sum: f64 = values[column..].iter().step_by(stride).map(|x| x.to_f64()).sum();
        *out = T::from_f64(sum);
    }
}

/// Rows of `x`, one per sample of `shape` or one for all, over all rows of `shape`.
pub fn spread<T: Float>(out: &mut [T], x: &[T], shape: &[usize]) {
    let width = last(shape);
    // Rows of `out` for each row of `x`.
    let rows = out.len() / x.len();
    transform_rows(out, width, None, |first, out| {
        for (row, out) in (first / width..).zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[row / rows * width..][..width]);
        }
    });
}

/// Two values, each with its width, side by side.
pub fn concat<T: Float>(out: &mut [T], [(a, left), (b, right)]: [(&[T], usize); 2]) {
    let width = left + right;
    transform_rows(out, width, None, |at, out| {
        let row = at / width;
        let rows = a[row * left..].chunks_exact(left).zip(b[row * right..].chunks_exact(right));
        for (out, (a, b)) in out.chunks_exact_mut(width).zip(rows) {
            out[..left].copy_from_slice(a);
            out[left..].copy_from_slice(b);
        }
    });
}

/// `len` columns of `x` from column `at` on.
pub fn columns<T: Float>(out: &mut [T], len: usize, x: &[T], width: usize, at: usize) {
    transform_rows(out, len, None, |first, out| {
        let rows = x[first / len * width..].chunks_exact(width);
        out.chunks_exact_mut(len).zip(rows).for_each(|(out, x)| out.copy_from_slice(&x[at..][..len]));
    });
}

/// Zeros, and each part, given with its width, added at its columns from some on, in their order.
pub fn scatter<'a, T: Float>(
    out: &mut [T],
    width: usize,
    parts: impl Iterator<Item = (&'a [T], usize, usize)> + Clone + Sync,
) {
    transform_rows(out, width, None, |first, out| {
        out.fill(T::ZERO);
        for (values, len, at) in parts.clone() {
            let rows = values[first / width * len..].chunks_exact(len);
            out.chunks_exact_mut(width).zip(rows).for_each(|(out, x)| add(&mut out[at..], x));
        }
    });
}
