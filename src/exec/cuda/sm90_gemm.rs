//! Launches of products and convolutions on Hopper. Contract: kernels/sm90_gemm.cu.

use super::epilogue::{Epilogue, Split, split_k_reduce};
use super::kernels::constants::{SM90_ROWS as ROWS, SM90_THREADS};
use super::launch::{Address, Divisor, Launch, TensorMap};
use super::shape::{Lines, Shape, ring_bytes};
use bytemuck::{Pod, Zeroable};

/// Matches what is behind the tensor maps of `Sm90GemmParams` in kernels/sm90_gemm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Sm90GemmParams {
    epilogue: Epilogue,
    split: Split,
    tiles_x: Divisor,
    tiles_y: Divisor,
    chunks: Divisor,
    kernel_row: Divisor,
    batch: i32,
    height: i32,
    width: i32,
    shift_x: i32,
    shift_y: i32,
    down: i32,
    right_by: i32,
    direction: i32,
    columns: i32,
    stages: i32,
    slots: i32,
    unused: [i32; 19],
}
const _: () = assert!(size_of::<Sm90GemmParams>() + 2 * TensorMap::BYTES == 512);

/// Reduced elements of a stage.
const DEPTH: usize = TensorMap::LINE;
/// A product over images; a plain one is a 1x1 convolution of one image of one row.
pub struct Sm90Gemm {
    /// Which [`Shape::hopper`] says the kernel can make.
    pub shape: Shape,
    pub x: Address,
    /// Channels, width, height, samples of x, which is dense.
    pub extents: [usize; 4],
    /// Width and height of y.
    pub output: [usize; 2],
    pub kernel: [usize; 2],
    /// Rows and columns of x from an output's place to where its first tap reads; the next taps lie further, or back.
    pub offset: [i32; 2],
    pub direction: i32,
    pub right: Sm90Rhs,
}

/// The right operand: element (tap, c, n).
pub struct Sm90Rhs {
    pub w: Address,
    pub lines: Lines,
    /// Elements from line to line, and from tap to tap.
    pub stride: usize,
    pub tap_stride: usize,
    /// Columns of each half of a GEGLU, else 0.
    pub half: usize,
}

impl Sm90Gemm {
    /// Extents of a block's box of pixels, powers of two: those that need the fewest blocks, wide ones first.
    fn pixels(&self) -> [usize; 3] {
        let ([width, height], batch) = (self.output, self.extents[3]);
        let boxes = (0..=ROWS.ilog2()).rev().flat_map(|x| (0..=ROWS.ilog2() - x).rev().map(move |y| (1 << x, 1 << y)));
        let boxes = boxes.map(|(x, y)| [x, y, ROWS / (x * y)]);
        let blocks = |[x, y, b]: &[usize; 3]| width.div_ceil(*x) * height.div_ceil(*y) * batch.div_ceil(*b);
        boxes.min_by_key(blocks).unwrap_or([ROWS, 1, 1])
    }

    fn left_map(&self, [x, y, b]: [usize; 3]) -> TensorMap {
        let [c, width, height, _] = self.extents;
        let strides = [c, c * width, c * width * height];
        TensorMap { dtype: self.shape.dtype, address: self.x, extents: self.extents, strides, window: [DEPTH, x, y, b] }
    }

    fn right_map(&self, side: usize) -> TensorMap {
        let Sm90Rhs { w, lines, stride, tap_stride, half } = self.right;
        let columns = self.shape.columns;
        let (channels, taps) = (self.extents[0], self.kernel[0] * self.kernel[1]);
        let (extents, strides, window) = match lines {
            Lines::KMajor if half > 0 => {
                ([channels, 8, 2, half / 8], [stride, half * stride, 8 * stride], [DEPTH, 8, 2, side / 16])
            }
            Lines::KMajor => ([channels, columns, taps, 1], [stride, tap_stride, 0], [DEPTH, side, 1, 1]),
            Lines::MNMajor => ([columns, channels, taps, 1], [stride, tap_stride, 0], [TensorMap::LINE, DEPTH, 1, 1]),
        };
        TensorMap { dtype: self.shape.dtype, address: w, extents, strides, window }
    }

    /// `workspace` as [`Shape::workspace`] asks for.
    pub fn launches(&self, epilogue: Epilogue, workspace: Address) -> Vec<Launch> {
        let (cut, lines, columns) = (self.shape.cut(), self.right.lines, self.shape.columns);
        let (side, [x, y, b]) = (cut.tile.columns, self.pixels());
        let ([width, height], batch, chunks) = (self.output, self.extents[3], self.extents[0].div_ceil(DEPTH));
        let [tiles_x, tiles_y, tiles_b] = [width.div_ceil(x), height.div_ceil(y), batch.div_ceil(b)];
        let stages = chunks * self.kernel[0] * self.kernel[1];
        let (split, grid) = Split::new(&cut, [tiles_x * tiles_y * tiles_b, columns.div_ceil(side)], workspace);
        let params = Sm90GemmParams {
            epilogue,
            split,
            tiles_x: Divisor::new(tiles_x),
            tiles_y: Divisor::new(tiles_y),
            chunks: Divisor::new(chunks),
            kernel_row: Divisor::new(self.kernel[1]),
            batch: batch as i32,
            height: height as i32,
            width: width as i32,
            shift_x: x.ilog2() as i32,
            shift_y: y.ilog2() as i32,
            down: self.offset[0],
            right_by: self.offset[1],
            direction: self.direction,
            columns: columns as i32,
            stages: stages as i32,
            slots: cut.stages as i32,
            unused: [0; 19],
        };
        let name = if lines == Lines::KMajor { "sm90_gemm_r" } else { "sm90_gemm_a" };
        let shared = ring_bytes(side, lines, cut.stages);
        let kernel = format!("{name}_{side}_{}", self.shape.dtype);
        let maps = vec![self.left_map([x, y, b]), self.right_map(side)];
        let product = Launch::new(kernel, grid, SM90_THREADS, shared, params).with_maps(maps);
        [Some(product), split_k_reduce(&self.shape, &cut, epilogue, workspace)].into_iter().flatten().collect()
    }
}
