//! Rows looked up, mixed, pooled and put in place, and the sinusoidal embedding of timesteps; with their gradients.
//!
//! Contract: see `program::Embedding`. Most are tiny, so serial; what a training step runs over a whole vocabulary or image is
//! cut into rows. Sums run over positions or samples in their order. Indices come from memory and are checked before use: a bad
//! one is an error that names it, not a panic.

use super::chunks::{add, fill};
use super::columns::sum_rows;
use super::context::{Cx, Outputs};
use super::real::Float;
use crate::program::{Embedding, ValueId};
use rayon::prelude::*;

/// The longest period of the sinusoids (Ho et al. 2020).
const PERIOD: f64 = 10_000.0;
/// Rows of a table's gradient in a task: each task looks through all ids.
const ROWS: usize = 256;

/// Returns what is wrong with an index, if anything.
pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Embedding, outputs: Outputs<'_, T>) -> Result<(), String> {
    use Embedding::*;
    let Outputs { values: [out, ..], .. } = outputs;
    match *op {
        Tokens { ids, table, extra, positions } => tokens(cx, out, ids, table, extra, positions)?,
        TokensBackward { ids, d_y, first, .. } => {
            let (d_y, width) = (cx.value(d_y), cx.shape(d_y)[2]);
            tokens_backward(out, cx.ints(ids), d_y, first, width);
        }
        PositionsBackward { d_y, .. } => {
            let (d_y, sample, width) = (cx.value(d_y), cx.shape(d_y)[1] * cx.shape(d_y)[2], cx.shape(d_y)[2]);
            let (summed, beyond) = out.split_at_mut(sample);
            summed.par_chunks_mut(width).enumerate().for_each(|(i, out)| sum_rows(out, &d_y[i * width..], sample));
            fill(beyond, T::ZERO);
        }
        Mix { weights, ids, table } => {
            let choices = cx.shape(ids)[1];
            let rows = cx.ints(ids).chunks_exact(choices).zip(cx.value(weights).chunks_exact(choices));
            for (out, (ids, weights)) in out.chunks_exact_mut(cx.shape(table)[1]).zip(rows) {
                out.fill(T::ZERO);
                for (&id, &weight) in ids.iter().zip(weights).filter(|(id, _)| **id >= 0) {
                    let row = row(cx, "token id", id, table)?;
                    out.iter_mut().zip(row).for_each(|(out, &x)| *out += weight * x);
                }
            }
        }
        MixBackward { ids, table, d_y } => {
            let choices = cx.shape(ids)[1];
            let rows = cx.value(d_y).chunks_exact(cx.shape(table)[1]);
            for ((out, ids), d_y) in out.chunks_exact_mut(choices).zip(cx.ints(ids).chunks_exact(choices)).zip(rows) {
                for (out, &id) in out.iter_mut().zip(ids) {
                    *out = if id < 0 { T::ZERO } else { dot(row(cx, "token id", id, table)?, d_y) };
                }
            }
        }
        Sinusoidal { x, dim, flip_sin_to_cos, freq_shift } => {
            for (out, &x) in out.chunks_exact_mut(dim).zip(cx.value(x)) {
                let (first, second) = out.split_at_mut(dim / 2);
                for (i, (first, second)) in first.iter_mut().zip(second).enumerate() {
                    let (sin, cos) = (x * frequency(i, dim, freq_shift)).to_f64().sin_cos();
                    let (sin, cos) = (T::from_f64(sin), T::from_f64(cos));
                    (*first, *second) = if flip_sin_to_cos { (cos, sin) } else { (sin, cos) };
                }
            }
        }
        SinusoidalBackward { x, d_y, dim, flip_sin_to_cos, freq_shift } => {
            let rows = cx.value(d_y).chunks_exact(dim);
            for ((out, &x), d_y) in out.iter_mut().zip(cx.value(x)).zip(rows) {
                let (first, second) = d_y.split_at(dim / 2);
                let (d_sin, d_cos) = if flip_sin_to_cos { (second, first) } else { (first, second) };
                let terms = d_sin.iter().zip(d_cos).enumerate().map(|(i, (d_sin, d_cos))| {
                    let frequency: T = frequency(i, dim, freq_shift);
                    let (sin, cos) = (x * frequency).to_f64().sin_cos();
                    frequency.to_f64() * (cos * d_sin.to_f64() - sin * d_cos.to_f64())
                });
                *out = T::from_f64(terms.sum());
            }
        }
        Pool { x, at } => {
            let (length, width) = (cx.shape(x)[1], cx.shape(x)[2]);
            let samples = cx.value(x).chunks_exact(length * width);
            for ((out, sample), &at) in out.chunks_exact_mut(width).zip(samples).zip(cx.ints(at)) {
                out.copy_from_slice(&sample[index("position", at, length)? * width..][..width]);
            }
        }
        PoolBackward { d_y, at, rows } => {
            let width = cx.shape(d_y)[1];
            let samples = out.chunks_exact_mut(rows * width);
            for ((out, d_y), &at) in samples.zip(cx.value(d_y).chunks_exact(width)).zip(cx.ints(at)) {
                put(out, index("position", at, rows)?, d_y);
            }
        }
        Select { x, at } => {
            let entry = index("entry", cx.ints(at)[0], cx.shape(x)[0])?;
            out.copy_from_slice(&cx.value(x)[entry * out.len()..][..out.len()]);
        }
        SelectBackward { d_y, at, ref shape } => {
            put(out, index("entry", cx.ints(at)[0], shape[0])?, cx.value(d_y));
        }
        Patches { x, class, positions } => {
            let (class, positions) = (cx.value(class), cx.value(positions));
            let patches = cx.value(x).par_chunks(positions.len() - class.len());
            out.par_chunks_mut(positions.len()).zip(patches).for_each(|(out, patches)| {
                out[..class.len()].copy_from_slice(class);
                out[class.len()..].copy_from_slice(patches);
                add(out, positions);
            });
        }
        PatchesBackward { d_y, .. } => {
            let (sample, width) = (cx.shape(d_y)[1] * cx.shape(d_y)[2], cx.shape(d_y)[2]);
            let samples = cx.value(d_y).par_chunks(sample);
            out.par_chunks_mut(sample - width).zip(samples).for_each(|(out, d_y)| out.copy_from_slice(&d_y[width..]));
        }
        Row { x, row } => {
            let (length, width) = (cx.shape(x)[1], cx.shape(x)[2]);
            let samples = cx.value(x).chunks_exact(length * width);
            out.chunks_exact_mut(width)
                .zip(samples)
                .for_each(|(out, sample)| out.copy_from_slice(&sample[row * width..][..width]));
        }
        RowBackward { d_y, row, rows } => {
            let width = cx.shape(d_y)[1];
            let samples = out.chunks_exact_mut(rows * width);
            samples.zip(cx.value(d_y).chunks_exact(width)).for_each(|(out, d_y)| put(out, row, d_y));
        }
    }
    Ok(())
}

