//! Rows to rows: softmax, unit vectors, cross-entropy, and their gradients.
//!
//! Contract: see `program::Rowwise`; rows are the last dimension. Sums are taken in f64, in fixed lanes; the log-sum-exp in one pass
//! with a running maximum, so a vocabulary is read once. A row is one task: bits depend on neither batch nor threads. Targets
//! come from memory and are checked before use: one beyond the vocabulary is an error that names it. Softmax, unit and all
//! gradients may overwrite their first operand.

use super::context::{Cx, Outputs};
use super::embedding::index;
use super::real::Float;
use super::reduce::{dot, largest, sum};
use crate::program::{Rowwise, ValueId};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Elements between two updates of the running maximum: a stretch that stays in the first-level cache.
const STRETCH: usize = 1024;

/// Returns what is wrong with an index, if anything.
pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Rowwise, outputs: Outputs<'_, T>) -> Result<(), String> {
    match *op {
        Rowwise::Softmax { x } => softmax(cx, x, outputs),
        Rowwise::SoftmaxBackward { y, d_y } => softmax_backward(cx, y, d_y, outputs),
        Rowwise::Unit { x, eps } => unit(cx, x, eps, outputs),
        Rowwise::UnitBackward { y, norm, d_y, eps } => unit_backward(cx, [y, norm, d_y], eps, outputs),
        Rowwise::CrossEntropy { logits, targets } => return cross_entropy(cx, logits, targets, outputs),
        Rowwise::CrossEntropyBackward { logits, targets, lse, d_loss } => {
            return cross_entropy_backward(cx, [logits, targets, lse, d_loss], outputs);
        }
    }
    Ok(())
}

/// The rows of `out`, each holding what it may overwrite, in parallel.
fn rows<'a, T: Float>(
    cx: &Cx<'_, T>,
    overwritten: ValueId,
    out: &'a mut [T],
    in_place: bool,
) -> impl IndexedParallelIterator<Item = &'a mut [T]> {
    let shape = cx.shape(overwritten);
    let width = shape[shape.len() - 1];
    let source = if in_place { None } else { Some(cx.value(overwritten)) };
    out.par_chunks_mut(width).enumerate().map(move |(i, out)| {
        if let Some(source) = source {
            out.copy_from_slice(&source[i * width..][..width]);
        }
        out
    })
}

fn softmax<T: Float>(cx: &Cx<'_, T>, x: ValueId, outputs: Outputs<'_, T>) {
    let Outputs { values: [y, ..], in_place, .. } = outputs;
    rows(cx, x, y, in_place).for_each(|row| cx.machine.arch.dispatch(Softmax { row }));
}

struct Softmax<'a, T> {
    row: &'a mut [T],
}

impl<T: Float> WithSimd for Softmax<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (top, total) = LogSumExp { row: self.row }.with_simd(simd);
        let scale = T::from_f64(1.0 / total);
        self.row.iter_mut().for_each(|x| *x = (*x - top).exp::<S>() * scale);
    }
}

/// The largest value `m` of a row and Σ e^(x - m).
struct LogSumExp<'a, T> {
    row: &'a [T],
}

impl<T: Float> WithSimd for LogSumExp<'_, T> {
    type Output = (T, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (T, f64) {
        let (mut top, mut total) = (T::LOWEST, 0.0);
        for stretch in self.row.chunks(STRETCH) {
            let highest = largest(stretch).greater(top);
            total *= (top.to_f64() - highest.to_f64()).exp();
            total += sum(stretch, |x| (x - highest).exp::<S>().to_f64());
            top = highest;
        }
        (top, total)
    }
}

fn softmax_backward<T: Float>(cx: &Cx<'_, T>, y: ValueId, d_y: ValueId, outputs: Outputs<'_, T>) {
    let Outputs { values: [d_x, ..], in_place, .. } = outputs;
    rows(cx, d_y, d_x, in_place).enumerate().for_each(|(i, d)| {
        let y = &cx.value(y)[i * d.len()..][..d.len()];
        let mean = T::from_f64(dot(y, d));
        d.iter_mut().zip(y).for_each(|(d, &y)| *d = y * (*d - mean));
    });
}

