//! Elementwise ops: activations, GEGLU, sums, products and the functions of losses, with their gradients.
//!
//! Contract: every output element is a function of the input elements at its place (GEGLU: of two columns of its row), so no cut
//! of the work can change bits. Work is cut into chunks of [`super::chunks::CHUNK`] elements or of whole rows. An op that may overwrite its
//! input copies each chunk first when it does not (the copy is still in the first-level cache) and then works in place: one
//! loop serves both. What moves or adds up whole rows and columns is in `columns`.

use super::chunks::{add, copy, fill, last, transform, transform_rows};
use super::columns;
use super::context::{Cx, Outputs};
use super::real::Float;
use crate::program::{Activation, Elementwise, Scalar};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// The cosine of an angle close to π beyond which [`Scalar::Spherical`] keeps its slope, so that it stays finite.
const OPPOSITE: f64 = 1e-7 - 1.0;

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Elementwise, outputs: Outputs<'_, T>) {
    use Elementwise::*;
    let Outputs { values: [out, second, _], in_place, .. } = outputs;
    let arch = cx.machine.arch;
    let source = |id| if in_place { None } else { Some(cx.value(id)) };
    let number = T::from_f64;
    // Elements of a sample and of one of its tokens.
    let sample = |id| cx.value(id).len() / cx.shape(id)[0];
    let token = |id| sample(id) / cx.shape(id)[1];
    match *op {
        Activate { x, activation } => {
            transform(out, source(x), |_, values| arch.dispatch(ActivateChunk { values, activation }));
        }
        ActivateBackward { x, d_y, activation } => {
            let x = cx.value(x);
            transform(out, source(d_y), |at, d| arch.dispatch(ActivateBackwardChunk { d, x: &x[at..], activation }));
        }
        Geglu { x } => {
            let (x, width) = (cx.value(x), last(cx.shape(x)) / 2);
            transform_rows(out, width, None, |at, out| arch.dispatch(GegluChunk { out, x: &x[2 * at..], width }));
        }
        GegluBackward { x, d_y } => {
            let (d_y, width) = (cx.value(d_y), last(cx.shape(d_y)));
            transform_rows(out, 2 * width, source(x), |at, x| {
                arch.dispatch(GegluBackwardChunk { x, d_y: &d_y[at / 2..], width });
            });
        }
        Map { x, f } => transform(out, source(x), |_, out| {
            out.iter_mut().for_each(|x| *x = number(map(f, x.to_f64())));
        }),
        MapBackward { x, d_y, f } => {
            let x = cx.value(x);
            transform(out, source(d_y), |at, out| {
                let slope = |x: T| slope(f, x.to_f64());
                out.iter_mut().zip(&x[at..]).for_each(|(d, &x)| *d = number(d.to_f64() * slope(x)));
            });
        }
        Add { a, b } => {
            let b = cx.value(b);
            transform(out, source(a), |at, out| add(out, &b[at..]));
        }
        Mul { a, b } => {
            let b = cx.value(b);
            transform(out, source(a), |at, out| out.iter_mut().zip(&b[at..]).for_each(|(out, &b)| *out *= b));
        }
        Scale { x, by } => {
            let (size, source) = (out.len() / cx.shape(x)[0], source(x));
            out.par_chunks_mut(size).zip(cx.value(by)).enumerate().for_each(|(sample, (out, &by))| {
                let source = source.map(|x| &x[sample * size..][..size]);
                transform(out, source, |_, out| out.iter_mut().for_each(|x| *x *= by));
            });
        }
        Affine { x, scale, shift } => {
            let (scale, shift) = (number(scale), number(shift));
            transform(out, source(x), |_, values| arch.dispatch(AffineChunk { values, scale, shift }));
        }
        ChannelAffine { x, ref scale, ref shift } => {
            transform_rows(out, scale.len(), source(x), |_, values| {
                arch.dispatch(ChannelAffineChunk { values, scale, shift });
            });
        }
        Clamp { x, low, high } => {
            let (low, high) = (number(low), number(high));
            transform(out, source(x), |_, out| out.iter_mut().for_each(|x| *x = x.clip(low, high)));
        }
        ClampBackward { x, d_y, low, high } => {
            let (x, low, high) = (cx.value(x), number(low), number(high));
            let passes = |x: T| low <= x && x <= high;
            transform(out, source(d_y), |at, out| {
                out.iter_mut().zip(&x[at..]).for_each(|(d, &x)| *d = if passes(x) { *d } else { T::ZERO });
            });
        }
        Detach { x } | Cast { x, .. } => transform(out, source(x), |_, _| {}),
        Constant { value, .. } => fill(out, number(value)),
        Spread { x, ref shape } => columns::spread(out, cx.value(x), shape),
        OuterAdd { a, b } => columns::outer_add(out, cx.value(a), cx.value(b), cx.shape(a)[1]),
        OuterAddBackward { d_y } => columns::outer_add_backward(out, second, cx.value(d_y), cx.shape(d_y)),
        Concat { a, b } => {
            let parts = [a, b].map(|id| (cx.value(id), last(cx.shape(id))));
            columns::concat(out, parts);
        }
        ConcatTokens { a, b } => columns::concat(out, [a, b].map(|id| (cx.value(id), sample(id)))),
        Columns { x, len } => columns::columns(out, len, cx.value(x.value), last(cx.shape(x.value)), x.at),
        Scatter { ref parts, width } => {
            let parts = parts.iter().map(|part| (cx.value(part.value), last(cx.shape(part.value)), part.at));
            columns::scatter(out, width, parts);
        }
        Repeat { x, .. } => {
            let x = cx.value(x);
            out.chunks_exact_mut(x.len()).for_each(|out| copy(out, x));
        }
        SumRepeats { x, .. } => {
            let (first, others) = cx.value(x).split_at(out.len());
            let size = first.len();
            transform(out, Some(first), |at, out| others.chunks_exact(size).for_each(|x| add(out, &x[at..])));
        }
        Slice { x, start, .. } => {
            let row = cx.value(x).len() / cx.shape(x)[0];
            copy(out, &cx.value(x)[start * row..][..out.len()]);
        }
        Unslice { x, start, .. } => {
            let (x, row) = (cx.value(x), cx.value(x).len() / cx.shape(x)[0]);
            let (before, rest) = out.split_at_mut(start * row);
            let (own, after) = rest.split_at_mut(x.len());
            fill(before, T::ZERO);
            copy(own, x);
            fill(after, T::ZERO);
        }
        TokenRows { x, start, len } => {
            columns::columns(out, len * token(x), cx.value(x), sample(x), start * token(x));
        }
        PadTokens { x, start, tokens } => {
            let part = (cx.value(x), sample(x), start * token(x));
            columns::scatter(out, tokens * token(x), [part].into_iter());
        }
    }
}

