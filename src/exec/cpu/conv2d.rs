//! Convolution as an implicit matrix product: `out = conv(x, w) + bias + shift + residual`, no unfolded copy of the image.
//!
//! Contract: `x [B, H, W, I]`, `w [kh, kw, I, O]` packed as a `[kh·kw·I, O]` matrix, `out` and `residual [B, Ho, Wo, O]`, any
//! stride and asymmetric zero padding. Rows of the product are output pixels. A K block is a stretch of input channels at one
//! kernel tap, so the left operand's row is a slice of an input pixel, or of zeros outside the image. With few input channels
//! the blocks would be too short, and a chunk's patches are gathered into thread scratch instead. Cut and bits: see `product`;
//! the K blocks depend on the kernel's shape only.

use super::gemm::{K_BLOCK, Matrix};
use super::microkernel::{Block, Blocks, Dense, Left};
use super::pack::{Columns, Packed};
use super::product::{Cut, MOST_ROWS, Operand, Product, Residual, Shift};
use super::real::Real;
use super::{Cx, Machine, Outputs};
use crate::program::{Activation, Conv2d, Program};
use std::ops::Range;

/// With fewer input channels than this, patches are gathered.
const FEW_CHANNELS: usize = 32;

/// The sizes that turn an output pixel and a tap into an input pixel.
#[derive(Clone, Copy)]
struct Geometry {
    height: usize,
    width: usize,
    channels: usize,
    out_height: usize,
    out_width: usize,
    kernel_width: usize,
    taps: usize,
    stride: usize,
    top: usize,
    left: usize,
}

impl Geometry {
    fn new(op: &Conv2d, program: &Program) -> Geometry {
        let (x, w) = (program.shape(op.x), program.shape(op.w));
        let [top, left, bottom, right] = op.padding;
        Geometry {
            height: x[1],
            width: x[2],
            channels: x[3],
            out_height: (x[1] + top + bottom - w[0]) / op.stride + 1,
            out_width: (x[2] + left + right - w[1]) / op.stride + 1,
            kernel_width: w[1],
            taps: w[0] * w[1],
            stride: op.stride,
            top,
            left,
        }
    }

    fn rows_per_sample(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Output pixels are input pixels.
    fn pointwise(&self) -> bool {
        self.taps == 1 && self.stride == 1 && self.out_height == self.height && self.out_width == self.width
    }

    fn gathers(&self) -> bool {
        self.channels < FEW_CHANNELS && !self.pointwise()
    }

    /// Where output pixel `row` begins to read.
    fn pixel(&self, row: usize) -> Pixel {
        let (sample, row) = (row / self.rows_per_sample(), row % self.rows_per_sample());
        Pixel {
            image: sample * self.height * self.width,
            y: (row / self.out_width * self.stride) as isize - self.top as isize,
            x: (row % self.out_width * self.stride) as isize - self.left as isize,
        }
    }

    /// Index of the input pixel at `tap`, if it lies in the image.
    #[inline(always)]
    fn tap(&self, pixel: Pixel, tap: usize) -> Option<usize> {
        // Coordinates left of or above the image wrap to huge numbers.
        let y = (pixel.y + (tap / self.kernel_width) as isize) as usize;
        let x = (pixel.x + (tap % self.kernel_width) as isize) as usize;
        (y < self.height && x < self.width).then(|| pixel.image + y * self.width + x)
    }
}

#[derive(Clone, Copy, Default)]
struct Pixel {
    image: usize,
    y: isize,
    x: isize,
}

/// Output pixels whose K blocks point into the image.
struct Pixels<'a, T> {
    values: &'a [T],
    geometry: Geometry,
}

struct PixelRows<'a, T> {
    values: &'a [T],
    geometry: Geometry,
    pixels: [Pixel; MOST_ROWS],
}

impl<T: Real> Operand<T> for Pixels<'_, T> {
    type Chunk<'c>
        = PixelRows<'c, T>
    where
        Self: 'c;

    fn scratch(&self, _: usize) -> usize {
        0
    }

    fn chunk<'c>(&'c self, rows: Range<usize>, _: &'c mut [T]) -> PixelRows<'c, T> {
        let mut pixels = [Pixel::default(); MOST_ROWS];
        for (pixel, row) in pixels.iter_mut().zip(rows) {
            *pixel = self.geometry.pixel(row);
        }
        PixelRows { values: self.values, geometry: self.geometry, pixels }
    }
}

