//! Separable resizing: tables of weights, and the two passes that apply them.
//!
//! Contract: `[B, H, W, C]` → `[B, height, width, C]` as `torch.nn.functional.interpolate(align_corners=False)` weighs pixels, or
//! the transposed map. A table lists for every target pixel of a side the source pixels it reads, which are neighbours, and their
//! weights: f64, rounded once. The transposed map is the same two passes with transposed tables. A task is one target row: the
//! source rows it reads are added up into one row of scratch (vertical pass), and that row's pixels into the target's.

use super::context::Cx;
use super::real::Float;
use crate::program::{Filter, Interpolation};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// How one side of an image is resized, seen from the forward map.
#[derive(Clone, Copy)]
struct Side {
    from: usize,
    to: usize,
    how: Interpolation,
}

impl Side {
    /// Calls `f` with every source pixel that target pixel `o` reads and its weight. Without antialias, pixels outside the image
    /// count to its border, so a pixel may come again; with antialias they do not count at all.
    fn taps(self, o: usize, mut f: impl FnMut(usize, f64)) {
        let Side { from, to, how } = self;
        let scale = from as f64 / to as f64;
        let stretch = if how.antialias { scale.max(1.0) } else { 1.0 };
        let (center, reach) = (scale * (o as f64 + 0.5), radius(how.filter) * stretch);
        let [mut first, mut end] = [center - reach, center + reach].map(|x| (x + 0.5).floor() as i64);
        if how.antialias {
            (first, end) = (first.max(0), end.min(from as i64));
        }
        let weight = |j: i64| kernel(how, (j as f64 + 0.5 - center) / stretch);
        let sum: f64 = (first..end).map(weight).sum();
        (first..end).for_each(|j| f(j.clamp(0, from as i64 - 1) as usize, weight(j) / sum));
    }
}

/// Pixels to either side that a filter sees.
fn radius(filter: Filter) -> f64 {
    match filter {
        Filter::Bilinear => 1.0,
        Filter::Bicubic => 2.0,
    }
}

/// The filter at a distance.
fn kernel(how: Interpolation, distance: f64) -> f64 {
    let x = distance.abs();
    let a = if how.antialias { -0.5 } else { -0.75 };
    match how.filter {
        Filter::Bilinear => (1.0 - x).max(0.0),
        Filter::Bicubic if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
        Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * a,
        Filter::Bicubic => 0.0,
    }
}

/// A resizing, forward or transposed.
#[derive(Clone, Copy)]
pub struct Resize {
    sides: [Side; 2],
    transposed: bool,
    channels: usize,
}

/// Start and length of a range of source pixels.
type Span = [u32; 2];

impl Resize {
    pub fn forward(x: &[usize], size: [usize; 2], how: Interpolation) -> Resize {
        let side = |i: usize| Side { from: x[i + 1], to: size[i], how };
        Resize { sides: [side(0), side(1)], transposed: false, channels: x[3] }
    }

    /// The gradient `d_y` of an image of the given size.
    pub fn backward(d_y: &[usize], size: [usize; 2], how: Interpolation) -> Resize {
        let side = |i: usize| Side { from: size[i], to: d_y[i + 1], how };
        Resize { sides: [side(0), side(1)], transposed: true, channels: d_y[3] }
    }

    /// Source and target pixels of a side.
    fn pixels(self, side: usize) -> [usize; 2] {
        let Side { from, to, .. } = self.sides[side];
        if self.transposed { [to, from] } else { [from, to] }
    }

    /// Calls `f` with target, source and weight of every tap of a side.
    fn taps(self, side: usize, mut f: impl FnMut(usize, usize, f64)) {
        let side = self.sides[side];
        for o in 0..side.to {
            side.taps(o, |j, weight| if self.transposed { f(j, o, weight) } else { f(o, j, weight) });
        }
    }

