//! Group and layer normalisation, with the statistics the backward needs as outputs; gradients, inner products and sums are called from here.
//!
//! Contract: group norm over `x [B, .., C]`, each group of `C / groups` channels and all pixels of a sample; layer norm over the
//! last dimension; biased variance; `y = (x - mean) rstd gamma + beta`, SiLU if asked; `mean` and `rstd` as outputs. Sums are
//! taken in f64. Group norm sums per channel over chunks of pixels whose number depends on the sample's shape only, then adds
//! the chunks in order; layer norm sums a row in fixed lanes: bits depend on neither batch nor threads. `y` may be `x`.

use super::context::{Cx, Outputs};
use super::elementwise::activate;
use super::norm_backward;
use super::norm_backward::ROWS;
use super::real::Float;
use super::reduce::{self, Chunks, sum};
use crate::program::{Activation, Norm, Program, ValueId};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

pub fn workspace<T: Float>(op: &Norm, program: &Program) -> usize {
    match *op {
        // Per chunk and channel a sum and a sum of squares, per sample and channel a scale and a shift.
        Norm::Group { x, .. } => {
            let pixels = Chunks::of_samples(program.shape(x));
            pixels.workspace::<T>(2 * pixels.width) + pixels.sets * 2 * pixels.width
        }
        Norm::GroupBackward { x, .. } => norm_backward::group_workspace::<T>(program.shape(x)),
        Norm::LayerBackwardAffine { x, .. } => norm_backward::affine_workspace::<T>(program.shape(x)),
        Norm::Dot { a, .. } => reduce::dot_workspace::<T>(program.shape(a)),
        Norm::Sum { x, over } => reduce::sum_workspace::<T>(program.shape(x), over),
        Norm::Layer { .. } | Norm::LayerBackward { .. } => 0,
    }
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Norm, outputs: Outputs<'_, T>) {
    match *op {
        Norm::Group { x, gamma, beta, groups, eps, silu } => {
            let affine = (cx.value(gamma), cx.value(beta));
            let source = if outputs.in_place { None } else { Some(cx.value(x)) };
            group(cx, cx.shape(x), source, affine, groups, eps, silu, outputs);
        }
        Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, groups, silu } => {
            norm_backward::group(cx, [x, d_y, gamma, beta, mean, rstd], groups, silu, outputs);
        }
        Norm::Layer { x, gamma, beta, eps } => layer(cx, x, gamma, beta, eps, outputs),
        Norm::LayerBackward { x, d_y, gamma, mean, rstd } => {
            norm_backward::layer(cx, [x, d_y, gamma, mean, rstd], outputs);
        }
        Norm::LayerBackwardAffine { x, d_y, mean, rstd } => {
            norm_backward::affine(cx, [x, d_y, mean, rstd], outputs);
        }
        Norm::Dot { a, b } => reduce::run_dot(cx, a, b, outputs),
        Norm::Sum { x, over } => reduce::run_sum(cx, x, over, outputs),
    }
}

fn layer<T: Float>(cx: &Cx<'_, T>, x: ValueId, gamma: ValueId, beta: ValueId, eps: f64, outputs: Outputs<'_, T>) {
    let Outputs { values: [y, mean, rstd], in_place, .. } = outputs;
    let (gamma, beta) = (cx.value(gamma), cx.value(beta));
    let x = if in_place { None } else { Some(cx.value(x)) };
    let width = gamma.len();
    let rows = y.par_chunks_mut(ROWS * width).zip(mean.par_chunks_mut(ROWS)).zip(rstd.par_chunks_mut(ROWS));
    rows.enumerate().for_each(|(i, ((y, mean), rstd))| {
        if let Some(x) = x {
            y.copy_from_slice(&x[i * ROWS * width..][..y.len()]);
        }
        cx.machine.arch.dispatch(Layer { y, mean, rstd, gamma, beta, eps });
    });
}

struct Layer<'a, T> {
    y: &'a mut [T],
    mean: &'a mut [T],
    rstd: &'a mut [T],
    gamma: &'a [T],
    beta: &'a [T],
    eps: f64,
}

