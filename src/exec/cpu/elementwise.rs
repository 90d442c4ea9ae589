//! Elementwise ops: activations, sums, concatenation and copies along the batch.
//!
//! Contract: every output element is a function of the input elements at its place, so no cut of the work can change bits.
//! Work is cut into chunks of [`CHUNK`] elements or of whole rows. An op that may overwrite its input copies each chunk first
//! when it does not (the copy is still in the first-level cache) and then works in place: one loop serves both.

use super::real::Real;
use super::{Cx, Outputs};
use crate::program::{Activation, Elementwise};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Elements of a task: small enough for the first-level cache, large enough to outweigh handing it to a thread.
pub const CHUNK: usize = 4096;

/// Applies an activation in place. GEGLU is not elementwise; gemm takes it apart.
#[inline(always)]
pub fn activate<T: Real, S: Simd>(values: &mut [T], activation: Activation) {
    match activation {
        Activation::None => {}
        Activation::Silu => values.iter_mut().for_each(|x| *x = x.silu::<S>()),
        Activation::Gelu => values.iter_mut().for_each(|x| *x = x.gelu::<S>()),
        Activation::QuickGelu => values.iter_mut().for_each(|x| *x = x.quick_gelu::<S>()),
        Activation::Geglu => unreachable!("GEGLU is an epilogue of gemm"),
    }
}

struct Activate<'a, T> {
    values: &'a mut [T],
    activation: Activation,
}

impl<T: Real> WithSimd for Activate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        activate::<T, S>(self.values, self.activation);
    }
}

struct Affine<'a, T> {
    values: &'a mut [T],
    scale: T,
    shift: T,
}

impl<T: Real> WithSimd for Affine<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.values.iter_mut().for_each(|x| *x = x.fma::<S>(self.scale, self.shift));
    }
}

/// Copies `source` (unless the op runs in place) and transforms, chunk by chunk in parallel.
pub fn transform<T: Real>(out: &mut [T], source: Option<&[T]>, f: impl Fn(usize, &mut [T]) + Sync) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        if let Some(source) = source {
            out.copy_from_slice(&source[i * CHUNK..][..out.len()]);
        }
        f(i * CHUNK, out);
    });
}

/// Copies in parallel.
pub fn copy<T: Real>(out: &mut [T], source: &[T]) {
    transform(out, Some(source), |_, _| {});
}

pub fn run<T: Real>(cx: &Cx<'_, T>, op: &Elementwise, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], in_place, .. } = outputs;
    let source = |id| if in_place { None } else { Some(cx.value(id)) };
    match *op {
        Elementwise::Activate { x, activation } => {
            transform(out, source(x), |_, values| cx.machine.arch.dispatch(Activate { values, activation }));
        }
        Elementwise::Affine { x, scale, shift } => {
            let (scale, shift) = (T::from_f64(scale), T::from_f64(shift));
            transform(out, source(x), |_, values| cx.machine.arch.dispatch(Affine { values, scale, shift }));
        }
        Elementwise::Add { a, b } => {
            let b = cx.value(b);
            transform(out, source(a), |at, out| {
                out.iter_mut().zip(&b[at..]).for_each(|(out, &b)| *out += b);
            });
        }
        Elementwise::OuterAdd { a, b } => {
            let (width, a, b) = (cx.shape(a)[1], cx.value(a), cx.value(b));
            out.par_chunks_mut(b.len()).zip(a.par_chunks(width)).for_each(|(out, a)| {
                for (out, b) in out.chunks_exact_mut(width).zip(b.chunks_exact(width)) {
                    out.iter_mut().zip(a).zip(b).for_each(|((out, &a), &b)| *out = a + b);
                }
            });
        }
        Elementwise::Concat { a, b } => {
            let width = |id| cx.shape(id)[cx.shape(id).len() - 1];
            let (wa, wb) = (width(a), width(b));
            let (a, b) = (cx.value(a), cx.value(b));
            let rows = (CHUNK / (wa + wb)).max(1);
            out.par_chunks_mut(rows * (wa + wb)).enumerate().for_each(|(i, out)| {
                let a = a[i * rows * wa..].chunks_exact(wa);
                let b = b[i * rows * wb..].chunks_exact(wb);
                for ((out, a), b) in out.chunks_exact_mut(wa + wb).zip(a).zip(b) {
                    let (left, right) = out.split_at_mut(wa);
                    left.copy_from_slice(a);
                    right.copy_from_slice(b);
                }
            });
        }
        Elementwise::Repeat { x, .. } => {
            let x = cx.value(x);
            out.chunks_exact_mut(x.len()).for_each(|out| copy(out, x));
        }
        Elementwise::Slice { x, start, .. } => {
            let row: usize = cx.shape(x)[1..].iter().product();
            copy(out, &cx.value(x)[start * row..][..out.len()]);
        }
    }
}