/// Losses are small: their functions are taken in f64 and rounded once.
fn map(f: Scalar, x: f64) -> f64 {
    match f {
        Scalar::Sqrt => x.sqrt(),
        Scalar::Square => x * x,
        Scalar::Ln => x.ln(),
        Scalar::Exp => x.exp(),
        Scalar::Reciprocal => 1.0 / x,
        // Rounding takes cosines a little beyond one.
        Scalar::Spherical => 0.5 * x.clip(-1.0, 1.0).acos().powi(2),
    }
}

fn slope(f: Scalar, x: f64) -> f64 {
    match f {
        Scalar::Sqrt if x == 0.0 => 0.0,
        Scalar::Sqrt => 0.5 / x.sqrt(),
        Scalar::Square => 2.0 * x,
        Scalar::Ln => 1.0 / x,
        Scalar::Exp => x.exp(),
        Scalar::Reciprocal => -1.0 / (x * x),
        Scalar::Spherical if x >= 1.0 => -1.0,
        Scalar::Spherical => {
            let x = x.clip(OPPOSITE, 1.0);
            -x.acos() / ((1.0 - x) * (1.0 + x)).sqrt()
        }
    }
}

/// Applies an activation in place. GEGLU is not elementwise; gemm takes it apart.
#[inline(always)]
pub fn activate<T: Float, S: Simd>(values: &mut [T], activation: Activation) {
    match activation {
        Activation::None => {}
        Activation::Silu => values.iter_mut().for_each(|x| *x = x.silu::<S>()),
        Activation::Gelu => values.iter_mut().for_each(|x| *x = x.gelu::<S>()),
        Activation::GeluTanh => values.iter_mut().for_each(|x| *x = x.gelu_tanh::<S>()),
        Activation::QuickGelu => values.iter_mut().for_each(|x| *x = x.quick_gelu::<S>()),
        Activation::Geglu => unreachable!("GEGLU is an epilogue of gemm"),
    }
}

