//! Gradient of a convolution to its input, `d_x = convᵀ(d_y, w) + residual`, as an implicit product with the weight transposed.
//!
//! Contract: `d_y [B, Ho, Wo, O]`, `w [kh, kw, I, O]` as the forward holds it (see `rhs`), `residual` and `out [B, H, W, I]`,
//! any stride and asymmetric zero padding. Rows of the product are input pixels; a K block is a stretch of output channels at
//! one tap, so the left operand's row is a slice of the output pixel that the tap carried there, or of zeros outside.
//!
//! Under a stride a tap reaches only the input pixels whose coordinates leave its own remainders. The pixels of a row chunk
//! are sorted by these remainders: those of a tap are then neighbours, and no product with zero padding is computed.
//!
//! With few output channels a chunk's patches of `d_y` are gathered, as in the forward. With few input channels the panels
//! would be mostly padding, and all taps are multiplied at once, `d_y wᵀ [B·Ho·Wo, kh·kw·I]` in the workspace; each input pixel
//! then sums its own in order. Cut and bits: see `gemm_mainloop`; the K blocks depend on the kernel's shape only.

use super::context::{Cx, Machine, Outputs};
use super::conv2d::{FEW_CHANNELS, Geometry};
use super::gemm::{K_STEP, Matrix};
use super::gemm_mainloop::K_BLOCK;
use super::gemm_mainloop::{Cut, MOST_ROWS_TURNED, Operand, Product, Residual};
use super::microkernel::{Block, Blocks, Dense, Left};
use super::pack::{Columns, Tiling};
use super::real::Float;
use super::rhs::{self, Transposed};
use crate::program::{Conv2dBackward, Program};
use rayon::prelude::*;
use std::ops::Range;

/// What becomes rows and columns of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Input pixels are output pixels.
    Pointwise,
    /// Output pixels by taps and input channels, summed afterwards.
    Fold,
    /// Input pixels with gathered patches.
    Gather,
    /// Input pixels whose K blocks point into the image.
    Implicit,
}

struct Sizes {
    geometry: Geometry,
    /// Output channels.
    depth: usize,
    way: Way,
    /// Of the product.
    rows: usize,
    columns: Columns,
}

impl Sizes {
    fn new(op: &Conv2dBackward, program: &Program, tiling: Tiling) -> Sizes {
        let (d_y, w) = (program.shape(op.d_y), program.shape(op.w));
        let geometry = Geometry::new(op.size, w, op.stride, op.padding);
        let Geometry { height, width, channels, out_height, out_width, taps, .. } = geometry;
        let way = if geometry.pointwise() {
            Way::Pointwise
        } else if channels < FEW_CHANNELS {
            Way::Fold
        } else if d_y[3] < FEW_CHANNELS {
            Way::Gather
        } else {
            Way::Implicit
        };
        let (rows, n) = match way {
            Way::Pointwise | Way::Gather | Way::Implicit => (height * width, channels),
            Way::Fold => (out_height * out_width, taps * channels),
        };
        Sizes { geometry, depth: d_y[3], way, rows: d_y[0] * rows, columns: Columns::new(n, tiling) }
    }

    /// Elements of the product's result where it is not the output.
    fn folded(&self) -> usize {
        if self.way == Way::Fold { self.rows * self.columns.n } else { 0 }
    }
}

/// Elements of workspace.
pub fn workspace(op: &Conv2dBackward, program: &Program, machine: &Machine) -> usize {
    let sizes = Sizes::new(op, program, machine.tiling);
    let cut = Cut::new(sizes.rows, sizes.columns.panels, machine.threads, MOST_ROWS_TURNED);
    sizes.folded() + cut.workspace(sizes.columns)
}

