//! Launches of elementwise ops. Contract: kernels/elementwise.cu.

use super::cx::{Cx, activation};
use super::kernels::constants::{self, MOST_CHANNELS, MOST_PARTS};
use super::launch::{Address, Divisor, Launch};
use crate::program::{Activation, Cols, DType, Elementwise, Scalar, ValueId};
use bytemuck::{Pod, Zeroable};

pub use super::kernels::constants::PLAIN_THREADS as THREADS;

/// Bytes a thread takes at once.
const VECTOR: usize = 16;

/// Matches `MapParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MapParams {
    x: Address,
    y: Address,
    count: i64,
    function: i32,
    aligned: i32,
    a: f32,
    b: f32,
}
const _: () = assert!(size_of::<MapParams>() == 40);

/// Matches `BinaryParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BinaryParams {
    a: Address,
    b: Address,
    y: Address,
    count: i64,
    function: i32,
    aligned: i32,
    low: f32,
    high: f32,
}
const _: () = assert!(size_of::<BinaryParams>() == 48);

/// Matches `CastParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CastParams {
    x: Address,
    y: Address,
    count: i64,
    aligned: i64,
}
const _: () = assert!(size_of::<CastParams>() == 32);

/// Matches `FillParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FillParams {
    y: Address,
    count: i64,
    value: f32,
    aligned: i32,
}
const _: () = assert!(size_of::<FillParams>() == 24);

/// Matches `ScaleParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ScaleParams {
    x: Address,
    by: Address,
    y: Address,
    row: i64,
    pieces: Pieces,
    unused: i32,
}
const _: () = assert!(size_of::<ScaleParams>() == 56);

/// Matches `ChannelAffineParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ChannelAffineParams {
    x: Address,
    y: Address,
    width: i64,
    pieces: Pieces,
    first: i32,
    scale: [f32; MOST_CHANNELS],
    shift: [f32; MOST_CHANNELS],
}
const _: () = assert!(size_of::<ChannelAffineParams>() == 176);

/// Matches `GegluParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GegluParams {
    x: Address,
    d_y: Address,
    y: Address,
    half: i64,
    pieces: Pieces,
    unused: i32,
}
const _: () = assert!(size_of::<GegluParams>() == 56);

/// Rows of pieces, one for each thread: 16 bytes, or single elements. Matches `Pieces` in kernels/vectorized.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Pieces {
    per_row: Divisor,
    count: u32,
    aligned: i32,
}
const _: () = assert!(size_of::<Pieces>() == 20);

impl Pieces {
    /// Of dense rows, which start at the addresses.
    pub fn new(dtype: DType, rows: usize, width: usize, addresses: &[Address]) -> Pieces {
        let whole = (width * dtype.bytes()).is_multiple_of(VECTOR);
        Pieces::cut(dtype, rows, width, whole && addresses.iter().all(|address| address.is_aligned()))
    }

    /// Of rows of single elements.
    pub fn singles(rows: usize, width: usize) -> Pieces {
        Pieces::cut(DType::F32, rows, width, false)
    }

    fn cut(dtype: DType, rows: usize, width: usize, aligned: bool) -> Pieces {
        let per_row = if aligned { width * dtype.bytes() / VECTOR } else { width };
        let count = u32::try_from(rows * per_row).unwrap_or(u32::MAX);
        Pieces { per_row: Divisor::new(per_row), count, aligned: i32::from(aligned) }
    }

    pub fn grid(&self) -> [usize; 3] {
        grid_of(self.count as usize)
    }
}

/// Blocks with a thread for each of `count`. Kernels count below 2^31: from there on it is a grid that [`Launch::check`] refuses.
pub fn grid_of(count: usize) -> [usize; 3] {
    [if count < 1 << 31 { count.div_ceil(THREADS) } else { usize::MAX }, 1, 1]
}

/// A function's number; activations have their own.
fn scalar(f: Scalar) -> i32 {
    let number = match f {
        Scalar::Sqrt => constants::SQRT,
        Scalar::Square => constants::SQUARE,
        Scalar::Ln => constants::LN,
        Scalar::Exp => constants::EXP,
        Scalar::Reciprocal => constants::RECIPROCAL,
        Scalar::Spherical => constants::SPHERICAL,
    };
    number as i32
}

const AFFINE: i32 = constants::AFFINE as i32;
const CLAMP: i32 = constants::CLAMP as i32;
const ADD: i32 = constants::ADD as i32;
const MUL: i32 = constants::MUL as i32;