impl<T: Real> Left<T> for PixelRows<'_, T> {
    #[inline(always)]
    fn row(&self, row: usize, block: Block) -> &[T] {
        match self.geometry.tap(self.pixels[row], block.tap) {
            Some(index) => &self.values[index * self.geometry.channels + block.start..][..block.len],
            None => &T::ZEROS[..block.len],
        }
    }
}

/// Output pixels whose patches are gathered chunk by chunk.
struct Patches<'a, T>(Pixels<'a, T>);

impl<T: Real> Operand<T> for Patches<'_, T> {
    type Chunk<'c>
        = Dense<'c, T>
    where
        Self: 'c;

    fn scratch(&self, rows: usize) -> usize {
        rows * self.0.geometry.taps * self.0.geometry.channels
    }

    fn chunk<'c>(&'c self, rows: Range<usize>, scratch: &'c mut [T]) -> Dense<'c, T> {
        let Geometry { taps, channels, .. } = self.0.geometry;
        for (row, patch) in rows.zip(scratch.chunks_exact_mut(taps * channels)) {
            let pixel = self.0.geometry.pixel(row);
            for (tap, out) in patch.chunks_exact_mut(channels).enumerate() {
                match self.0.geometry.tap(pixel, tap) {
                    Some(index) => out.copy_from_slice(&self.0.values[index * channels..][..channels]),
                    None => out.fill(T::ZERO),
                }
            }
        }
        Dense { values: scratch, stride: taps * channels }
    }
}

/// `w` as a matrix.
fn matrix(op: &Conv2d, program: &Program) -> (usize, usize) {
    let w = program.shape(op.w);
    (w[0] * w[1] * w[2], w[3])
}

/// Elements of workspace: of the packed weight where it is an input, and of the product.
pub fn workspace(op: &Conv2d, program: &Program, machine: &Machine) -> usize {
    let (k, n) = matrix(op, program);
    let geometry = Geometry::new(op, program);
    let columns = Columns::new(n, machine.tiling);
    let rows = program.shape(op.x)[0] * geometry.rows_per_sample();
    let packed = if super::is_weight(program, op.w) { 0 } else { k * columns.padded() };
    packed + Cut::new(rows, columns.panels, machine.threads).workspace(columns)
}

pub fn scratch(op: &Conv2d, program: &Program) -> usize {
    let geometry = Geometry::new(op, program);
    if geometry.gathers() { MOST_ROWS * geometry.taps * geometry.channels } else { 0 }
}

pub fn run<T: Real>(cx: &Cx<'_, T>, op: &Conv2d, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, in_place } = outputs;
    let (k, n) = matrix(op, cx.program);
    let columns = Columns::new(n, cx.machine.tiling);
    let (data, workspace): (&[T], _) = match cx.packed(op.w) {
        Some(data) => (data, workspace),
        None => {
            let (data, workspace) = workspace.split_at_mut(k * columns.padded());
            columns.pack(cx.value(op.w), n, k, data);
            (data, workspace)
        }
    };
    let right = [Packed { columns, k, data }];
    let geometry = Geometry::new(op, cx.program);
    let Geometry { taps, channels, .. } = geometry;
    let values = cx.value(op.x);
    let product = Product {
        left: (),
        rows: out.len() / n,
        blocks: Blocks::new(taps, channels, K_BLOCK),
        right: &right,
        bias: op.bias.map(|id| cx.value(id)),
        shift: op.shift.map(|shift| Shift {
            values: &cx.value(shift.value)[shift.at..],
            stride: cx.shape(shift.value)[1],
            samples: cx.shape(shift.value)[0],
            rows_per_sample: geometry.rows_per_sample(),
        }),
        residual: match op.residual {
            _ if in_place => Residual::InPlace,
            Some(id) => Residual::Of(cx.value(id)),
            None => Residual::None,
        },
        activation: Activation::None,
    };
    let pixels = Pixels { values, geometry };
    if geometry.pointwise() {
        product.with(Matrix { values, width: channels }).run(&cx.machine, cx.scratch, out, workspace);
    } else if geometry.gathers() {
        let product = Product { blocks: Blocks::new(1, k, K_BLOCK), ..product };
        product.with(Patches(pixels)).run(&cx.machine, cx.scratch, out, workspace);
    } else {
        product.with(pixels).run(&cx.machine, cx.scratch, out, workspace);
    }
}