fn tokens<T: Float>(
    cx: &Cx<'_, T>,
    out: &mut [T],
    ids: ValueId,
    table: ValueId,
    extra: Option<ValueId>,
    positions: ValueId,
) -> Result<(), String> {
    let (length, rows, width) = (cx.shape(ids)[1], cx.shape(table)[0], cx.shape(table)[1]);
    let (table, positions) = (cx.value(table), cx.value(positions));
    let extra = extra.map_or(&[][..], |id| cx.value(id));
    for (i, (out, &id)) in out.chunks_exact_mut(width).zip(cx.ints(ids)).enumerate() {
        let row = index("token id", id, rows + extra.len() / width)?;
        let token = if row < rows { &table[row * width..] } else { &extra[(row - rows) * width..] };
        out.copy_from_slice(&token[..width]);
        add(out, &positions[i % length * width..]);
    }
    Ok(())
}

/// Each task owns some rows and adds to them what their ids got, in the order of the positions.
fn tokens_backward<T: Float>(out: &mut [T], ids: &[i32], d_y: &[T], first: usize, width: usize) {
    out.par_chunks_mut(ROWS * width).enumerate().for_each(|(i, out)| {
        out.fill(T::ZERO);
        let first = first + i * ROWS;
        for (&id, d_y) in ids.iter().zip(d_y.chunks_exact(width)) {
            let row = usize::try_from(id).ok().and_then(|id| id.checked_sub(first));
            if let Some(row) = row.filter(|row| *row < out.len() / width) {
                add(&mut out[row * width..], d_y);
            }
        }
    });
}

/// Zeros with `values` at entry `at`.
fn put<T: Float>(out: &mut [T], at: usize, values: &[T]) {
    out.fill(T::ZERO);
    out[at * values.len()..][..values.len()].copy_from_slice(values);
}

fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    T::from_f64(a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum())
}

/// Frequency `i` of a sinusoidal embedding, and so the angle, rounded to the element type as the reference's are.
fn frequency<T: Float>(i: usize, dim: usize, shift: f64) -> T {
    T::from_f64((-PERIOD.ln() * i as f64 / ((dim / 2) as f64 - shift)).exp())
}

/// A row of a table.
fn row<'a, T: Float>(cx: &Cx<'a, T>, what: &str, id: i32, table: ValueId) -> Result<&'a [T], String> {
    let [rows, width] = *cx.shape(table) else { unreachable!("tables are matrices") };
    Ok(&cx.value(table)[index(what, id, rows)? * width..][..width])
}

/// An index as a number below `count`, or what is wrong with it.
pub fn index(what: &str, value: i32, count: usize) -> Result<usize, String> {
    usize::try_from(value).ok().filter(|&i| i < count).ok_or_else(|| format!("{what} {value} is not in 0..{count}"))
}