pub fn launches(op: &Elementwise, cx: &Cx) -> Vec<Launch> {
    use Elementwise::*;
    let y = cx.output(0);
    let (to, rows_of) = (cx.address(y), |id: ValueId| cx.len(id) / cx.width(id));
    // Elements of an entry of the first dimension.
    let entry = |id: ValueId| cx.len(id) / cx.shape(id)[0];
    // Tokens are columns of samples.
    let token = |id: ValueId| entry(id) / cx.shape(id)[1];
    let sum = |rows, width, parts: &[Part]| strided_sum(cx.dtype(y), to, rows, width, parts);
    match *op {
        Activate { x, activation: a } => vec![map(cx, x, activation(a), [0.0; 2])],
        Map { x, f } => vec![map(cx, x, scalar(f), [0.0; 2])],
        Affine { x, scale, shift } => vec![map(cx, x, AFFINE, [scale, shift])],
        Clamp { x, low, high } => vec![map(cx, x, CLAMP, [low, high])],
        Detach { x } => copy(cx, x, to),
        Cast { x, to: dtype } => {
            let from = cx.dtype(x);
            if from == dtype {
                return copy(cx, x, to);
            }
            let (x, count) = (cx.address(x), cx.len(x));
            let params = CastParams { x, y: to, count: count as i64, aligned: aligned(&[x, to]).into() };
            vec![flat(format!("cast_{from}_{dtype}"), count, from.bytes().max(dtype.bytes()), params)]
        }
        ActivateBackward { x, d_y, activation: a } => vec![binary(cx, d_y, x, activation(a), [0.0; 2])],
        MapBackward { x, d_y, f } => vec![binary(cx, d_y, x, scalar(f), [0.0; 2])],
        ClampBackward { x, d_y, low, high } => vec![binary(cx, d_y, x, CLAMP, [low, high])],
        Add { a, b } => vec![binary(cx, a, b, ADD, [0.0; 2])],
        Mul { a, b } => vec![binary(cx, a, b, MUL, [0.0; 2])],
        Scale { x, by } => {
            let (dtype, samples, row) = (cx.dtype(x), cx.shape(x)[0], entry(x));
            let (x, by) = (cx.address(x), cx.address(by));
            let pieces = Pieces::new(dtype, samples, row, &[x, to]);
            let params = ScaleParams { x, by, y: to, row: row as i64, pieces, unused: 0 };
            vec![Launch::new(format!("scale_{dtype}"), pieces.grid(), THREADS, 0, params)]
        }
        ChannelAffine { x, ref scale, ref shift } => channel_affine(cx, x, scale, shift),
        Geglu { x } => vec![geglu(cx, "geglu", x, Address::NULL, cx.width(y))],
        GegluBackward { x, d_y } => vec![geglu(cx, "geglu_backward", x, cx.address(d_y), cx.width(d_y))],
        Constant { ref shape, dtype, value } => vec![fill(dtype, to, shape.iter().product(), value)],
        OuterAdd { a, b } => {
            let (s, samples, width) = (cx.shape(a)[0], cx.shape(b)[0], cx.width(a));
            let a = Part::new(cx.address(a), width).every(samples, width, 0);
            let b = Part::new(cx.address(b), width).every(samples, 0, width);
            sum(s * samples, width, &[a, b])
        }
        OuterAddBackward { d_y } => {
            let [s, samples, width] = *cx.shape(d_y) else { unreachable!("checked by infer") };
            let part = Part::new(cx.address(d_y), width);
            let d_b = cx.address(cx.output(1));
            let mut launches = sum(s, width, &[part.every(1, samples * width, 0).times(samples, width)]);
            launches.extend(strided_sum(cx.dtype(y), d_b, samples, width, &[part.times(s, samples * width)]));
            launches
        }
        Spread { x, ref shape } => {
            let width = cx.width(x);
            let rows = shape.iter().product::<usize>() / width;
            let each = rows / (cx.len(x) / width);
            sum(rows, width, &[Part::new(cx.address(x), width).every(each, width, 0)])
        }
        Concat { a, b } => {
            let [left, right] = [a, b].map(|id| Part::new(cx.address(id), cx.width(id)));
            sum(rows_of(a), cx.width(y), &[left, right.at(cx.width(a))])
        }
        ConcatTokens { a, b } => {
            let [left, right] = [a, b].map(|id| Part::new(cx.address(id), entry(id)));
            sum(cx.shape(y)[0], entry(y), &[left, right.at(entry(a))])
        }
        Columns { x, len } => {
            let part = Part::new(cx.columns(x), len).every(1, cx.width(x.value), 0);
            sum(rows_of(y), len, &[part])
        }
        Scatter { ref parts, width } => {
            let part = |part: &Cols| Part::new(cx.address(part.value), cx.width(part.value)).at(part.at);
            let parts: Vec<Part> = parts.iter().map(part).collect();
            sum(rows_of(y), width, &parts)
        }
        Repeat { x, times } => {
            let (batch, row) = (cx.shape(x)[0], entry(x));
            sum(times * batch, row, &[Part::new(cx.address(x), row).every(batch, 0, row)])
        }
        SumRepeats { x, times } => {
            let (batch, row) = (cx.shape(y)[0], entry(x));
            sum(batch, row, &[Part::new(cx.address(x), row).times(times, batch * row)])
        }
        Slice { x, start, len } => {
            let row = entry(x);
            let from = cx.address(x).offset(start * row * cx.dtype(x).bytes());
            sum(len, row, &[Part::new(from, row)])
        }
        Unslice { x, start, rows } => {
            let row = entry(x);
            sum(rows, row, &[Part::new(cx.address(x), row).every(rows, 0, row).rows(start, cx.shape(x)[0])])
        }
        TokenRows { x, start, .. } => {
            let from = cx.address(x).offset(start * token(x) * cx.dtype(x).bytes());
            sum(cx.shape(y)[0], entry(y), &[Part::new(from, entry(y)).every(1, entry(x), 0)])
        }
        PadTokens { x, start, .. } => {
            sum(cx.shape(y)[0], entry(y), &[Part::new(cx.address(x), entry(x)).at(start * token(x))])
        }
    }
}

