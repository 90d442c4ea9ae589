//! Launches of matrix products. Contract: kernels/gemm.cu.

use super::cx::{Cx, activation, is_rhs};
use super::epilogue::{Epilogue, Split, split_k_reduce};
use super::kernels::constants::{GEMM_TILES, STAGE_DEPTH_BYTES, STAGES};
use super::launch::{Address, Launch};
use super::shape::{Hopper, Lines, Shape, Tile};
use super::sm90_gemm::{Sm90Gemm, Sm90Rhs};
use crate::program::{Activation, DType, Gemm, GemmBackward, Program};
use bytemuck::{Pod, Zeroable};

/// Matches `GemmParams` in kernels/gemm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GemmParams {
    epilogue: Epilogue,
    left: Address,
    right: Address,
    rows: i32,
    columns: i32,
    depth: i32,
    left_stride: i32,
    right_stride: i32,
    half: i32,
    left_aligned: i32,
    right_aligned: i32,
    split: Split,
}
const _: () = assert!(size_of::<GemmParams>() == 136);

/// Bytes from one line of a tile in shared memory to the next (`pitch` in kernels/tile.cuh).
pub fn pitch(dtype: DType, elements: usize) -> usize {
    ((elements * dtype.bytes() / 16) | 1) * 16
}

/// Bytes of a block's ring of stages (`stage_bytes` in kernels/gemm_mainloop.cuh).
pub fn ring_bytes(tile: &Tile, dtype: DType, left: Lines, right: Lines) -> usize {
    let depth = STAGE_DEPTH_BYTES / dtype.bytes();
    let stage = |lines, extent| match lines {
        Lines::KMajor => extent * pitch(dtype, depth),
        Lines::MNMajor => depth * pitch(dtype, extent),
    };
    STAGES * (stage(left, tile.rows) + stage(right, tile.columns))
}

/// Threads of a block that has a square tile.
pub fn threads(tile: &Tile) -> usize {
    let row = GEMM_TILES.iter().find(|row| [row[0]; 2] == [tile.rows, tile.columns]);
    let [_, down, across] = row.expect("a tile of kernels/constants.cuh");
    32 * down * across
}

/// Whether lines of `stride` elements from `address` on begin at multiples of 16 bytes.
pub fn aligned(dtype: DType, address: Address, stride: usize) -> bool {
    address.is_aligned() && (stride * dtype.bytes()).is_multiple_of(16)
}

/// An operand: where, how its lines lie, elements from one to the next.
pub struct Operand {
    pub address: Address,
    pub lines: Lines,
    pub stride: usize,
}

/// One product of two matrices.
pub struct Product {
    pub shape: Shape,
    pub left: Operand,
    pub right: Operand,
    /// Columns of each half of a GEGLU.
    pub half: usize,
}

impl Product {
    /// `workspace` as [`Shape::workspace`] asks for.
    pub fn launches(&self, epilogue: Epilogue, workspace: Address) -> Vec<Launch> {
        let Product { shape, left, right, half } = self;
        let Shape { dtype, rows, columns, depth, .. } = *shape;
        let cut = shape.cut();
        if cut.tile.hopper {
            return self.on_hopper().launches(epilogue, workspace);
        }
        let name = match (left.lines, right.lines) {
            (Lines::KMajor, Lines::KMajor) => "gemm_rr",
            (Lines::KMajor, Lines::MNMajor) => "gemm_ra",
            (Lines::MNMajor, _) => "gemm_aa",
        };
        // In a GEGLU a chunk of columns must lie in one half.
        let whole = (half * dtype.bytes()).is_multiple_of(16) || right.lines == Lines::KMajor;
        let across = if *half > 0 { 2 * half.next_multiple_of(8) } else { columns };
        let tiles = [rows.div_ceil(cut.tile.rows), across.div_ceil(cut.tile.columns)];
        let (split, grid) = Split::new(&cut, tiles, workspace);
        let params = GemmParams {
            epilogue,
            left: left.address,
            right: right.address,
            rows: rows as i32,
            columns: columns as i32,
            depth: depth as i32,
            left_stride: left.stride as i32,
            right_stride: right.stride as i32,
            half: *half as i32,
            left_aligned: i32::from(aligned(dtype, left.address, left.stride)),
            right_aligned: i32::from(aligned(dtype, right.address, right.stride) && whole),
            split,
        };
        let shared = ring_bytes(&cut.tile, dtype, left.lines, right.lines);
        let kernel = format!("{name}_{}_{dtype}", cut.tile.name);
        let product = Launch::new(kernel, grid, threads(&cut.tile), shared, params);
        [Some(product), split_k_reduce(shape, &cut, epilogue, workspace)].into_iter().flatten().collect()
    }

