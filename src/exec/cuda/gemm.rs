//! Launches of matrix products. Contract: kernels/gemm.cu.

use super::hopper::{HopperProduct, HopperRight};
use super::launch::{Address, Cx, Divisor, Launch, activation};
use crate::program::{Activation, DType, Gemm, GemmBackward, ValueId};
use bytemuck::{Pod, Zeroable};

/// What happens to a sum before it is stored. Matches `Epilogue` in kernels/product.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Epilogue {
    pub y: Address,
    pub bias: Address,
    pub shift: Address,
    pub residual: Address,
    pub sample: Divisor,
    pub shift_stride: i32,
    pub columns: i32,
    pub activation: i32,
    pub paired: i32,
    pub unused: i32,
}
const _: () = assert!(size_of::<Epilogue>() == 64);

impl Epilogue {
    /// A bare store of `[.., columns]` to `y`, added to a residual if there is one.
    pub fn new(cx: &Cx, y: ValueId, residual: Option<ValueId>) -> Epilogue {
        let columns = cx.width(y);
        Epilogue {
            y: cx.address(y),
            bias: Address::NULL,
            shift: Address::NULL,
            residual: cx.optional(residual),
            sample: Divisor::new(1),
            shift_stride: 0,
            columns: columns as i32,
            activation: activation(Activation::None),
            paired: i32::from(columns.is_multiple_of(2)),
            unused: 0,
        }
    }
}

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
}
const _: () = assert!(size_of::<GemmParams>() == 112);

/// Stages of a product's ring in shared memory.
const STAGES: usize = 3;

/// Bytes from one line of a tile in shared memory to the next (`pitch` in kernels/tile.cuh).
pub fn pitch(dtype: DType, elements: usize) -> usize {
    ((elements * dtype.bytes() / 16) | 1) * 16
}

/// What the lines of an operand run along (`Lines` in kernels/tile.cuh).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    Reduced,
    Across,
}

/// Outputs per block and its threads.
#[derive(Clone, Copy)]
pub struct Blocking {
    pub side: usize,
    pub threads: usize,
}

impl Blocking {
    /// Large blocks where a sample's own rows and the columns fill them: a choice that the batch cannot change.
    pub fn choose(dtype: DType, rows: usize, columns: usize) -> Blocking {
        if dtype != DType::F32 && rows >= 256 && columns >= 256 {
            Blocking { side: 128, threads: 256 }
        } else {
            Blocking { side: 64, threads: 128 }
        }
    }

    /// Bytes of the ring of stages (`stage_bytes` in kernels/product.cuh).
    pub fn shared(&self, dtype: DType, left: Lines, right: Lines) -> usize {
        let depth = 64 / dtype.bytes();
        let stage = |lines| match lines {
            Lines::Reduced => self.side * pitch(dtype, depth),
            Lines::Across => depth * pitch(dtype, self.side),
        };
        STAGES * (stage(left) + stage(right))
    }
}

/// Whether lines of `stride` elements from `address` on begin at multiples of 16 bytes.
pub fn aligned(dtype: DType, address: Address, stride: usize) -> bool {
    address.is_aligned() && (stride * dtype.bytes()).is_multiple_of(16)
}

/// An operand: where, how its lines lie, elements from one to the next.
#[derive(Clone, Copy)]
pub struct Operand {
    pub address: Address,
    pub lines: Lines,
    pub stride: usize,
}

/// One product `[rows, depth] x [depth, columns]`; `sample_rows` rows belong to one sample.
pub struct Product {
    pub dtype: DType,
    pub left: Operand,
    pub right: Operand,
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub sample_rows: usize,
    /// Columns of each half of a GEGLU.
    pub half: usize,
}

