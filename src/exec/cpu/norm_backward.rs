//! Gradients of group and layer norm from the saved statistics.
//!
//! Contract: with `x̂ = (x - mean) rstd`, `z = x̂ gamma + beta` made again, `d_z = d_y silu'(z)` or `d_y`, `g = d_z gamma` and means
//! over what was normalised: `d_x = rstd (g - mean(g) - x̂ mean(g x̂))`, `d_gamma = Σ d_y x̂`, `d_beta = Σ d_y`. Sums are taken in
//! f64, in the chunks and lanes of the forward. Group norm reads its operands twice, once for the sums and once for `d_x`, and
//! writes once. `d_x` may be `d_y`.

use super::context::{Cx, Outputs};
use super::real::Float;
use super::reduce::{Chunks, dot, sum};
use crate::program::ValueId;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Rows of a layer norm task, forward and backward.
pub const ROWS: usize = 16;

/// Per sample and channel the forward's scale and shift and a slope and an offset, per chunk the sums of each channel.
pub fn group_workspace<T: Float>(shape: &[usize]) -> usize {
    let pixels = Chunks::of_samples(shape);
    pixels.sets * 4 * pixels.width + pixels.workspace::<T>(2 * pixels.width)
}

/// `d_x = d_z scale + x slope + offset` per channel.
pub fn group<T: Float>(
    cx: &Cx<'_, T>,
    [x, d_y, gamma, beta, mean, rstd]: [ValueId; 6],
    groups: usize,
    silu: bool,
    outputs: Outputs<'_, T>,
) {
    let Outputs { values: [d_x, ..], workspace, in_place } = outputs;
    let arch = cx.machine.arch;
    let pixels = Chunks::of_samples(cx.shape(x));
    let (channels, members) = (pixels.width, pixels.width / groups);
    let d_y = if in_place { None } else { Some(cx.value(d_y)) };
    let [x, gamma, beta, mean, rstd] = [x, gamma, beta, mean, rstd].map(|id| cx.value(id));
    let (affine, workspace) = workspace.split_at_mut(pixels.sets * 2 * channels);
    let (slopes, workspace) = workspace.split_at_mut(pixels.sets * 2 * channels);

    for (sample, affine) in affine.chunks_exact_mut(2 * channels).enumerate() {
        let (scale, shift) = affine.split_at_mut(channels);
        for c in 0..channels {
            let group = sample * groups + c / members;
            let a = rstd[group].to_f64() * gamma[c].to_f64();
            (scale[c], shift[c]) = (T::from_f64(a), T::from_f64(beta[c].to_f64() - mean[group].to_f64() * a));
        }
    }

    let affine = &*affine;
    let size = pixels.rows * channels;
    let source = d_y.unwrap_or(d_x);
    let totals = pixels.sums(2 * channels, workspace, |elements, sums| {
        let (x, d_y) = (&x[elements.clone()], &source[elements.clone()]);
        let (scale, shift) = affine[elements.start / size * 2 * channels..][..2 * channels].split_at(channels);
        arch.dispatch(ChannelSums { x, d_y, scale, shift, silu, sums });
    });
    let samples = totals.zip(affine.chunks_exact(2 * channels)).zip(slopes.chunks_exact_mut(2 * channels));
    for (sample, ((sums, scale), slopes)) in samples.enumerate() {
        let (slope, offset) = slopes.split_at_mut(channels);
        for group in 0..groups {
            let (mu, r) = (mean[sample * groups + group].to_f64(), rstd[sample * groups + group].to_f64());
            let (mut sum, mut along) = (0.0, 0.0);
            for c in group * members..(group + 1) * members {
                sum += scale[c].to_f64() * sums[c];
                along += scale[c].to_f64() * (sums[channels + c] - mu * sums[c]);
            }
            let count = (pixels.rows * members) as f64;
            let steep = -r * r * along / count;
            slope[group * members..][..members].fill(T::from_f64(steep));
            offset[group * members..][..members].fill(T::from_f64(-sum / count - mu * steep));
        }
    }

    let slopes = &*slopes;
    d_x.par_chunks_mut(size).enumerate().for_each(|(sample, d_x)| {
        let (scale, shift) = affine[sample * 2 * channels..][..2 * channels].split_at(channels);
        let (slope, offset) = slopes[sample * 2 * channels..][..2 * channels].split_at(channels);
        d_x.par_chunks_mut(pixels.length * channels).enumerate().for_each(|(i, d_x)| {
            let at = sample * size + i * pixels.length * channels;
            if let Some(d_y) = d_y {
                d_x.copy_from_slice(&d_y[at..][..d_x.len()]);
            }
            arch.dispatch(Apply { x: &x[at..], d_x, scale, shift, slope, offset, silu });
        });
    });
}