/// Whether 16 bytes can be read or written at once at all of them.
fn aligned(addresses: &[Address]) -> i32 {
    i32::from(addresses.iter().all(|address| address.is_aligned()))
}

/// A launch over `count` elements, `bytes` each, a vector for each thread.
pub fn flat<P: Pod>(kernel: String, count: usize, bytes: usize, params: P) -> Launch {
    Launch::new(kernel, [count.div_ceil(THREADS * VECTOR / bytes), 1, 1], THREADS, 0, params)
}

fn map(cx: &Cx, x: ValueId, function: i32, [a, b]: [f64; 2]) -> Launch {
    let (dtype, count) = (cx.dtype(x), cx.len(x));
    let (x, y) = (cx.address(x), cx.address(cx.output(0)));
    let params = MapParams { x, y, count: count as i64, function, aligned: aligned(&[x, y]), a: a as f32, b: b as f32 };
    flat(format!("map_{dtype}"), count, dtype.bytes(), params)
}

fn binary(cx: &Cx, a: ValueId, b: ValueId, function: i32, [low, high]: [f64; 2]) -> Launch {
    let (dtype, count) = (cx.dtype(a), cx.len(a));
    let (a, b, y) = (cx.address(a), cx.address(b), cx.address(cx.output(0)));
    let (low, high, aligned) = (low as f32, high as f32, aligned(&[a, b, y]));
    let params = BinaryParams { a, b, y, count: count as i64, function, aligned, low, high };
    flat(format!("binary_{dtype}"), count, dtype.bytes(), params)
}

/// Nothing where the op runs in place.
fn copy(cx: &Cx, x: ValueId, y: Address) -> Vec<Launch> {
    if cx.address(x) == y { vec![] } else { vec![map(cx, x, activation(Activation::None), [0.0; 2])] }
}

pub fn fill(dtype: DType, y: Address, count: usize, value: f64) -> Launch {
    let params = FillParams { y, count: count as i64, value: value as f32, aligned: aligned(&[y]) };
    flat(format!("fill_{dtype}"), count, dtype.bytes(), params)
}

/// A launch for every [`MOST_CHANNELS`] channels.
fn channel_affine(cx: &Cx, x: ValueId, scale: &[f64], shift: &[f64]) -> Vec<Launch> {
    let (dtype, width, rows) = (cx.dtype(x), scale.len(), cx.len(x) / scale.len());
    let (x, y) = (cx.address(x), cx.address(cx.output(0)));
    let constants = scale.chunks(MOST_CHANNELS).zip(shift.chunks(MOST_CHANNELS)).enumerate();
    let launch = |(i, (scale, shift)): (usize, (&[f64], &[f64]))| {
        let pieces = Pieces::singles(rows, scale.len());
        let numbers = |from: &[f64]| std::array::from_fn(|c| from.get(c).map_or(0.0, |&x| x as f32));
        let params = ChannelAffineParams {
            x,
            y,
            width: width as i64,
            pieces,
            first: (i * MOST_CHANNELS) as i32,
            scale: numbers(scale),
            shift: numbers(shift),
        };
        Launch::new(format!("channel_affine_{dtype}"), pieces.grid(), THREADS, 0, params)
    };
    constants.map(launch).collect()
}