pub fn scratch(op: &Conv2dBackward, program: &Program, tiling: Tiling) -> usize {
    let sizes = Sizes::new(op, program, tiling);
    let patches = if sizes.way == Way::Gather { MOST_ROWS_TURNED * sizes.geometry.taps * sizes.depth } else { 0 };
    patches + rhs::scratch(sizes.columns, tiling)
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Conv2dBackward, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, in_place } = outputs;
    let Sizes { geometry, depth, way, rows, columns } = Sizes::new(op, cx.program, cx.machine.tiling);
    let right = [Transposed::new(cx.rhs(op.w, 1), columns)];
    let values = cx.value(op.d_y);
    let residual = cx.residual(op.residual, in_place);
    let product = |taps: usize, depth: usize, residual| {
        Product::of(rows, Blocks::new(taps, depth, K_BLOCK).stepped(K_STEP), &right, residual)
    };
    let (machine, scratch) = (&cx.machine, cx.scratch);
    let pixels = Pixels { values, geometry, depth };
    match way {
        Way::Pointwise => {
            product(1, depth, residual).with(Matrix { values, width: depth }).run(machine, scratch, out, workspace)
        }
        Way::Fold => {
            let (taps, workspace) = workspace.split_at_mut(rows * columns.n);
            let product = product(1, depth, Residual::None).with(Matrix { values, width: depth });
            product.run(machine, scratch, taps, workspace);
            fold(geometry, taps, residual, out);
        }
        Way::Gather => {
            let product = product(1, geometry.taps * depth, residual);
            product.with(Patches(pixels)).run(machine, scratch, out, workspace)
        }
        Way::Implicit => product(geometry.taps, depth, residual).with(pixels).run(machine, scratch, out, workspace),
    }
}

/// An input pixel as the taps see it.
#[derive(Clone, Copy, Default)]
struct Pixel {
    /// First output pixel of its sample.
    image: usize,
    /// The output pixel that tap 0 would carry here, were there no remainder.
    y: usize,
    x: usize,
    /// The remainders, as one number.
    class: usize,
    /// Where in its chunk it lies.
    place: usize,
}

impl Geometry {
    /// Input pixel `row` of the batch.
    fn seen(&self, row: usize) -> Pixel {
        let pixels = self.height * self.width;
        let (y, x) = (row % pixels / self.width + self.top, row % self.width + self.left);
        Pixel {
            image: row / pixels * self.out_height * self.out_width,
            y: y / self.stride,
            x: x / self.stride,
            class: y % self.stride * self.stride + x % self.stride,
            place: 0,
        }
    }

    /// The class of the pixels that a tap reaches.
    #[inline(always)]
    fn class(&self, tap: usize) -> usize {
        tap / self.kernel_width % self.stride * self.stride + tap % self.kernel_width % self.stride
    }

    /// What gives the index of the output pixel that `tap` carried to a pixel of its class, if it lies in the image.
    #[inline(always)]
    fn source(&self, tap: usize) -> impl Fn(Pixel) -> Option<usize> {
        let (up, left) = (tap / self.kernel_width / self.stride, tap % self.kernel_width / self.stride);
        move |pixel| {
            // Coordinates left of or above the image wrap to huge numbers.
            let (y, x) = (pixel.y.wrapping_sub(up), pixel.x.wrapping_sub(left));
            (y < self.out_height && x < self.out_width).then(|| pixel.image + y * self.out_width + x)
        }
    }
}

#[derive(Clone, Copy)]
struct Pixels<'a, T> {
    values: &'a [T],
    geometry: Geometry,
    depth: usize,
}

/// The pixels of a chunk, sorted by class.
struct PixelRows<'a, T> {
    of: Pixels<'a, T>,
    pixels: [Pixel; MOST_ROWS_TURNED],
}

