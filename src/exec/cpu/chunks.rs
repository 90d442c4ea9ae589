//! Loops over chunks of a value in parallel: the pieces that elementwise kernels are made of.

use super::real::Float;
use rayon::prelude::*;

/// Elements of a task: small enough for the first-level cache, large enough to outweigh handing it to a thread.
pub const CHUNK: usize = 4096;

/// Copies `source` (unless the op runs in place) and transforms, chunk by chunk in parallel.
pub fn transform<T: Float>(out: &mut [T], source: Option<&[T]>, f: impl Fn(usize, &mut [T]) + Sync) {
    transform_rows(out, 1, source, f);
}

/// The same in chunks of whole rows.
pub fn transform_rows<T: Float>(out: &mut [T], width: usize, source: Option<&[T]>, f: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = (CHUNK / width).max(1) * width;
    out.par_chunks_mut(chunk).enumerate().for_each(|(i, out)| {
        if let Some(source) = source {
            out.copy_from_slice(&source[i * chunk..][..out.len()]);
        }
        f(i * chunk, out);
    });
}

/// Copies in parallel.
pub fn copy<T: Float>(out: &mut [T], source: &[T]) {
    transform(out, Some(source), |_, _| {});
}

/// Fills in parallel.
pub fn fill<T: Float>(out: &mut [T], value: T) {
    transform(out, None, |_, out| out.fill(value));
}

/// The last dimension.
pub fn last(shape: &[usize]) -> usize {
    shape[shape.len() - 1]
}

/// `out += values`, as far as `out` goes.
#[inline(always)]
pub fn add<T: Float>(out: &mut [T], values: &[T]) {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out += value);
}