/// `d_y`, or through SiLU at `z = x scale + shift`: `silu'(z) = s + z s (1 - s)` with `s` the sigmoid of `z`.
#[inline(always)]
fn d_z<T: Float, S: Simd, const SILU: bool>(x: T, d_y: T, scale: T, shift: T) -> T {
    if !SILU {
        return d_y;
    }
    let z = x.fma::<S>(scale, shift);
    let s = z.sigmoid::<S>();
    d_y * (z * s).fma::<S>(T::ONE - s, s)
}

/// Adds Σ d_z and Σ d_z x over the pixels of a chunk, per channel.
struct ChannelSums<'a, T> {
    x: &'a [T],
    d_y: &'a [T],
    scale: &'a [T],
    shift: &'a [T],
    silu: bool,
    sums: &'a mut [f64],
}

impl<T: Float> ChannelSums<'_, T> {
    #[inline(always)]
    fn add<S: Simd, const SILU: bool>(self) {
        let channels = self.scale.len();
        let (scale, shift) = (self.scale, &self.shift[..channels]);
        let (sums, along) = self.sums.split_at_mut(channels);
        let along = &mut along[..channels];
        let pixels = self.x.chunks_exact(channels).zip(self.d_y.chunks_exact(channels));
        for (x, d_y) in pixels {
            for c in 0..channels {
                let d_z = d_z::<T, S, SILU>(x[c], d_y[c], scale[c], shift[c]).to_f64();
                sums[c] += d_z;
                along[c] += d_z * x[c].to_f64();
            }
        }
    }
}

impl<T: Float> WithSimd for ChannelSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        if self.silu { self.add::<S, true>() } else { self.add::<S, false>() }
    }
}

/// From `d_y` in `d_x` to `d_x`, pixel by pixel.
struct Apply<'a, T> {
    x: &'a [T],
    d_x: &'a mut [T],
    scale: &'a [T],
    shift: &'a [T],
    slope: &'a [T],
    offset: &'a [T],
    silu: bool,
}

impl<T: Float> Apply<'_, T> {
    #[inline(always)]
    fn apply<S: Simd, const SILU: bool>(self) {
        let channels = self.scale.len();
        let (scale, shift) = (self.scale, &self.shift[..channels]);
        let (slope, offset) = (&self.slope[..channels], &self.offset[..channels]);
        for (x, d_x) in self.x.chunks_exact(channels).zip(self.d_x.chunks_exact_mut(channels)) {
            for c in 0..channels {
                let d_z = d_z::<T, S, SILU>(x[c], d_x[c], scale[c], shift[c]);
                d_x[c] = d_z * scale[c] + x[c].fma::<S>(slope[c], offset[c]);
            }
        }
    }
}

impl<T: Float> WithSimd for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        if self.silu { self.apply::<S, true>() } else { self.apply::<S, false>() }
    }
}