impl<T: Float> Operand<T> for Pixels<'_, T> {
    type Chunk<'c>
        = PixelRows<'c, T>
    where
        Self: 'c;

    fn scratch(&self, _: usize) -> usize {
        0
    }

    fn chunk<'c>(&'c self, rows: Range<usize>, _: &'c mut [T]) -> PixelRows<'c, T> {
        let mut pixels = [Pixel::default(); MOST_ROWS_TURNED];
        let present = &mut pixels[..rows.len()];
        for (place, pixel) in present.iter_mut().enumerate() {
            *pixel = Pixel { place, ..self.geometry.seen(rows.start + place) };
        }
        present.sort_unstable_by_key(|pixel| (pixel.class, pixel.place));
        PixelRows { of: *self, pixels }
    }
}

impl<T: Float> Left<T> for PixelRows<'_, T> {
    const SPARSE: bool = true;

    #[inline(always)]
    fn rows<'s>(&'s self, block: Block) -> impl Fn(usize) -> &'s [T]
    where
        T: 's,
    {
        let source = self.of.geometry.source(block.tap);
        move |row| match source(self.pixels[row]) {
            Some(index) => &self.of.values[index * self.of.depth + block.start..][..block.len],
            None => &T::ZEROS[..block.len],
        }
    }

    #[inline(always)]
    fn present(&self, rows: usize, block: Block) -> Range<usize> {
        let class = self.of.geometry.class(block.tap);
        let before = |end: usize| self.pixels[..rows].partition_point(|pixel| pixel.class < end);
        before(class)..before(class + 1)
    }

    #[inline(always)]
    fn place(&self, row: usize) -> usize {
        self.pixels[row].place
    }
}

/// Input pixels whose patches of `d_y` are gathered chunk by chunk.
struct Patches<'a, T>(Pixels<'a, T>);

impl<T: Float> Operand<T> for Patches<'_, T> {
    type Chunk<'c>
        = Dense<'c, T>
    where
        Self: 'c;

    fn scratch(&self, rows: usize) -> usize {
        rows * self.0.geometry.taps * self.0.depth
    }

    fn chunk<'c>(&'c self, rows: Range<usize>, scratch: &'c mut [T]) -> Dense<'c, T> {
        let Pixels { values, geometry, depth } = self.0;
        let stride = geometry.taps * depth;
        for (row, patch) in rows.zip(scratch.chunks_exact_mut(stride)) {
            let pixel = geometry.seen(row);
            for (tap, out) in patch.chunks_exact_mut(depth).enumerate() {
                match geometry.source(tap)(pixel).filter(|_| geometry.class(tap) == pixel.class) {
                    Some(index) => out.copy_from_slice(&values[index * depth..][..depth]),
                    None => out.fill(T::ZERO),
                }
            }
        }
        Dense { values: scratch, stride }
    }
}

/// Each input pixel: the residual, plus what each tap of its class carried to it, `taps [B·Ho·Wo, kh·kw, I]`.
fn fold<T: Float>(geometry: Geometry, taps: &[T], residual: Residual<'_, T>, out: &mut [T]) {
    let Geometry { width, channels, kernel_width, stride, .. } = geometry;
    out.par_chunks_mut(width * channels).enumerate().for_each(|(line, out)| {
        for (x, out) in out.chunks_exact_mut(channels).enumerate() {
            let row = line * width + x;
            match residual {
                Residual::None => out.fill(T::ZERO),
                Residual::Of(values) => out.copy_from_slice(&values[row * channels..][..channels]),
                Residual::InPlace => {}
            }
            let pixel = geometry.seen(row);
            let (first_y, first_x) = (pixel.class / stride, pixel.class % stride);
            for ky in (first_y..geometry.taps / kernel_width).step_by(stride) {
                for tap in (first_x..kernel_width).step_by(stride).map(|kx| ky * kernel_width + kx) {
                    if let Some(index) = geometry.source(tap)(pixel) {
                        let values = &taps[(index * geometry.taps + tap) * channels..][..channels];
                        out.iter_mut().zip(values).for_each(|(out, &value)| *out += value);
                    }
                }
            }
        }
    });
}
