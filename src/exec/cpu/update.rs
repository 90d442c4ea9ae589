//! Updates of state with scalars from memory: linear combinations (guidance, sampler steps), optimisers, noise.
//!
//! Contract: `Combine` adds in the order of the terms, each from its own first row; a term with coefficient 0 is not read, so it may hold anything; `out` may
//! be the first term. Optimisers compute each element in f64 and round what they write once; formulas at `program::Update`.
//! Elementwise, cut into chunks.

use super::chunks::{CHUNK, fill, transform};
use super::context::{Cx, Outputs};
use super::real::Float;
use crate::exec::philox;
use crate::program::{Rows, Update, ValueId};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Update, outputs: Outputs<'_, T>) {
    match *op {
        Update::Combine { ref terms, coefficients } => combine(cx, terms, cx.value(coefficients), outputs),
        Update::Scale { x, coefficients, index } => {
            let Outputs { values: [out, ..], in_place, .. } = outputs;
            let coefficient = cx.value(coefficients)[index];
            if coefficient == T::ZERO {
                return fill(out, T::ZERO);
            }
            let source = if in_place { None } else { Some(cx.value(x)) };
            transform(out, source, |_, out| out.iter_mut().for_each(|x| *x *= coefficient));
        }
        Update::AdamW { p, g, m, v, scalars: s } => {
            let [lr, gain1, gain2, eps, decay, correction1, correction2] = scalars(cx, s);
            step(cx, [p, g, m, v], outputs, |[p, g, m, v]| {
                let m = m + gain1 * (g - m);
                let v = v + gain2 * (g * g - v);
                let direction = m / correction1 / ((v / correction2).sqrt() + eps);
                [p * (1.0 - lr * decay) - lr * direction, m, v]
            });
        }
        Update::RmsProp { p, g, v, b, scalars: s } => {
            let [lr, alpha, momentum, eps, bound, low, high] = scalars(cx, s);
            step(cx, [p, g, v, b], outputs, |[p, g, v, b]| {
                let g = g.clip(-bound, bound);
                let v = alpha * v + (1.0 - alpha) * g * g;
                let b = momentum * b + g / (v.sqrt() + eps);
                [(p - lr * b).clip(low, high), v, b]
            });
        }
        Update::Nesterov { p, g, b, scalars: s } => {
            let [lr, momentum] = scalars(cx, s);
            let Outputs { values: [to_p, to_b, _], .. } = outputs;
            let (p, g, b) = (cx.value(p), cx.value(g), cx.value(b));
            to_p.par_chunks_mut(CHUNK).zip(to_b.par_chunks_mut(CHUNK)).enumerate().for_each(|(i, (to_p, to_b))| {
                let held = p[i * CHUNK..].iter().zip(&g[i * CHUNK..]).zip(&b[i * CHUNK..]);
                for ((to_p, to_b), ((p, g), b)) in to_p.iter_mut().zip(to_b).zip(held) {
                    let g = g.to_f64();
                    let b = momentum * b.to_f64() + g;
                    (*to_p, *to_b) = (T::from_f64(p.to_f64() - lr * (g + momentum * b)), T::from_f64(b));
                }
            });
        }
        Update::Noise { counter, ref shape } => {
            let Outputs { values: [out, ..], .. } = outputs;
            noise(out, cx.ints(counter), shape);
        }
    }
}

/// Each sample's draw, from channels first to channels last.
fn noise<T: Float>(out: &mut [T], counter: &[i32], shape: &[usize]) {
    let (sample, channels) = (out.len() / shape[0], shape[shape.len() - 1]);
    out.par_chunks_mut(sample).zip(counter.par_chunks_exact(4)).for_each(|(out, words)| {
        let [seed_low, seed_high, draw_low, draw_high] = std::array::from_fn(|i| words[i] as u32);
        let (key, draw, positions) = ([seed_low, seed_high], [draw_low, draw_high], sample / channels);
        for first in (0..sample).step_by(4) {
            let normals = philox::normals(key, draw, first as u64 / 4);
            for (n, x) in (first..sample).zip(normals) {
                out[n % positions * channels + n / positions] = T::from_f64(x.into());
            }
        }
    });
}

fn scalars<T: Float, const N: usize>(cx: &Cx<'_, T>, id: ValueId) -> [f64; N] {
    std::array::from_fn(|i| cx.value(id)[i].to_f64())
}

/// Element by element from parameter, gradient and two states to parameter and states.
fn step<T: Float>(
    cx: &Cx<'_, T>,
    inputs: [ValueId; 4],
    outputs: Outputs<'_, T>,
    f: impl Fn([f64; 4]) -> [f64; 3] + Sync,
) {
    let inputs = inputs.map(|id| cx.value(id));
    let chunks = outputs.values.map(|out| out.par_chunks_mut(CHUNK));
    let [p, first, second] = chunks;
    p.zip(first).zip(second).enumerate().for_each(|(i, ((p, first), second))| {
        let [was, g, a, b] = inputs.map(|values| &values[i * CHUNK..][..p.len()]);
        for (i, ((p, first), second)) in p.iter_mut().zip(first).zip(second).enumerate() {
            let next = f([was[i].to_f64(), g[i].to_f64(), a[i].to_f64(), b[i].to_f64()]);
            [*p, *first, *second] = next.map(T::from_f64);
        }
    });
}

fn combine<T: Float>(cx: &Cx<'_, T>, terms: &[Rows], coefficients: &[T], outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], in_place, .. } = outputs;
    let row = out.len() / cx.shape(terms[0].value)[0];
    transform(out, None, |at, out| {
        if coefficients[0] == T::ZERO {
            out.fill(T::ZERO);
        } else {
            if !in_place {
                out.copy_from_slice(&cx.value(terms[0].value)[at..][..out.len()]);
            }
            out.iter_mut().for_each(|out| *out *= coefficients[0]);
        }
        for (&term, &coefficient) in terms.iter().zip(coefficients).skip(1) {
            if coefficient != T::ZERO {
                cx.machine.arch.dispatch(AddTerm {
                    out,
                    term: &cx.value(term.value)[term.at * row + at..],
                    coefficient,
                });
            }
        }
    });
}

struct AddTerm<'a, T> {
    out: &'a mut [T],
    term: &'a [T],
    coefficient: T,
}

impl<T: Float> WithSimd for AddTerm<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, &term) in self.out.iter_mut().zip(self.term) {
            *out = term.fma::<S>(self.coefficient, *out);
        }
    }
}