pub fn layer<T: Float>(cx: &Cx<'_, T>, [x, d_y, gamma, mean, rstd]: [ValueId; 5], outputs: Outputs<'_, T>) {
    let Outputs { values: [d_x, ..], in_place, .. } = outputs;
    let d_y = if in_place { None } else { Some(cx.value(d_y)) };
    let [x, gamma, mean, rstd] = [x, gamma, mean, rstd].map(|id| cx.value(id));
    let task = ROWS * gamma.len();
    d_x.par_chunks_mut(task).enumerate().for_each(|(i, d_x)| {
        if let Some(d_y) = d_y {
            d_x.copy_from_slice(&d_y[i * task..][..d_x.len()]);
        }
        let (x, mean, rstd) = (&x[i * task..], &mean[i * ROWS..], &rstd[i * ROWS..]);
        cx.machine.arch.dispatch(Layer { x, d_x, gamma, mean, rstd });
    });
}

/// From `d_y` in `d_x` to `d_x`, row by row.
struct Layer<'a, T> {
    x: &'a [T],
    d_x: &'a mut [T],
    gamma: &'a [T],
    mean: &'a [T],
    rstd: &'a [T],
}

impl<T: Float> WithSimd for Layer<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.gamma.len();
        let rows = self.x.chunks_exact(width).zip(self.d_x.chunks_exact_mut(width));
        for ((x, d), (&mean, &rstd)) in rows.zip(self.mean.iter().zip(self.rstd)) {
            d.iter_mut().zip(self.gamma).for_each(|(d, &gamma)| *d *= gamma);
            let total = sum(d, |d| d.to_f64());
            let (mu, r) = (mean.to_f64(), rstd.to_f64());
            let along = (dot(d, x) - mu * total) * r;
            let slope = T::from_f64(-r * along / width as f64);
            let offset = T::from_f64(-total / width as f64);
            for (d, &x) in d.iter_mut().zip(x) {
                *d = (*d + (x - mean).fma::<S>(slope, offset)) * rstd;
            }
        }
    }
}

/// Per chunk the sums of each channel.
pub fn affine_workspace<T: Float>(shape: &[usize]) -> usize {
    let rows = Chunks::of_rows(shape);
    rows.workspace::<T>(2 * rows.width)
}

pub fn affine<T: Float>(cx: &Cx<'_, T>, [x, d_y, mean, rstd]: [ValueId; 4], outputs: Outputs<'_, T>) {
    let Outputs { values: [d_gamma, d_beta, _], workspace, .. } = outputs;
    let rows = Chunks::of_rows(cx.shape(x));
    let [x, d_y, mean, rstd] = [x, d_y, mean, rstd].map(|id| cx.value(id));
    let totals = rows.sums(2 * rows.width, workspace, |elements, sums| {
        let first = elements.start / rows.width;
        let (x, d_y) = (&x[elements.clone()], &d_y[elements]);
        cx.machine.arch.dispatch(AffineSums { x, d_y, mean: &mean[first..], rstd: &rstd[first..], sums });
    });
    for sums in totals {
        let (along, total) = sums.split_at(rows.width);
        d_gamma.iter_mut().zip(along).for_each(|(d, &sum)| *d = T::from_f64(sum));
        d_beta.iter_mut().zip(total).for_each(|(d, &sum)| *d = T::from_f64(sum));
    }
}

/// Adds Σ d_y x̂ and Σ d_y over the rows of a chunk, per channel.
struct AffineSums<'a, T> {
    x: &'a [T],
    d_y: &'a [T],
    mean: &'a [T],
    rstd: &'a [T],
    sums: &'a mut [f64],
}

impl<T: Float> WithSimd for AffineSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.sums.len() / 2;
        let (along, total) = self.sums.split_at_mut(width);
        let rows = self.x.chunks_exact(width).zip(self.d_y.chunks_exact(width));
        for ((x, d_y), (mean, rstd)) in rows.zip(self.mean.iter().zip(self.rstd)) {
            let (mean, rstd) = (mean.to_f64(), rstd.to_f64());
            for (((along, total), x), d_y) in along.iter_mut().zip(&mut *total).zip(x).zip(d_y) {
                *along += d_y.to_f64() * (x.to_f64() - mean) * rstd;
                *total += d_y.to_f64();
            }
        }
    }
}