fn geglu(cx: &Cx, kernel: &str, x: ValueId, d_y: Address, half: usize) -> Launch {
    let (dtype, rows) = (cx.dtype(x), cx.len(x) / (2 * half));
    let (x, y) = (cx.address(x), cx.address(cx.output(0)));
    let pieces = Pieces::new(dtype, rows, half, &[x, d_y, y]);
    let params = GegluParams { x, d_y, y, half: half as i64, pieces, unused: 0 };
    Launch::new(format!("{kernel}_{dtype}"), pieces.grid(), THREADS, 0, params)
}

/// What a strided sum adds up: for row `r` of the output, `times` stretches `step` apart from
/// `x + (r / by) outer + (r % by - first) inner` on, if `r % by` lies in `first .. first + count`. Matches `Part` in
/// kernels/elementwise.cu; lengths are in elements.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Part {
    x: Address,
    outer: i64,
    inner: i64,
    step: i64,
    by: Divisor,
    first: u32,
    count: u32,
    at: u32,
    width: u32,
    times: i32,
}
const _: () = assert!(size_of::<Part>() == 64);

impl Part {
    /// Dense rows, in the output's first columns.
    pub fn new(x: Address, width: usize) -> Part {
        let (row, by) = (width as i64, Divisor::new(1));
        Part { x, outer: row, inner: 0, step: 0, by, first: 0, count: 1, at: 0, width: width as u32, times: 1 }
    }

    /// In the output's columns from `at` on.
    pub fn at(self, at: usize) -> Part {
        Part { at: at as u32, ..self }
    }

    /// Every `by` rows of the output `outer` further, and from one to the next of them `inner`.
    pub fn every(self, by: usize, outer: usize, inner: usize) -> Part {
        Part { by: Divisor::new(by), outer: outer as i64, inner: inner as i64, count: by as u32, ..self }
    }

    /// Only for rows `first .. first + count` of every `by`.
    pub fn rows(self, first: usize, count: usize) -> Part {
        Part { first: first as u32, count: count as u32, ..self }
    }

    /// The sum of so many, `step` apart.
    pub fn times(self, times: usize, step: usize) -> Part {
        Part { times: times as i32, step: step as i64, ..self }
    }

    fn is_aligned(&self, dtype: DType) -> bool {
        let lengths = [self.outer, self.inner, self.step, self.at.into(), self.width.into()];
        self.x.is_aligned() && lengths.iter().all(|length| (*length as usize * dtype.bytes()).is_multiple_of(VECTOR))
    }
}

/// Matches `StridedSumParams` in kernels/elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct StridedSumParams {
    parts: [Part; MOST_PARTS],
    y: Address,
    width: i64,
    pieces: Pieces,
    count: i32,
}
const _: () = assert!(size_of::<StridedSumParams>() == 552);

/// `y [rows, width]`, each element the sum of the parts that cover it, in their order. More parts than a launch takes are added
/// by further launches to what the ones before them made.
pub fn strided_sum(dtype: DType, y: Address, rows: usize, width: usize, parts: &[Part]) -> Vec<Launch> {
    let aligned = Part::new(y, width).is_aligned(dtype) && parts.iter().all(|part| part.is_aligned(dtype));
    let pieces = Pieces::cut(dtype, rows, width, aligned);
    let launch = |parts: &[Part]| {
        let mut params: StridedSumParams = Zeroable::zeroed();
        params.parts[..parts.len()].copy_from_slice(parts);
        (params.y, params.width, params.pieces, params.count) = (y, width as i64, pieces, parts.len() as i32);
        Launch::new(format!("strided_sum_{dtype}"), pieces.grid(), THREADS, 0, params)
    };
    let (first, others) = parts.split_at(parts.len().min(MOST_PARTS));
    let further = others.chunks(MOST_PARTS - 1).map(|parts| launch(&[&[Part::new(y, width)], parts].concat()));
    [launch(first)].into_iter().chain(further).collect()
}
