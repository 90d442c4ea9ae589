//! Launches of convolutions: products that gather one operand; a 1x1 kernel that touches every pixel once is a plain one.
//! Contract: kernels/conv2d.cu.

use super::cx::{Cx, is_rhs};
use super::epilogue::{Epilogue, Split, split_k_reduce};
use super::gemm::{Operand, Product, aligned, ring_bytes, threads};
use super::launch::{Address, Divisor, Launch, TensorMap};
use super::shape::{Hopper, Lines, Shape};
use super::sm90_gemm::{Sm90Gemm, Sm90Rhs};
use crate::program::{Cols, Conv2d, Conv2dBackward, Program, ValueId};
use bytemuck::{Pod, Zeroable};

/// Matches `ConvParams` in kernels/conv2d.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvParams {
    epilogue: Epilogue,
    x: Address,
    w: Address,
    row: Divisor,
    channels: Divisor,
    kernel_row: Divisor,
    stride: Divisor,
    rows: i32,
    columns: i32,
    depth: i32,
    height: i32,
    width: i32,
    top: i32,
    left: i32,
    w_stride: i32,
    tap_stride: i32,
    x_aligned: i32,
    w_aligned: i32,
    unused: i32,
    split: Split,
}
const _: () = assert!(size_of::<ConvParams>() == 200);

/// Adds the shift to an epilogue: the time embedding's columns, of each sample or of all.
fn shifted(cx: &Cx, epilogue: Epilogue, shift: Option<Cols>) -> Epilogue {
    let Some(shift) = shift else { return epilogue };
    let s = cx.shape(shift.value);
    let stride = if s[0] == 1 { 0 } else { s[1] };
    Epilogue { shift: cx.columns(shift), shift_stride: stride as i32, ..epilogue }
}

/// A store of images to `y`.
fn store(cx: &Cx, y: ValueId, residual: Option<ValueId>) -> Epilogue {
    let [_, height, width, _] = cx.shape(y)[..] else { unreachable!("checked by infer") };
    Epilogue { sample: Divisor::new(height * width), ..Epilogue::new(cx, y, residual) }
}

/// Whether kernels/sm90_gemm.cu can make it: a chunk of channels lies in one tap, and every line begins at a multiple of 16
/// bytes. Of the right operand lines run along the `channels`, or across them.
fn hopper_can(taps: usize, stride: usize, channels: usize, lines: Lines, columns: usize) -> bool {
    let whole = channels.is_multiple_of(if taps > 1 { TensorMap::LINE } else { 8 });
    stride == 1 && whole && (lines == Lines::KMajor || columns.is_multiple_of(8))
}

pub fn shape(op: &Conv2d, program: &Program, y: ValueId, hopper: Hopper) -> Shape {
    let [kh, kw, c, o] = program.shape(op.w)[..] else { unreachable!("checked by infer") };
    let lines = if is_rhs(program, op.w) { Lines::KMajor } else { Lines::MNMajor };
    Shape::of_samples(program.value(op.x).dtype, program.shape(y), o, kh * kw * c).on_hopper(
        hopper,
        lines,
        hopper_can(kh * kw, op.stride, c, lines, o),
    )
}

pub fn backward_shape(op: &Conv2dBackward, program: &Program, d_x: ValueId, hopper: Hopper) -> Shape {
    let [kh, kw, i, o] = program.shape(op.w)[..] else { unreachable!("checked by infer") };
    let lines = if is_rhs(program, op.w) { Lines::MNMajor } else { Lines::KMajor };
    Shape::of_samples(program.value(op.d_y).dtype, program.shape(d_x), i, kh * kw * o).on_hopper(
        hopper,
        lines,
        hopper_can(kh * kw, op.stride, o, lines, i),
    )
}

pub fn launches(op: &Conv2d, cx: &Cx) -> Vec<Launch> {
    let (y, held) = (cx.output(0), cx.is_rhs(op.w));
    let [kh, kw, c, o] = cx.shape(op.w)[..] else { unreachable!("checked by infer") };
    let shape = shape(op, cx.program, y, cx.hopper);
    let epilogue = Epilogue { bias: cx.optional(op.bias), ..store(cx, y, op.residual) };
    let epilogue = shifted(cx, epilogue, op.shift);
    let (lines, w_stride, tap_stride) = if held { (Lines::KMajor, shape.depth, c) } else { (Lines::MNMajor, o, c * o) };
    let gather = Gather {
        shape,
        x: op.x,
        kernel: [kh, kw],
        stride: op.stride,
        padding: op.padding,
        is_backward: false,
        output: y,
    };
    gather.launches(cx, epilogue, Right { w: op.w, lines, w_stride, tap_stride })
}

