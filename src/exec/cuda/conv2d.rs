//! Launches of convolutions: products that gather one operand; a 1x1 kernel that touches every pixel once is a plain one.
//! Contract: kernels/conv2d.cu.

use super::gemm::{Blocking, Epilogue, Lines, Operand, Product, aligned, rows};
use super::hopper::{HopperProduct, HopperRight};
use super::launch::{Address, Cx, Divisor, Launch};
use crate::program::{Cols, Conv2d, Conv2dBackward, ValueId};
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
}
const _: () = assert!(size_of::<ConvParams>() == 176);

/// Whether it is one product of all pixels.
fn is_product(kernel: &[usize], stride: usize, padding: [usize; 4]) -> bool {
    kernel == [1, 1] && stride == 1 && padding == [0; 4]
}

/// Adds the shift to an epilogue: the time embedding's columns, of each sample or of all.
fn shifted(cx: &Cx, epilogue: Epilogue, shift: Option<Cols>, pixels: usize) -> Epilogue {
    let Some(shift) = shift else { return epilogue };
    let s = cx.shape(shift.value);
    let stride = if s[0] == 1 { 0 } else { s[1] };
    Epilogue { shift: cx.columns(shift), shift_stride: stride as i32, sample: Divisor::new(pixels), ..epilogue }
}

pub fn launches(op: &Conv2d, cx: &Cx) -> Vec<Launch> {
    let y = cx.output(0);
    let (dtype, held) = (cx.dtype(op.x), cx.is_factor(op.w));
    let [kh, kw, c, o] = cx.shape(op.w)[..] else { unreachable!("checked by infer") };
    let (rows, pixels) = rows(cx.shape(y));
    let depth = kh * kw * c;
    let epilogue = Epilogue { bias: cx.optional(op.bias), ..Epilogue::new(cx, y, op.residual) };
    let epilogue = shifted(cx, epilogue, op.shift, pixels);
    let (lines, w_stride, tap_stride) = if held { (Lines::Reduced, depth, c) } else { (Lines::Across, o, c * o) };
    if is_product(&[kh, kw], op.stride, op.padding) {
        let left = Operand { address: cx.address(op.x), lines: Lines::Reduced, stride: c };
        let right = Operand { address: cx.address(op.w), lines, stride: w_stride };
        let product = Product { dtype, left, right, rows, columns: o, depth, sample_rows: pixels, half: 0 };
        return vec![product.launch(cx, epilogue)];
    }
    let gather =
        Gather { x: op.x, kernel: [kh, kw], stride: op.stride, padding: op.padding, is_backward: false, output: y };
    let name = if held { "conv2d_r" } else { "conv2d_a" };
    vec![gather.launch(cx, name, epilogue, Right { w: op.w, lines, columns: o, w_stride, tap_stride })]
}

pub fn backward(op: &Conv2dBackward, cx: &Cx) -> Vec<Launch> {
    let d_x = cx.output(0);
    let (dtype, held) = (cx.dtype(op.d_y), cx.is_factor(op.w));
    let [kh, kw, i, o] = cx.shape(op.w)[..] else { unreachable!("checked by infer") };
    let (rows, pixels) = rows(cx.shape(d_x));
    let epilogue = Epilogue { sample: Divisor::new(pixels), ..Epilogue::new(cx, d_x, op.residual) };
    // Held [O, kh, kw, I], a line is one reduced channel; given [kh, kw, I, O], one output channel.
    let (lines, w_stride, tap_stride) = if held { (Lines::Across, kh * kw * i, i) } else { (Lines::Reduced, o, i * o) };
    if is_product(&[kh, kw], op.stride, op.padding) {
        let left = Operand { address: cx.address(op.d_y), lines: Lines::Reduced, stride: o };
        let right = Operand { address: cx.address(op.w), lines, stride: w_stride };
        let product = Product { dtype, left, right, rows, columns: i, depth: o, sample_rows: pixels, half: 0 };
        return vec![product.launch(cx, epilogue)];
    }
    let gather =
        Gather { x: op.d_y, kernel: [kh, kw], stride: op.stride, padding: op.padding, is_backward: true, output: d_x };
    let name = if held { "conv2d_backward_a" } else { "conv2d_backward_r" };
    vec![gather.launch(cx, name, epilogue, Right { w: op.w, lines, columns: i, w_stride, tap_stride })]
}

/// What is gathered, and for which output.
struct Gather {
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
    columns: usize,
    w_stride: usize,
    tap_stride: usize,
}

impl Gather {
    /// The same on Hopper, if it can be.
    fn hopper(&self, cx: &Cx, right: &Right) -> Option<HopperProduct> {
        let [batch, height, width, channels] = cx.shape(self.x)[..] else { unreachable!("checked by infer") };
        let [_, y_height, y_width, _] = cx.shape(self.output)[..] else { unreachable!("checked by infer") };
        let direction = if self.is_backward { -1 } else { 1 };
        let [top, left, ..] = self.padding.map(|n| -direction * n as i32);
        let product = HopperProduct {
            dtype: cx.dtype(self.x),
            x: cx.address(self.x),
            extents: [channels, width, height, batch],
            output: [y_width, y_height],
            kernel: self.kernel,
            offset: [top, left],
            direction,
            right: HopperRight {
                w: cx.address(right.w),
                lines: right.lines,
                columns: right.columns,
                stride: right.w_stride,
                tap_stride: right.tap_stride,
                half: 0,
            },
        };
        (self.stride == 1 && product.is_possible()).then_some(product)
    }

    fn launch(&self, cx: &Cx, name: &str, epilogue: Epilogue, right: Right) -> Launch {
        let (dtype, shape, output) = (cx.dtype(self.x), cx.shape(self.x), cx.shape(self.output));
        let [kh, kw] = self.kernel;
        let (rows, pixels) = rows(output);
        let (channels, address, w) = (shape[3], cx.address(self.x), cx.address(right.w));
        if let Some(product) = self.hopper(cx, &right).filter(|_| cx.hopper) {
            return product.launch(Epilogue { sample: Divisor::new(pixels), ..epilogue });
        }
        let blocking = Blocking::choose(dtype, pixels, right.columns);
        let params = ConvParams {
            epilogue: Epilogue { sample: Divisor::new(pixels), ..epilogue },
            x: address,
            w,
            row: Divisor::new(output[2]),
            channels: Divisor::new(channels),
            kernel_row: Divisor::new(kw),
            stride: Divisor::new(self.stride),
            rows: rows as i32,
            columns: right.columns as i32,
            depth: (kh * kw * channels) as i32,
            height: shape[1] as i32,
            width: shape[2] as i32,
            top: self.padding[0] as i32,
            left: self.padding[1] as i32,
            w_stride: right.w_stride as i32,
            tap_stride: right.tap_stride as i32,
            x_aligned: i32::from(aligned(dtype, address, channels)),
            w_aligned: i32::from(aligned(dtype, w, right.w_stride) && aligned(dtype, w, right.tap_stride)),
            unused: 0,
        };
        let grid = [right.columns.div_ceil(blocking.side), rows.div_ceil(blocking.side), 1];
        let shared = blocking.shared(dtype, Lines::Reduced, right.lines);
        Launch::new(format!("{name}_{}_{dtype}", blocking.side), grid, blocking.threads, shared, params)
    }
}