fn unit<T: Float>(cx: &Cx<'_, T>, x: ValueId, eps: f64, outputs: Outputs<'_, T>) {
    let Outputs { values: [y, norm, _], in_place, .. } = outputs;
    rows(cx, x, y, in_place).zip(norm).for_each(|(row, norm)| {
        let length = dot(row, row).sqrt();
        *norm = T::from_f64(length);
        let length = T::from_f64(length.max(eps));
        row.iter_mut().for_each(|x| *x = *x / length);
    });
}

/// `(d_y - y Σ y d_y) / ‖x‖`.
fn unit_backward<T: Float>(cx: &Cx<'_, T>, [y, norm, d_y]: [ValueId; 3], eps: f64, outputs: Outputs<'_, T>) {
    let Outputs { values: [d_x, ..], in_place, .. } = outputs;
    rows(cx, d_y, d_x, in_place).zip(cx.value(norm)).enumerate().for_each(|(i, (d, norm))| {
        let y = &cx.value(y)[i * d.len()..][..d.len()];
        let norm = norm.to_f64();
        let (along, scale) = if norm < eps { (0.0, 1.0 / eps) } else { (dot(y, d), 1.0 / norm) };
        let (along, scale) = (T::from_f64(along), T::from_f64(scale));
        d.iter_mut().zip(y).for_each(|(d, &y)| *d = (*d - y * along) * scale);
    });
}

/// The target of each row, if it has one.
fn targets<'a, T: Float>(cx: &Cx<'a, T>, logits: ValueId, targets: ValueId) -> Result<Targets<'a>, String> {
    let shape = cx.shape(logits);
    let targets = cx.ints(targets);
    for &target in targets.iter().filter(|target| **target >= 0) {
        index("target", target, shape[shape.len() - 1])?;
    }
    Ok(Targets(targets))
}

struct Targets<'a>(&'a [i32]);

impl Targets<'_> {
    fn of(&self, row: usize) -> Option<usize> {
        usize::try_from(self.0[row]).ok()
    }
}

fn cross_entropy<T: Float>(
    cx: &Cx<'_, T>,
    logits: ValueId,
    ids: ValueId,
    outputs: Outputs<'_, T>,
) -> Result<(), String> {
    let Outputs { values: [loss, lse, _], .. } = outputs;
    let targets = targets(cx, logits, ids)?;
    let shape = cx.shape(logits);
    let rows = cx.value(logits).par_chunks(shape[shape.len() - 1]);
    rows.zip(loss.par_iter_mut().zip(lse)).enumerate().for_each(|(i, (row, (loss, lse)))| {
        let (top, total) = cx.machine.arch.dispatch(LogSumExp { row });
        let log = top.to_f64() + total.ln();
        *lse = T::from_f64(log);
        *loss = targets.of(i).map_or(T::ZERO, |target| T::from_f64(log - row[target].to_f64()));
    });
    Ok(())
}

fn cross_entropy_backward<T: Float>(
    cx: &Cx<'_, T>,
    [logits, ids, lse, d_loss]: [ValueId; 4],
    outputs: Outputs<'_, T>,
) -> Result<(), String> {
    let Outputs { values: [d_logits, ..], in_place, .. } = outputs;
    let targets = targets(cx, logits, ids)?;
    let (lse, d_loss) = (cx.value(lse), cx.value(d_loss));
    rows(cx, logits, d_logits, in_place).enumerate().for_each(|(i, row)| match targets.of(i) {
        Some(target) => {
            cx.machine.arch.dispatch(Probabilities { row, lse: lse[i], times: d_loss[i] });
            row[target] = row[target] - d_loss[i];
        }
        None => row.fill(T::ZERO),
    });
    Ok(())
}

/// Replaces logits by `times e^(x - lse)`.
struct Probabilities<'a, T> {
    row: &'a mut [T],
    lse: T,
    times: T,
}

impl<T: Float> WithSimd for Probabilities<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.row.iter_mut().for_each(|x| *x = (*x - self.lse).exp::<S>() * self.times);
    }
}
