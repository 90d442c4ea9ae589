//! Convolution as an implicit matrix product: `out = conv(x, w) + bias + shift + residual`, no unfolded copy of the image.
//!
//! Contract: `x [B, H, W, I]`, `w [kh, kw, I, O]` held as a `[kh·kw·I, O]` matrix (see `rhs`), `out` and `residual [B, Ho, Wo, O]`, any
//! stride and asymmetric zero padding. Rows of the product are output pixels. A K block is a stretch of input channels at one
//! kernel tap, so the left operand's row is a slice of an input pixel, or of zeros outside the image. With few input channels
//! the blocks would be too short, and a chunk's patches are gathered into thread scratch instead. Cut and bits: see `gemm_mainloop`;
//! the K blocks depend on the kernel's shape only.

use super::context::{Cx, Machine, Outputs};
use super::gemm::Matrix;
use super::gemm_mainloop::K_BLOCK;
use super::gemm_mainloop::{Cut, MOST_ROWS, Operand, Product, Shift};
use super::microkernel::{Block, Blocks, Dense, Left};
use super::pack::Tiling;
use super::real::Float;
use super::{rhs, store};
use crate::program::{Activation, Conv2d, Program};
use std::ops::Range;

/// With fewer input channels than this, patches are gathered.
pub const FEW_CHANNELS: usize = 32;

/// The sizes that say which output pixels, input pixels and taps belong together.
#[derive(Clone, Copy)]
pub struct Geometry {
    pub height: usize,
    pub width: usize,
    /// Of the input.
    pub channels: usize,
    pub out_height: usize,
    pub out_width: usize,
    pub kernel_width: usize,
    pub taps: usize,
    pub stride: usize,
    pub top: usize,
    pub left: usize,
}

impl Geometry {
    /// From the height and width of the input and the shape of the weight.
    pub fn new(size: [usize; 2], w: &[usize], stride: usize, padding: [usize; 4]) -> Geometry {
        let ([height, width], [top, left, bottom, right]) = (size, padding);
        Geometry {
            height,
            width,
            channels: w[2],
            out_height: (height + top + bottom - w[0]) / stride + 1,
            out_width: (width + left + right - w[1]) / stride + 1,
            kernel_width: w[1],
            taps: w[0] * w[1],
            stride,
            top,
            left,
        }
    }

    fn of(op: &Conv2d, program: &Program) -> Geometry {
        let x = program.shape(op.x);
        Geometry::new([x[1], x[2]], program.shape(op.w), op.stride, op.padding)
    }

    fn rows_per_sample(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Output pixels are input pixels.
    pub fn pointwise(&self) -> bool {
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

    /// What gives the index of the input pixel at `tap`, if it lies in the image.
    #[inline(always)]
    fn tap(&self, tap: usize) -> impl Fn(Pixel) -> Option<usize> {
        let (down, right) = ((tap / self.kernel_width) as isize, (tap % self.kernel_width) as isize);
        move |pixel| {
            // Coordinates left of or above the image wrap to huge numbers.
            let (y, x) = ((pixel.y + down) as usize, (pixel.x + right) as usize);
            (y < self.height && x < self.width).then(|| pixel.image + y * self.width + x)
        }
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

impl<T: Float> Operand<T> for Pixels<'_, T> {
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

impl<T: Float> Left<T> for PixelRows<'_, T> {
    #[inline(always)]
    fn rows<'s>(&'s self, block: Block) -> impl Fn(usize) -> &'s [T]
    where
        T: 's,
    {
        let tap = self.geometry.tap(block.tap);
        move |row| match tap(self.pixels[row]) {
            Some(index) => &self.values[index * self.geometry.channels + block.start..][..block.len],
            None => &T::ZEROS[..block.len],
        }
    }
}

/// Output pixels whose patches are gathered chunk by chunk.
struct Patches<'a, T>(Pixels<'a, T>);

impl<T: Float> Operand<T> for Patches<'_, T> {
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
                match self.0.geometry.tap(tap)(pixel) {
                    Some(index) => out.copy_from_slice(&self.0.values[index * channels..][..channels]),
                    None => out.fill(T::ZERO),
                }
            }
        }
        Dense { values: scratch, stride: taps * channels }
    }
}

/// Elements of workspace.
pub fn workspace(op: &Conv2d, program: &Program, machine: &Machine) -> usize {
    let columns = store::columns(program, op.w, 1, machine.tiling);
    let rows = program.shape(op.x)[0] * Geometry::of(op, program).rows_per_sample();
    Cut::new(rows, columns.panels, machine.threads, MOST_ROWS).workspace(columns)
}

pub fn scratch(op: &Conv2d, program: &Program, tiling: Tiling) -> usize {
    let geometry = Geometry::of(op, program);
    let patches = if geometry.gathers() { MOST_ROWS * geometry.taps * geometry.channels } else { 0 };
    patches + rhs::scratch(store::columns(program, op.w, 1, tiling), tiling)
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Conv2d, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], workspace, in_place } = outputs;
    let geometry = Geometry::of(op, cx.program);
    let Geometry { taps, channels, .. } = geometry;
    let right = [cx.rhs(op.w, 1)];
    let product = Product {
        left: (),
        rows: cx.shape(op.x)[0] * geometry.rows_per_sample(),
        blocks: Blocks::new(taps, channels, K_BLOCK),
        right: &right,
        bias: op.bias.map(|id| cx.value(id)),
        shift: op.shift.map(|shift| Shift {
            values: &cx.value(shift.value)[shift.at..],
            stride: cx.shape(shift.value)[1],
            samples: cx.shape(shift.value)[0],
            rows_per_sample: geometry.rows_per_sample(),
        }),
        residual: cx.residual(op.residual, in_place),
        activation: Activation::None,
    };
    let values = cx.value(op.x);
    let pixels = Pixels { values, geometry };
    if geometry.pointwise() {
        product.with(Matrix { values, width: channels }).run(&cx.machine, cx.scratch, out, workspace);
    } else if geometry.gathers() {
        let product = Product { blocks: Blocks::new(1, taps * channels, K_BLOCK), ..product };
        product.with(Patches(pixels)).run(&cx.machine, cx.scratch, out, workspace);
    } else {
        product.with(pixels).run(&cx.machine, cx.scratch, out, workspace);
    }
}
