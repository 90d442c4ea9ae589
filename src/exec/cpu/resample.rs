//! Nearest-neighbour doubling of images.
//!
//! Contract: `x [B, H, W, C]` → `[B, height, width, C]`, each side doubled or one short of it; a task is one input row, which
//! makes two output rows (the last may make one). Copies only.

use super::real::Real;
use super::{Cx, Outputs};
use crate::program::Resample;
use rayon::prelude::*;

pub fn run<T: Real>(cx: &Cx<'_, T>, op: &Resample, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], .. } = outputs;
    let Resample::Nearest2x { x, height, width } = *op;
    let [_, h, w, channels] = *cx.shape(x) else { unreachable!("images have four dims") };
    let images = cx.value(x).par_chunks(h * w * channels);
    out.par_chunks_mut(height * width * channels).zip(images).for_each(|(out, image)| {
        let rows = image.par_chunks(w * channels);
        out.par_chunks_mut(2 * width * channels).zip(rows).for_each(|(out, row)| {
            let (first, second) = out.split_at_mut(width * channels);
            for (pair, pixel) in first.chunks_mut(2 * channels).zip(row.chunks_exact(channels)) {
                pair.chunks_exact_mut(channels).for_each(|out| out.copy_from_slice(pixel));
            }
            second.copy_from_slice(&first[..second.len()]);
        });
    });
}
