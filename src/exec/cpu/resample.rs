//! Doubling, cropping and resizing of images, and the transposed maps.
//!
//! Contract: images `[B, H, W, C]`; formulas at `program::Resample`. A task is an output row, or the two rows an input row makes;
//! every output element is a sum in a fixed order, also in the gradients, which gather what each input pixel became. Resizing is
//! separable, by tables of weights in the workspace (see `resize`).

use super::chunks::add;
use super::context::{Cx, Outputs};
use super::real::Float;
use super::resize::{Resize, resize};
use crate::program::{Program, Resample, ValueId};
use rayon::prelude::*;

/// The resizing an op does, if it does.
fn resizing(op: &Resample, program: &Program) -> Option<Resize> {
    let shape = |id: ValueId| program.shape(id);
    match *op {
        Resample::Resize { x, height, width, how } => Some(Resize::forward(shape(x), [height, width], how)),
        Resample::ResizeBackward { d_y, height, width, how } => {
            Some(Resize::backward(shape(d_y), [height, width], how))
        }
        Resample::Nearest2x { .. } | Resample::Nearest2xBackward { .. } => None,
        Resample::Crop { .. } | Resample::CropBackward { .. } => None,
    }
}

/// Elements of workspace: the tables of weights.
pub fn workspace<T: Float>(op: &Resample, program: &Program) -> usize {
    resizing(op, program).map_or(0, |resize| resize.workspace::<T>())
}

/// Elements of thread scratch: one row between the two passes.
pub fn scratch(op: &Resample, program: &Program) -> usize {
    resizing(op, program).map_or(0, |resize| resize.scratch())
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Resample, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, .. } = outputs;
    if let Some(how) = resizing(op, cx.program) {
        let (Resample::Resize { x, .. } | Resample::ResizeBackward { d_y: x, .. }) = *op else { unreachable!() };
        return resize(cx, how, cx.value(x), out, workspace);
    }
    match *op {
        Resample::Nearest2x { x, height, width } => double(out, [height, width], cx.value(x), cx.shape(x)),
        Resample::Nearest2xBackward { d_y, height, width } => halve(out, [height, width], cx.value(d_y), cx.shape(d_y)),
        Resample::Crop { x, top, left, height, width } => {
            let [_, h, w, channels] = *cx.shape(x) else { unreachable!("images have four dims") };
            let (x, row) = (cx.value(x), width * channels);
            out.par_chunks_mut(row).enumerate().for_each(|(i, out)| {
                let from = (i / height * h + top + i % height) * w + left;
                out.copy_from_slice(&x[from * channels..][..row]);
            });
        }
        Resample::CropBackward { d_y, top, left, height, width } => {
            let [_, h, w, channels] = *cx.shape(d_y) else { unreachable!("images have four dims") };
            let (d_y, row) = (cx.value(d_y), w * channels);
            out.par_chunks_mut(width * channels).enumerate().for_each(|(i, out)| {
                out.fill(T::ZERO);
                let (image, y) = (i / height, i % height);
                if (top..top + h).contains(&y) {
                    let from = (image * h + y - top) * row;
                    out[left * channels..][..row].copy_from_slice(&d_y[from..][..row]);
                }
            });
        }
        Resample::Resize { .. } | Resample::ResizeBackward { .. } => unreachable!("done above"),
    }
}

/// Each pixel twice in both directions, as far as `height` and `width` go.
fn double<T: Float>(out: &mut [T], [height, width]: [usize; 2], x: &[T], shape: &[usize]) {
    let [_, h, w, channels] = *shape else { unreachable!("images have four dims") };
    out.par_chunks_mut(height * width * channels).zip(x.par_chunks(h * w * channels)).for_each(|(out, image)| {
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

/// Each pixel the sum of the up to four it became.
fn halve<T: Float>(out: &mut [T], [height, width]: [usize; 2], d_y: &[T], shape: &[usize]) {
    let [_, h, w, channels] = *shape else { unreachable!("images have four dims") };
    let images = d_y.par_chunks(h * w * channels);
    out.par_chunks_mut(height * width * channels).zip(images).for_each(|(out, image)| {
        let pairs = image.par_chunks(2 * w * channels);
        out.par_chunks_mut(width * channels).zip(pairs).for_each(|(out, rows)| {
            out.fill(T::ZERO);
            for row in rows.chunks_exact(w * channels) {
                for (out, pair) in out.chunks_exact_mut(channels).zip(row.chunks(2 * channels)) {
                    pair.chunks_exact(channels).for_each(|pixel| add(out, pixel));
                }
            }
        });
    });
}