/// Multiplies `d` with the slopes of an activation at `x`.
#[inline(always)]
pub fn activate_backward<T: Float, S: Simd>(d: &mut [T], x: &[T], activation: Activation) {
    let pairs = d.iter_mut().zip(x);
    match activation {
        Activation::None => {}
        Activation::Silu => pairs.for_each(|(d, x)| *d *= x.silu_slope::<S>()),
        Activation::Gelu => pairs.for_each(|(d, x)| *d *= x.gelu_slope::<S>()),
        Activation::GeluTanh => pairs.for_each(|(d, x)| *d *= x.gelu_tanh_slope::<S>()),
        Activation::QuickGelu => pairs.for_each(|(d, x)| *d *= x.quick_gelu_slope::<S>()),
        Activation::Geglu => unreachable!("GEGLU has a backward of its own"),
    }
}

struct ActivateChunk<'a, T> {
    values: &'a mut [T],
    activation: Activation,
}

impl<T: Float> WithSimd for ActivateChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        activate::<T, S>(self.values, self.activation);
    }
}

struct ActivateBackwardChunk<'a, T> {
    d: &'a mut [T],
    x: &'a [T],
    activation: Activation,
}

impl<T: Float> WithSimd for ActivateBackwardChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        activate_backward::<T, S>(self.d, self.x, self.activation);
    }
}

/// Rows of `a * gelu(g)`, the same numbers as gemm's epilogue.
struct GegluChunk<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    width: usize,
}

impl<T: Float> WithSimd for GegluChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, x) in self.out.chunks_exact_mut(self.width).zip(self.x.chunks_exact(2 * self.width)) {
            let (a, g) = x.split_at(self.width);
            for ((out, &a), g) in out.iter_mut().zip(a).zip(g) {
                *out = a * g.gelu::<S>();
            }
        }
    }
}

/// Turns rows of `x` into their gradient.
struct GegluBackwardChunk<'a, T> {
    x: &'a mut [T],
    d_y: &'a [T],
    width: usize,
}

impl<T: Float> WithSimd for GegluBackwardChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (x, d_y) in self.x.chunks_exact_mut(2 * self.width).zip(self.d_y.chunks_exact(self.width)) {
            let (a, g) = x.split_at_mut(self.width);
            for ((a, g), &d) in a.iter_mut().zip(g).zip(d_y) {
                let (gelu, slope) = g.gelu_and_slope::<S>();
                (*a, *g) = (d * gelu, d * *a * slope);
            }
        }
    }
}

struct AffineChunk<'a, T> {
    values: &'a mut [T],
    scale: T,
    shift: T,
}

impl<T: Float> WithSimd for AffineChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.values.iter_mut().for_each(|x| *x = x.fma::<S>(self.scale, self.shift));
    }
}

struct ChannelAffineChunk<'a, T> {
    values: &'a mut [T],
    scale: &'a [f64],
    shift: &'a [f64],
}

impl<T: Float> WithSimd for ChannelAffineChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.values.chunks_exact_mut(self.scale.len()) {
            for ((x, &scale), &shift) in row.iter_mut().zip(self.scale).zip(self.shift) {
                *x = x.fma::<S>(T::from_f64(scale), T::from_f64(shift));
            }
        }
    }
}