impl Product {
    pub fn launch(&self, cx: &Cx, epilogue: Epilogue) -> Launch {
        let Product { dtype, left, right, .. } = self;
        if let Some(product) = self.hopper().filter(|_| cx.hopper) {
            return product.launch(epilogue);
        }
        let blocking = Blocking::choose(*dtype, self.sample_rows, self.columns);
        let name = match (left.lines, right.lines) {
            (Lines::Reduced, Lines::Reduced) => "rr",
            (Lines::Reduced, Lines::Across) => "ra",
            (Lines::Across, _) => "aa",
        };
        // In a GEGLU a chunk of columns must lie in one half.
        let whole = (self.half * dtype.bytes()).is_multiple_of(16) || right.lines == Lines::Reduced;
        let params = GemmParams {
            epilogue,
            left: left.address,
            right: right.address,
            rows: self.rows as i32,
            columns: self.columns as i32,
            depth: self.depth as i32,
            left_stride: left.stride as i32,
            right_stride: right.stride as i32,
            half: self.half as i32,
            left_aligned: i32::from(aligned(*dtype, left.address, left.stride)),
            right_aligned: i32::from(aligned(*dtype, right.address, right.stride) && whole),
        };
        let columns = if self.half > 0 { 2 * self.half.next_multiple_of(8) } else { self.columns };
        let grid = [columns.div_ceil(blocking.side), self.rows.div_ceil(blocking.side), 1];
        let shared = blocking.shared(*dtype, left.lines, right.lines);
        Launch::new(format!("gemm_{name}_{}_{dtype}", blocking.side), grid, blocking.threads, shared, params)
    }

    /// The same on Hopper, if it can be: an image of one row.
    fn hopper(&self) -> Option<HopperProduct> {
        let Product { dtype, left, right, rows, columns, depth, half, .. } = *self;
        let product = HopperProduct {
            dtype,
            x: left.address,
            extents: [depth, rows, 1, 1],
            output: [rows, 1],
            kernel: [1, 1],
            offset: [0, 0],
            direction: 1,
            right: HopperRight {
                w: right.address,
                lines: right.lines,
                columns,
                stride: right.stride,
                tap_stride: 0,
                half,
            },
        };
        (left.lines == Lines::Reduced && product.is_possible()).then_some(product)
    }
}

/// The rows of `[B, .., C]`: all, and of one sample.
pub fn rows(shape: &[usize]) -> (usize, usize) {
    let per_sample = shape[1..shape.len() - 1].iter().product();
    (shape[0] * per_sample, per_sample)
}

pub fn launches(op: &Gemm, cx: &Cx) -> Vec<Launch> {
    let y = cx.output(0);
    let [depth, columns] = cx.shape(op.w)[..] else { unreachable!("checked by infer") };
    let (rows, sample_rows) = rows(cx.shape(op.x));
    let geglu = op.activation == Activation::Geglu;
    let right = if cx.is_factor(op.w) {
        Operand { address: cx.address(op.w), lines: Lines::Reduced, stride: depth }
    } else {
        Operand { address: cx.address(op.w), lines: Lines::Across, stride: columns }
    };
    let product = Product {
        dtype: cx.dtype(op.x),
        left: Operand { address: cx.address(op.x), lines: Lines::Reduced, stride: depth },
        right,
        rows,
        columns,
        depth,
        sample_rows,
        half: if geglu { columns / 2 } else { 0 },
    };
    let epilogue = Epilogue::new(cx, y, op.residual);
    vec![product.launch(cx, Epilogue { bias: cx.optional(op.bias), activation: activation(op.activation), ..epilogue })]
}

pub fn backward(op: &GemmBackward, cx: &Cx) -> Vec<Launch> {
    match *op {
        GemmBackward::Input { d_y, w, residual } => {
            let [k, n] = cx.shape(w)[..] else { unreachable!("checked by infer") };
            let (rows, sample_rows) = rows(cx.shape(d_y));
            // Reduced over n: of what is held [N, K] a line is one n, of [K, N] one k.
            let right = if cx.is_factor(w) {
                Operand { address: cx.address(w), lines: Lines::Across, stride: k }
            } else {
                Operand { address: cx.address(w), lines: Lines::Reduced, stride: n }
            };
            let product = Product {
                dtype: cx.dtype(d_y),
                left: Operand { address: cx.address(d_y), lines: Lines::Reduced, stride: n },
                right,
                rows,
                columns: k,
                depth: n,
                sample_rows,
                half: 0,
            };
            vec![product.launch(cx, Epilogue::new(cx, cx.output(0), residual))]
        }
        GemmBackward::Weight { x, d_y } => {
            let (k, n) = (cx.width(x), cx.width(d_y));
            let across = |id, stride| Operand { address: cx.address(id), lines: Lines::Across, stride };
            let product = Product {
                dtype: cx.dtype(x),
                left: across(x, k),
                right: across(d_y, n),
                rows: k,
                columns: n,
                depth: rows(cx.shape(x)).0,
                sample_rows: k,
                half: 0,
            };
            vec![product.launch(cx, Epilogue::new(cx, cx.output(0), None))]
        }
    }
}
