//! Launches of sums: of columns, of products, of a layer norm's affine gradients. Contracts: kernels/reduce.cu,
//! kernels/layer_norm.cu.

use super::cx::Cx;
use super::kernels::constants::{COLUMN_THREADS, PLAIN_THREADS};
use super::launch::{Address, Launch};
use crate::program::{DType, Over, Program, ValueId};
use bytemuck::{Pod, Zeroable};

/// Blocks per set to aim at.
const BLOCKS: usize = 256;
/// Vectors of a thread at least, where there are several chunks.
const VECTORS: usize = 4;

/// Matches `ColumnSum` in kernels/rows.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ColumnSum {
    rows: i32,
    columns: i32,
    lanes: i32,
    side: i32,
    length: i32,
    aligned: i32,
}
const _: () = assert!(size_of::<ColumnSum>() == 24);

/// Matches `DotParams` in kernels/reduce.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DotParams {
    a: Address,
    b: Address,
    y: Address,
    size: i64,
    length: i64,
    aligned: i32,
    unused: i32,
}
const _: () = assert!(size_of::<DotParams>() == 48);

/// Matches `ColumnSumsParams` in kernels/reduce.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ColumnSumsParams {
    shape: ColumnSum,
    x: Address,
    y: Address,
}
const _: () = assert!(size_of::<ColumnSumsParams>() == 40);

/// Matches `LayerNormAffineParams` in kernels/layer_norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LayerNormAffineParams {
    shape: ColumnSum,
    x: Address,
    d_y: Address,
    mean: Address,
    rstd: Address,
    sums: Address,
}
const _: () = assert!(size_of::<LayerNormAffineParams>() == 64);

impl ColumnSum {
    /// A set of rows in at most so many chunks. Also how many blocks there are across and how many chunks.
    fn cut(rows: usize, columns: usize, dtype: DType, most: usize) -> (ColumnSum, [usize; 2]) {
        let vector = 16 / dtype.bytes();
        let lanes = columns.div_ceil(vector).min(8);
        let (side, across) = (COLUMN_THREADS / lanes, columns.div_ceil(lanes * vector));
        let steps = rows.div_ceil(side);
        let chunks = BLOCKS.div_ceil(across).min(steps.div_ceil(VECTORS)).min(most);
        let length = side * steps.div_ceil(chunks);
        let shape = ColumnSum {
            rows: rows as i32,
            columns: columns as i32,
            lanes: lanes as i32,
            side: side as i32,
            length: length as i32,
            aligned: 0,
        };
        (shape, [across, rows.div_ceil(length)])
    }

    /// With vectors at `addresses` where that can be.
    fn at(self, dtype: DType, addresses: &[Address]) -> ColumnSum {
        let whole = (self.columns as usize * dtype.bytes()).is_multiple_of(16);
        ColumnSum { aligned: i32::from(whole && addresses.iter().all(|address| address.is_aligned())), ..self }
    }
}

/// Adds up `sets` of `[rows, columns]` at `x`, in one chunk.
fn total(x: Address, y: Address, [sets, rows, columns]: [usize; 3], from: DType, to: DType) -> Launch {
    let (shape, [across, chunks]) = ColumnSum::cut(rows, columns, from, 1);
    let params = ColumnSumsParams { shape: shape.at(from, &[x]), x, y };
    Launch::new(format!("column_sums_{from}_{to}"), [across, chunks, sets], COLUMN_THREADS, 0, params)
}

/// Bytes of the partial sums of several chunks.
fn partial_bytes(chunks: usize, numbers: usize) -> usize {
    if chunks > 1 { chunks * numbers * size_of::<f32>() } else { 0 }
}

/// Sets, rows and columns.
fn summed(shape: &[usize], over: Over) -> [usize; 3] {
    let sets = match over {
        Over::Middle => shape[0],
        Over::Samples | Over::Rows => 1,
    };
    let columns = shape[shape.len() - 1];
    [sets, shape[..shape.len() - 1].iter().product::<usize>() / sets, columns]
}

pub fn sum_workspace(program: &Program, x: ValueId, over: Over) -> usize {
    let [sets, rows, columns] = summed(program.shape(x), over);
    let (_, [_, chunks]) = ColumnSum::cut(rows, columns, program.value(x).dtype, usize::MAX);
    partial_bytes(chunks, sets * columns)
}

