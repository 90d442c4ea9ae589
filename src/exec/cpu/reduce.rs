//! Sums in a fixed order: over a row in lanes, over many rows in chunks; inner products and sums of channels as ops.
//!
//! Contract: `dot` per sample, `sum` over the middle dimensions of each sample or over all rows (see `program::Norm`). Sums are
//! taken in f64. Chunks depend on the shape of what is summed only, a sample's or all rows', and are added in order: bits do
//! not depend on threads, nor on the batch where a sample has its own result.

use super::context::{Cx, Outputs};
use super::real::Float;
use crate::program::{Over, ValueId};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Partial results of a reduction over a row: fixed, so that its order is.
pub const LANES: usize = 16;
/// Elements of a chunk of rows.
const CHUNK: usize = 32 * 1024;

/// Σ f(x) in f64.
#[inline(always)]
pub fn sum<T: Float>(values: &[T], f: impl Fn(T) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    lanes.iter().sum()
}

/// Σ a b in f64.
#[inline(always)]
pub fn dot<T: Float>(a: &[T], b: &[T]) -> f64 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a.to_f64() * b.to_f64();
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += a.to_f64() * b.to_f64();
    }
    lanes.iter().sum()
}

#[inline(always)]
pub fn largest<T: Float>(values: &[T]) -> T {
    let mut lanes = [T::LOWEST; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.greater(value);
        }
    }
    rest.iter().chain(&lanes).fold(T::LOWEST, |top, &value| top.greater(value))
}

/// Sets of rows, each cut into chunks.
#[derive(Clone, Copy)]
pub struct Chunks {
    pub sets: usize,
    /// Rows of a set and elements of a row.
    pub rows: usize,
    pub width: usize,
    /// Rows of a chunk and chunks of a set.
    pub length: usize,
    pub count: usize,
}

impl Chunks {
    pub fn new(sets: usize, rows: usize, width: usize) -> Chunks {
        let length = (CHUNK / width).clamp(1, rows);
        Chunks { sets, rows, width, length, count: rows.div_ceil(length) }
    }

    /// Each sample of a value `[B, .., C]` a set.
    pub fn of_samples(shape: &[usize]) -> Chunks {
        let (rows, width) = rows(&shape[1..]);
        Chunks::new(shape[0], rows, width)
    }

    /// All rows of a value `[.., C]` one set.
    pub fn of_rows(shape: &[usize]) -> Chunks {
        let (rows, width) = rows(shape);
        Chunks::new(1, rows, width)
    }

    /// Elements of `T` in which `sums` of so many numbers per chunk fit.
    pub fn workspace<T>(&self, numbers: usize) -> usize {
        self.sets * self.count * numbers * size_of::<f64>() / size_of::<T>()
    }

    /// So many sums of each set, in order. `partial` adds the elements in a range to the zeros it gets.
    pub fn sums<'w, T: Float>(
        &self,
        numbers: usize,
        workspace: &'w mut [T],
        partial: impl Fn(Range<usize>, &mut [f64]) + Sync,
    ) -> impl Iterator<Item = &'w [f64]> {
        let sums: &mut [f64] = bytemuck::cast_slice_mut(&mut workspace[..self.workspace::<T>(numbers)]);
        sums.par_chunks_mut(numbers).enumerate().for_each(|(i, sums)| {
            let (set, first) = (i / self.count * self.rows, i % self.count * self.length);
            let rows = set + first..set + (first + self.length).min(self.rows);
            sums.fill(0.0);
            partial(rows.start * self.width..rows.end * self.width, sums);
        });
        sums.chunks_exact_mut(self.count * numbers).map(move |set| {
            let (total, chunks) = set.split_at_mut(numbers);
            for chunk in chunks.chunks_exact(numbers) {
                total.iter_mut().zip(chunk).for_each(|(total, &partial)| *total += partial);
            }
            &*total
        })
    }
}

/// The rows and the width of `[.., C]`.
fn rows(shape: &[usize]) -> (usize, usize) {
    shape.split_last().map_or((1, 1), |(width, rows)| (rows.iter().product(), *width))
}

/// How a sum's rows form sets.
fn summed(shape: &[usize], over: Over) -> Chunks {
    match over {
        Over::Middle => Chunks::of_samples(shape),
        Over::Samples | Over::Rows => Chunks::of_rows(shape),
    }
}

/// The elements of a sample as rows.
fn multiplied(shape: &[usize]) -> Chunks {
    Chunks::new(shape[0], shape[1..].iter().product(), 1)
}

pub fn sum_workspace<T>(shape: &[usize], over: Over) -> usize {
    let chunks = summed(shape, over);
    chunks.workspace::<T>(chunks.width)
}

pub fn dot_workspace<T>(shape: &[usize]) -> usize {
    multiplied(shape).workspace::<T>(1)
}

pub fn run_sum<T: Float>(cx: &Cx<'_, T>, x: ValueId, over: Over, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, .. } = outputs;
    let chunks = summed(cx.shape(x), over);
    let x = cx.value(x);
    let totals = chunks.sums(chunks.width, workspace, |elements, sums| {
        cx.machine.arch.dispatch(ChannelSums { x: &x[elements], sums });
    });
    for (out, total) in out.chunks_exact_mut(chunks.width).zip(totals) {
        out.iter_mut().zip(total).for_each(|(out, &total)| *out = T::from_f64(total));
    }
}

/// Adds rows to `sums`.
struct ChannelSums<'a, T> {
    x: &'a [T],
    sums: &'a mut [f64],
}

impl<T: Float> WithSimd for ChannelSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.x.chunks_exact(self.sums.len()) {
            self.sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_f64());
        }
    }
}

pub fn run_dot<T: Float>(cx: &Cx<'_, T>, a: ValueId, b: ValueId, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, .. } = outputs;
    let chunks = multiplied(cx.shape(a));
    let (a, b) = (cx.value(a), cx.value(b));
    let totals = chunks.sums(1, workspace, |elements, sum| {
        sum[0] = cx.machine.arch.dispatch(Dot { a: &a[elements.clone()], b: &b[elements] });
    });
    out.iter_mut().zip(totals).for_each(|(out, total)| *out = T::from_f64(total[0]));
}

struct Dot<'a, T> {
    a: &'a [T],
    b: &'a [T],
}

impl<T: Float> WithSimd for Dot<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        dot(self.a, self.b)
    }
}