    /// The sources of every target (none where nothing reads a pixel), and the most of one.
    fn spans(self, side: usize, spans: &mut [Span]) -> usize {
        spans.fill([u32::MAX, 0]);
        self.taps(side, |target, source, _| {
            let [start, end] = &mut spans[target];
            (*start, *end) = ((*start).min(source as u32), (*end).max(source as u32 + 1));
        });
        for [start, end] in &mut *spans {
            (*start, *end) = if *end == 0 { (0, 0) } else { (*start, *end - *start) };
        }
        spans.iter().map(|span| span[1] as usize).max().unwrap_or(0)
    }

    /// Both tables: spans, then weights.
    pub fn workspace<T: Float>(self) -> usize {
        let table = |side| {
            let targets = self.pixels(side)[1];
            targets * (span_size::<T>() + self.spans(side, &mut vec![[0; 2]; targets]))
        };
        table(0) + table(1)
    }

    /// A source row.
    pub fn scratch(self) -> usize {
        self.pixels(1)[0] * self.channels
    }
}

/// Elements a span takes.
fn span_size<T>() -> usize {
    size_of::<Span>() / size_of::<T>()
}

/// The weights of a side, `most` for each target.
struct Table<'a, T> {
    spans: &'a [Span],
    weights: &'a [T],
    most: usize,
}

impl<'a, T: Float> Table<'a, T> {
    /// Fills a table at the start of `workspace`; gives back the rest.
    fn new(resize: Resize, side: usize, workspace: &'a mut [T]) -> (Table<'a, T>, &'a mut [T]) {
        let targets = resize.pixels(side)[1];
        let (spans, workspace) = workspace.split_at_mut(targets * span_size::<T>());
        let spans: &mut [Span] = bytemuck::cast_slice_mut(spans);
        let most = resize.spans(side, spans);
        let (weights, workspace) = workspace.split_at_mut(targets * most);
        weights.fill(T::ZERO);
        resize.taps(side, |target, source, weight| {
            weights[target * most + source - spans[target][0] as usize] += T::from_f64(weight);
        });
        (Table { spans, weights, most }, workspace)
    }

    /// The sources of a target and their weights.
    #[inline(always)]
    fn of(&self, target: usize) -> (Range<usize>, &'a [T]) {
        let [start, len] = self.spans[target].map(|n| n as usize);
        (start..start + len, &self.weights[target * self.most..][..len])
    }
}

pub fn resize<T: Float>(cx: &Cx<'_, T>, how: Resize, x: &[T], out: &mut [T], workspace: &mut [T]) {
    let (vertical, workspace) = Table::new(how, 0, workspace);
    let (horizontal, _) = Table::new(how, 1, workspace);
    let ([from, to], channels) = (how.pixels(0), how.channels);
    let width = how.scratch();
    out.par_chunks_mut(how.pixels(1)[1] * channels).enumerate().for_each(|(i, out)| {
        let (rows, weights) = vertical.of(i % to);
        let x = &x[(i / to * from + rows.start) * width..][..rows.len() * width];
        cx.scratch.with(|row| {
            let row = &mut row[..width];
            cx.machine.arch.dispatch(Row { x, weights, horizontal: &horizontal, channels, row, out });
        });
    });
}

/// One target row from the source rows it reads.
struct Row<'a, T> {
    x: &'a [T],
    weights: &'a [T],
    horizontal: &'a Table<'a, T>,
    channels: usize,
    row: &'a mut [T],
    out: &'a mut [T],
}

impl<T: Float> WithSimd for Row<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Row { x, weights, horizontal, channels, row, out } = self;
        weighted_sum::<T, S>(row, x, weights);
        for (target, out) in out.chunks_exact_mut(channels).enumerate() {
            let (sources, weights) = horizontal.of(target);
            weighted_sum::<T, S>(out, &row[sources.start * channels..], weights);
        }
    }
}

/// `out = Σ weights[i] · x[i]`, rows of `x` as wide as `out`.
#[inline(always)]
fn weighted_sum<T: Float, S: Simd>(out: &mut [T], x: &[T], weights: &[T]) {
    out.fill(T::ZERO);
    for (x, &weight) in x.chunks_exact(out.len()).zip(weights) {
        out.iter_mut().zip(x).for_each(|(out, &x)| *out = x.fma::<S>(weight, *out));
    }
}