impl<T: Float> WithSimd for Layer<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.gamma.len();
        let stats = self.mean.iter_mut().zip(self.rstd);
        for (y, (mean, rstd)) in self.y.chunks_exact_mut(width).zip(stats) {
            let mu = sum(y, |x| x.to_f64()) / width as f64;
            let variance = sum(y, |x| (x.to_f64() - mu) * (x.to_f64() - mu)) / width as f64;
            let r = 1.0 / (variance + self.eps).sqrt();
            (*mean, *rstd) = (T::from_f64(mu), T::from_f64(r));
            for ((y, &gamma), &beta) in y.iter_mut().zip(self.gamma).zip(self.beta) {
                *y = ((*y - *mean) * *rstd).fma::<S>(gamma, beta);
            }
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn group<T: Float>(
    cx: &Cx<'_, T>,
    shape: &[usize],
    x: Option<&[T]>,
    (gamma, beta): (&[T], &[T]),
    groups: usize,
    eps: f64,
    silu: bool,
    outputs: Outputs<'_, T>,
) {
    let Outputs { values: [y, mean, rstd], workspace, .. } = outputs;
    let arch = cx.machine.arch;
    let Chunks { sets: batch, rows: pixels, width: channels, length: chunk, count: chunks } = Chunks::of_samples(shape);
    let (affine, partial) = workspace.split_at_mut(batch * 2 * channels);
    let partial = &mut partial[..batch * chunks * 2 * channels * size_of::<f64>() / size_of::<T>()];
    let partial: &mut [f64] = bytemuck::cast_slice_mut(partial);

    let source = x.unwrap_or(y);
    partial.par_chunks_mut(2 * channels).enumerate().for_each(|(i, partial)| {
        let (sample, first) = (i / chunks, i % chunks * chunk);
        let x = &source[(sample * pixels + first) * channels..][..chunk.min(pixels - first) * channels];
        arch.dispatch(ChannelSums { x, partial });
    });

    let (size, stats) = (channels / groups, partial.chunks_exact(chunks * 2 * channels));
    for (sample, (partial, affine)) in stats.zip(affine.chunks_exact_mut(2 * channels)).enumerate() {
        let (scale, shift) = affine.split_at_mut(channels);
        for group in 0..groups {
            let members = group * size..(group + 1) * size;
            let (sum, squares) = partial.chunks_exact(2 * channels).fold((0.0, 0.0), |(sum, squares), chunk| {
                let of = |values: &[f64]| values[members.clone()].iter().sum::<f64>();
                (sum + of(&chunk[..channels]), squares + of(&chunk[channels..]))
            });
            let count = (pixels * size) as f64;
            let mu = sum / count;
            let r = 1.0 / ((squares / count - mu * mu).max(0.0) + eps).sqrt();
            mean[sample * groups + group] = T::from_f64(mu);
            rstd[sample * groups + group] = T::from_f64(r);
            for c in members {
                let a = r * gamma[c].to_f64();
                (scale[c], shift[c]) = (T::from_f64(a), T::from_f64(beta[c].to_f64() - mu * a));
            }
        }
    }

    let affine = &*affine;
    y.par_chunks_mut(pixels * channels).enumerate().for_each(|(sample, y)| {
        let (scale, shift) = affine[sample * 2 * channels..][..2 * channels].split_at(channels);
        y.par_chunks_mut(chunk * channels).enumerate().for_each(|(i, y)| {
            let x = x.map(|x| &x[(sample * pixels + i * chunk) * channels..][..y.len()]);
            arch.dispatch(Apply { x, y, scale, shift, silu });
        });
    });
}

/// Per channel Σ x and Σ x² over the pixels of a chunk.
struct ChannelSums<'a, T> {
    x: &'a [T],
    partial: &'a mut [f64],
}

impl<T: Float> WithSimd for ChannelSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let channels = self.partial.len() / 2;
        let (sums, squares) = self.partial.split_at_mut(channels);
        sums.fill(0.0);
        squares.fill(0.0);
        // Four pixels at a time: a quarter of the traffic to the sums.
        let mut quads = self.x.chunks_exact(4 * channels);
        for quad in &mut quads {
            let (ab, cd) = quad.split_at(2 * channels);
            let ((a, b), (c, d)) = (ab.split_at(channels), cd.split_at(channels));
            for i in 0..channels {
                let [a, b, c, d] = [a[i].to_f64(), b[i].to_f64(), c[i].to_f64(), d[i].to_f64()];
                sums[i] += (a + b) + (c + d);
                squares[i] += (a * a + b * b) + (c * c + d * d);
            }
        }
        for pixel in quads.remainder().chunks_exact(channels) {
            for i in 0..channels {
                let x = pixel[i].to_f64();
                sums[i] += x;
                squares[i] += x * x;
            }
        }
    }
}

/// `y = x scale + shift` per channel, then SiLU, pixel by pixel.
struct Apply<'a, T> {
    x: Option<&'a [T]>,
    y: &'a mut [T],
    scale: &'a [T],
    shift: &'a [T],
    silu: bool,
}

impl<T: Float> WithSimd for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let channels = self.scale.len();
        for (i, y) in self.y.chunks_exact_mut(channels).enumerate() {
            if let Some(x) = self.x {
                y.copy_from_slice(&x[i * channels..][..channels]);
            }
            for ((y, &scale), &shift) in y.iter_mut().zip(self.scale).zip(self.shift) {
                *y = y.fma::<S>(scale, shift);
            }
            if self.silu {
                activate::<T, S>(y, Activation::Silu);
            }
        }
    }
}