pub fn backward(op: &Conv2dBackward, cx: &Cx) -> Vec<Launch> {
    let (d_x, held) = (cx.output(0), cx.is_rhs(op.w));
    let [kh, kw, i, o] = cx.shape(op.w)[..] else { unreachable!("checked by infer") };
    let shape = backward_shape(op, cx.program, d_x, cx.hopper);
    let epilogue = store(cx, d_x, op.residual);
    // Held [O, kh, kw, I], a line is one reduced channel; given [kh, kw, I, O], one output channel.
    let (lines, w_stride, tap_stride) = if held { (Lines::MNMajor, kh * kw * i, i) } else { (Lines::KMajor, o, i * o) };
    let gather = Gather {
        shape,
        x: op.d_y,
        kernel: [kh, kw],
        stride: op.stride,
        padding: op.padding,
        is_backward: true,
        output: d_x,
    };
    gather.launches(cx, epilogue, Right { w: op.w, lines, w_stride, tap_stride })
}

/// What is gathered, and for which output.
struct Gather {
    shape: Shape,
    x: ValueId,
    kernel: [usize; 2],
    stride: usize,
    /// Of the forward.
    padding: [usize; 4],
    is_backward: bool,
    output: ValueId,
}

/// The filter as right operand.
struct Right {
    w: ValueId,
    lines: Lines,
    w_stride: usize,
    tap_stride: usize,
}

impl Gather {
    fn on_hopper(&self, cx: &Cx, right: &Right) -> Sm90Gemm {
        let [batch, height, width, channels] = cx.shape(self.x)[..] else { unreachable!("checked by infer") };
        let [_, y_height, y_width, _] = cx.shape(self.output)[..] else { unreachable!("checked by infer") };
        let direction = if self.is_backward { -1 } else { 1 };
        let [top, left, ..] = self.padding.map(|n| -direction * n as i32);
        let Right { w, lines, w_stride, tap_stride } = *right;
        Sm90Gemm {
            shape: self.shape,
            x: cx.address(self.x),
            extents: [channels, width, height, batch],
            output: [y_width, y_height],
            kernel: self.kernel,
            offset: [top, left],
            direction,
            right: Sm90Rhs { w: cx.address(w), lines, stride: w_stride, tap_stride, half: 0 },
        }
    }

    /// Whether it is one product of all pixels.
    fn is_plain(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.padding == [0; 4]
    }

    fn launches(&self, cx: &Cx, epilogue: Epilogue, right: Right) -> Vec<Launch> {
        if self.is_plain() {
            let operand = |id, lines, stride| Operand { address: cx.address(id), lines, stride };
            let left = operand(self.x, Lines::KMajor, cx.width(self.x));
            let right = operand(right.w, right.lines, right.w_stride);
            return Product { shape: self.shape, left, right, half: 0 }.launches(epilogue, cx.workspace);
        }
        let (input, output) = (cx.shape(self.x), cx.shape(self.output));
        let Shape { dtype, rows, columns, depth, .. } = self.shape;
        let (channels, address, w) = (input[3], cx.address(self.x), cx.address(right.w));
        let cut = self.shape.cut();
        if cut.tile.hopper {
            return self.on_hopper(cx, &right).launches(epilogue, cx.workspace);
        }
        let tiles = [rows.div_ceil(cut.tile.rows), columns.div_ceil(cut.tile.columns)];
        let (split, grid) = Split::new(&cut, tiles, cx.workspace);
        let params = ConvParams {
            epilogue,
            x: address,
            w,
            row: Divisor::new(output[2]),
            channels: Divisor::new(channels),
            kernel_row: Divisor::new(self.kernel[1]),
            stride: Divisor::new(self.stride),
            rows: rows as i32,
            columns: columns as i32,
            depth: depth as i32,
            height: input[1] as i32,
            width: input[2] as i32,
            top: self.padding[0] as i32,
            left: self.padding[1] as i32,
            w_stride: right.w_stride as i32,
            tap_stride: right.tap_stride as i32,
            x_aligned: i32::from(aligned(dtype, address, channels)),
            w_aligned: i32::from(
                aligned(dtype, w, right.w_stride) && (!self.is_backward || aligned(dtype, w, right.tap_stride)),
            ),
            unused: 0,
            split,
        };
        let shared = ring_bytes(&cut.tile, dtype, Lines::KMajor, right.lines);
        let name = match (self.is_backward, right.lines) {
            (false, Lines::KMajor) => "conv2d_r",
            (false, Lines::MNMajor) => "conv2d_a",
            (true, Lines::KMajor) => "conv2d_backward_r",
            (true, Lines::MNMajor) => "conv2d_backward_a",
        };
        let kernel = format!("{name}_{}_{dtype}", cut.tile.name);
        let product = Launch::new(kernel, grid, threads(&cut.tile), shared, params);
        [Some(product), split_k_reduce(&self.shape, &cut, epilogue, cx.workspace)].into_iter().flatten().collect()
    }
}