    /// An image of one row.
    fn on_hopper(&self) -> Sm90Gemm {
        let Product { shape, left, right, half } = self;
        let right = Sm90Rhs { w: right.address, lines: right.lines, stride: right.stride, tap_stride: 0, half: *half };
        Sm90Gemm {
            shape: *shape,
            x: left.address,
            extents: [shape.depth, shape.rows, 1, 1],
            output: [shape.rows, 1],
            kernel: [1, 1],
            offset: [0, 0],
            direction: 1,
            right,
        }
    }
}

/// Whether kernels/sm90_gemm.cu can make it: every line begins at a multiple of 16 bytes. Lines of the right operand along the
/// reduced dimension, or across it, and the columns of each half of a GEGLU.
fn hopper_can(shape: &Shape, lines: Lines, half: usize) -> bool {
    let eights = |n: usize| n.is_multiple_of(8);
    match lines {
        Lines::KMajor => eights(shape.depth) && eights(half),
        Lines::MNMajor => eights(shape.depth) && eights(shape.columns) && half == 0,
    }
}

/// Columns of each half of a GEGLU, else 0.
fn half(op: &Gemm, columns: usize) -> usize {
    if op.activation == Activation::Geglu { columns / 2 } else { 0 }
}

pub fn shape(op: &Gemm, program: &Program, hopper: Hopper) -> Shape {
    let [depth, columns] = program.shape(op.w)[..] else { unreachable!("checked by infer") };
    let shape = Shape::of_samples(program.value(op.x).dtype, program.shape(op.x), columns, depth);
    let lines = if is_rhs(program, op.w) { Lines::KMajor } else { Lines::MNMajor };
    shape.on_hopper(hopper, lines, hopper_can(&shape, lines, half(op, columns)))
}

pub fn backward_shape(op: &GemmBackward, program: &Program, hopper: Hopper) -> Shape {
    match *op {
        GemmBackward::Input { d_y, w, .. } => {
            let [k, n] = program.shape(w)[..] else { unreachable!("checked by infer") };
            let shape = Shape::of_samples(program.value(d_y).dtype, program.shape(d_y), k, n);
            let lines = if is_rhs(program, w) { Lines::MNMajor } else { Lines::KMajor };
            shape.on_hopper(hopper, lines, hopper_can(&shape, lines, 0))
        }
        GemmBackward::Weight { x, d_y } => {
            let of_x = program.shape(x);
            let (k, n) = (of_x[of_x.len() - 1], program.shape(d_y)[of_x.len() - 1]);
            let depth = of_x[..of_x.len() - 1].iter().product();
            // A sum over the batch: its rows are the weight's.
            let dtype = program.value(x).dtype;
            Shape { dtype, rows: k, nominal_rows: k, columns: n, depth, hopper, boxes: None }
        }
    }
}

pub fn launches(op: &Gemm, cx: &Cx) -> Vec<Launch> {
    let shape = shape(op, cx.program, cx.hopper);
    let Shape { columns, depth, .. } = shape;
    let right = if cx.is_rhs(op.w) {
        Operand { address: cx.address(op.w), lines: Lines::KMajor, stride: depth }
    } else {
        Operand { address: cx.address(op.w), lines: Lines::MNMajor, stride: columns }
    };
    let left = Operand { address: cx.address(op.x), lines: Lines::KMajor, stride: depth };
    let product = Product { shape, left, right, half: half(op, columns) };
    let epilogue = Epilogue::new(cx, cx.output(0), op.residual);
    let epilogue = Epilogue { bias: cx.optional(op.bias), activation: activation(op.activation), ..epilogue };
    product.launches(epilogue, cx.workspace)
}

pub fn backward(op: &GemmBackward, cx: &Cx) -> Vec<Launch> {
    let shape = backward_shape(op, cx.program, cx.hopper);
    let operand = |id, lines, stride| Operand { address: cx.address(id), lines, stride };
    let (left, right, residual) = match *op {
        GemmBackward::Input { d_y, w, residual } => {
            // Reduced over n: of what is held [N, K] a line is one n, of [K, N] one k.
            let right = if cx.is_rhs(w) {
                operand(w, Lines::MNMajor, shape.columns)
            } else {
                operand(w, Lines::KMajor, shape.depth)
            };
            (operand(d_y, Lines::KMajor, shape.depth), right, residual)
        }
        GemmBackward::Weight { x, d_y } => {
            (operand(x, Lines::MNMajor, shape.rows), operand(d_y, Lines::MNMajor, shape.columns), None)
        }
    };
    let product = Product { shape, left, right, half: 0 };
    product.launches(Epilogue::new(cx, cx.output(0), residual), cx.workspace)
}
