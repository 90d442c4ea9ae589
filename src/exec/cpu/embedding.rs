//! Row lookups and the sinusoidal embedding of timesteps.
//!
//! Contract: see `program::Embedding`. Tiny, so serial; indices come from memory and are checked before use: a bad one is an
//! error that names it, not a panic.

use super::real::Real;
use super::{Cx, Outputs};
use crate::program::Embedding;

/// The longest period of the sinusoids (Ho et al. 2020).
const PERIOD: f64 = 10_000.0;

/// Returns what is wrong with an index, if anything.
pub fn run<T: Real>(cx: &Cx<'_, T>, op: &Embedding, outputs: Outputs<'_, T>) -> Result<(), String> {
    let Outputs { values: [out, ..], .. } = outputs;
    match *op {
        Embedding::Tokens { ids, table, positions } => {
            let (length, rows, width) = (cx.shape(ids)[1], cx.shape(table)[0], cx.shape(table)[1]);
            let (table, positions) = (cx.value(table), cx.value(positions));
            for (i, (out, &id)) in out.chunks_exact_mut(width).zip(cx.ints(ids)).enumerate() {
                let row = index("token id", id, rows)?;
                let position = &positions[i % length * width..];
                for ((out, &token), &position) in out.iter_mut().zip(&table[row * width..]).zip(position) {
                    *out = token + position;
                }
            }
        }
        Embedding::Sinusoidal { x, dim, flip_sin_to_cos, freq_shift } => {
            let half = dim / 2;
            for (out, &x) in out.chunks_exact_mut(dim).zip(cx.value(x)) {
                let (first, second) = out.split_at_mut(half);
                for i in 0..half {
                    // Frequency and angle are rounded to the element type, as the reference's are.
                    let exponent = -PERIOD.ln() * i as f64 / (half as f64 - freq_shift);
                    let (sin, cos) = (x * T::from_f64(exponent.exp())).to_f64().sin_cos();
                    let (sin, cos) = (T::from_f64(sin), T::from_f64(cos));
                    (first[i], second[i]) = if flip_sin_to_cos { (cos, sin) } else { (sin, cos) };
                }
            }
        }
        Embedding::Pool { x, at } => {
            let (length, width) = (cx.shape(x)[1], cx.shape(x)[2]);
            let samples = cx.value(x).chunks_exact(length * width);
            for ((out, sample), &at) in out.chunks_exact_mut(width).zip(samples).zip(cx.ints(at)) {
                out.copy_from_slice(&sample[index("position", at, length)? * width..][..width]);
            }
        }
        Embedding::Select { x, at } => {
            let entry = index("entry", cx.ints(at)[0], cx.shape(x)[0])?;
            out.copy_from_slice(&cx.value(x)[entry * out.len()..][..out.len()]);
        }
    }
    Ok(())
}

fn index(what: &str, value: i32, count: usize) -> Result<usize, String> {
    usize::try_from(value).ok().filter(|&i| i < count).ok_or_else(|| format!("{what} {value} is not in 0..{count}"))
}