pub fn sum(cx: &Cx, x: ValueId, over: Over) -> Vec<Launch> {
    let ([sets, rows, columns], dtype) = (summed(cx.shape(x), over), cx.dtype(x));
    let (x, y) = (cx.address(x), cx.address(cx.output(0)));
    let (shape, [across, chunks]) = ColumnSum::cut(rows, columns, dtype, usize::MAX);
    if chunks == 1 {
        return vec![total(x, y, [sets, rows, columns], dtype, dtype)];
    }
    let params = ColumnSumsParams { shape: shape.at(dtype, &[x]), x, y: cx.workspace };
    let accumulator = dtype.accumulator();
    vec![
        Launch::new(format!("column_sums_{dtype}_{accumulator}"), [across, chunks, sets], COLUMN_THREADS, 0, params),
        total(cx.workspace, y, [sets, chunks, columns], accumulator, dtype),
    ]
}

/// Elements of a sample, of a chunk, and chunks.
fn multiplied(shape: &[usize], dtype: DType) -> [usize; 3] {
    let (size, step) = (shape[1..].iter().product::<usize>(), PLAIN_THREADS * 16 / dtype.bytes());
    let steps = size.div_ceil(step);
    let length = step * steps.div_ceil(steps.div_ceil(VECTORS).min(BLOCKS));
    [size, length, size.div_ceil(length)]
}

pub fn dot_workspace(program: &Program, a: ValueId) -> usize {
    let [_, _, chunks] = multiplied(program.shape(a), program.value(a).dtype);
    partial_bytes(chunks, program.shape(a)[0])
}

pub fn dot(cx: &Cx, a: ValueId, b: ValueId) -> Vec<Launch> {
    let (samples, dtype) = (cx.shape(a)[0], cx.dtype(a));
    let [size, length, chunks] = multiplied(cx.shape(a), dtype);
    let [a, b, out] = [a, b, cx.output(0)].map(|id| cx.address(id));
    let aligned = (size * dtype.bytes()).is_multiple_of(16) && a.is_aligned() && b.is_aligned();
    let y = if chunks > 1 { cx.workspace } else { out };
    let (size, length, aligned) = (size as i64, length as i64, i32::from(aligned));
    let params = DotParams { a, b, y, size, length, aligned, unused: 0 };
    let mut launches = vec![Launch::new(format!("dot_{dtype}"), [chunks, samples, 1], PLAIN_THREADS, 0, params)];
    if chunks > 1 {
        launches.push(total(y, out, [samples, chunks, 1], dtype.accumulator(), dtype.accumulator()));
    }
    launches
}

/// Rows, columns.
fn normalised(shape: &[usize]) -> [usize; 2] {
    let (width, rows) = (shape[shape.len() - 1], &shape[..shape.len() - 1]);
    [rows.iter().product(), width]
}

pub fn affine_workspace(program: &Program, x: ValueId) -> usize {
    let [rows, width] = normalised(program.shape(x));
    let (_, [_, chunks]) = ColumnSum::cut(rows, width, program.value(x).dtype, usize::MAX);
    2 * chunks * width * size_of::<f32>()
}

/// Of `x`, `d_y`, `mean` and `rstd`.
pub fn affine(cx: &Cx, [x, d_y, mean, rstd]: [ValueId; 4]) -> Vec<Launch> {
    let ([rows, width], dtype, sums) = (normalised(cx.shape(x)), cx.dtype(x), cx.workspace);
    let (shape, [across, chunks]) = ColumnSum::cut(rows, width, dtype, usize::MAX);
    let [x, d_y, mean, rstd, d_gamma, d_beta] =
        [x, d_y, mean, rstd, cx.output(0), cx.output(1)].map(|id| cx.address(id));
    let params = LayerNormAffineParams { shape: shape.at(dtype, &[x, d_y]), x, d_y, mean, rstd, sums };
    let of = |which: usize| sums.offset(which * chunks * width * size_of::<f32>());
    let total = |which, y| total(of(which), y, [1, chunks, width], dtype.accumulator(), dtype);
    vec![
        Launch::new(format!("layer_norm_backward_affine_{dtype}"), [across, chunks, 1], COLUMN_THREADS, 0, params),
        total(0, d_gamma),
        total(1, d_beta),
    ]
}
