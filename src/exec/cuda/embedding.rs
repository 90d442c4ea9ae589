//! Launches of embeddings. Contract: kernels/embedding.cu.

use super::cx::Cx;
use super::elementwise::{Part, Pieces, THREADS, fill, strided_sum};
use super::launch::{Address, Divisor, Launch};
use crate::program::{Embedding, ValueId};
use bytemuck::{Pod, Zeroable};

/// Matches `TokensParams` in kernels/embedding.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TokensParams {
    ids: Address,
    table: Address,
    extra: Address,
    positions: Address,
    y: Address,
    width: i64,
    length: Divisor,
    pieces: Pieces,
    rows: i32,
    unused: i32,
}
const _: () = assert!(size_of::<TokensParams>() == 88);

/// Matches `TokensBackwardParams` in kernels/embedding.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TokensBackwardParams {
    ids: Address,
    d_y: Address,
    y: Address,
    positions: i32,
    width: i32,
    first: i32,
    rows: i32,
}
const _: () = assert!(size_of::<TokensBackwardParams>() == 40);

/// Matches `MixParams` in kernels/embedding.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MixParams {
    weights: Address,
    ids: Address,
    table: Address,
    d_y: Address,
    y: Address,
    width: i64,
    pieces: Pieces,
    choices: i32,
    dots: i32,
    unused: i32,
}
const _: () = assert!(size_of::<MixParams>() == 80);

/// Matches `SinusoidalParams` in kernels/embedding.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SinusoidalParams {
    x: Address,
    d_y: Address,
    y: Address,
    log_ratio: f64,
    half: Divisor,
    numbers: i32,
    count: i32,
    cosines_first: i32,
}
const _: () = assert!(size_of::<SinusoidalParams>() == 56);

/// Matches `PoolParams` in kernels/embedding.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PoolParams {
    x: Address,
    at: Address,
    y: Address,
    width: i64,
    pieces: Pieces,
    rows: Divisor,
}
const _: () = assert!(size_of::<PoolParams>() == 64);

/// The longest period of the sinusoids (Ho et al. 2020).
const PERIOD: f64 = 10_000.0;

/// Warps of a block.
const WARPS: usize = THREADS / 32;

pub fn launches(op: &Embedding, cx: &Cx) -> Vec<Launch> {
    use Embedding::*;
    let y = cx.output(0);
    let (dtype, to) = (cx.dtype(y), cx.address(y));
    let bytes = |elements: usize| elements * dtype.bytes();
    match *op {
        Tokens { ids, table, extra, positions } => {
            let (width, rows) = (cx.width(table), cx.shape(table)[0]);
            let ([from, table, positions], extra) =
                ([ids, table, positions].map(|id| cx.address(id)), cx.optional(extra));
            let pieces = Pieces::new(dtype, cx.len(ids), width, &[table, extra, positions, to]);
            let params = TokensParams {
                ids: from,
                table,
                extra,
                positions,
                y: to,
                width: width as i64,
                length: Divisor::new(cx.shape(ids)[1]),
                pieces,
                rows: rows as i32,
                unused: 0,
            };
            vec![Launch::new(format!("tokens_{dtype}"), pieces.grid(), THREADS, 0, params)]
        }
        TokensBackward { ids, d_y, first, rows } => {
            let (positions, width) = (cx.len(ids), cx.width(y));
            let params = TokensBackwardParams {
                ids: cx.address(ids),
                d_y: cx.address(d_y),
                y: to,
                positions: positions as i32,
                width: width as i32,
                first: first as i32,
                rows: rows as i32,
            };
            let grid = [positions, width.div_ceil(THREADS), 1];
            let add = Launch::new(format!("tokens_backward_{dtype}"), grid, THREADS, 0, params);
            vec![fill(dtype, to, rows * width, 0.0), add]
        }
        PositionsBackward { d_y, rows } => {
            let [samples, length, width] = *cx.shape(d_y) else { unreachable!("checked by infer") };
            let part = Part::new(cx.address(d_y), width).every(rows, 0, width).rows(0, length);
            strided_sum(dtype, to, rows, width, &[part.times(samples, length * width)])
        }
        Mix { weights, ids, table } => {
            let params = mix(cx, weights, ids, table, to);
            vec![Launch::new(format!("mix_{dtype}"), params.pieces.grid(), THREADS, 0, params)]
        }
        MixBackward { ids, table, d_y } => {
            let params = MixParams { weights: Address::NULL, ..mix(cx, d_y, ids, table, to) };
            let grid = [cx.len(ids).div_ceil(WARPS), 1, 1];
            vec![Launch::new(format!("mix_backward_{dtype}"), grid, THREADS, 0, params)]
        }
        Sinusoidal { x, dim, flip_sin_to_cos, freq_shift } => {
            let params = sinusoidal(cx, x, dim, flip_sin_to_cos, freq_shift);
            let grid = [(params.count as usize).div_ceil(THREADS), 1, 1];
            vec![Launch::new(format!("sinusoidal_{dtype}"), grid, THREADS, 0, params)]
        }
        SinusoidalBackward { x, d_y, dim, flip_sin_to_cos, freq_shift } => {
            let params = sinusoidal(cx, x, dim, flip_sin_to_cos, freq_shift);
            let params = SinusoidalParams { d_y: cx.address(d_y), ..params };
            let grid = [cx.len(x).div_ceil(WARPS), 1, 1];
            vec![Launch::new(format!("sinusoidal_backward_{dtype}"), grid, THREADS, 0, params)]
        }
        Pool { x, at } => vec![pool(cx, "pool", x, at, cx.shape(y)[0], cx.shape(x)[1])],
        PoolBackward { d_y, at, rows } => vec![pool(cx, "pool_backward", d_y, at, cx.shape(y)[0], rows)],
        Select { x, at } => vec![pool(cx, "pool", x, at, 1, cx.shape(x)[0])],
        SelectBackward { d_y, at, ref shape } => vec![pool(cx, "pool_backward", d_y, at, 1, shape[0])],
        Patches { x, class, positions } => {
            let (width, sample) = (cx.len(class), cx.len(positions));
            let class = Part::new(cx.address(class), width).every(1, 0, 0);
            let patches = Part::new(cx.address(x), sample - width).at(width);
            let positions = Part::new(cx.address(positions), sample).every(1, 0, 0);
            strided_sum(dtype, to, cx.shape(x)[0], sample, &[class, patches, positions])
        }
        PatchesBackward { d_y, .. } => {
            let [samples, length, width] = *cx.shape(d_y) else { unreachable!("checked by infer") };
            let sample = (length - 1) * width;
            let part = Part::new(cx.address(d_y).offset(bytes(width)), sample).every(1, length * width, 0);
            strided_sum(dtype, to, samples, sample, &[part])
        }
        Row { x, row } => {
            let [samples, length, width] = *cx.shape(x) else { unreachable!("checked by infer") };
            let part = Part::new(cx.address(x).offset(bytes(row * width)), width).every(1, length * width, 0);
            strided_sum(dtype, to, samples, width, &[part])
        }
        RowBackward { d_y, row, rows } => {
            let width = cx.width(d_y);
            strided_sum(dtype, to, cx.shape(d_y)[0], rows * width, &[Part::new(cx.address(d_y), width).at(row * width)])
        }
    }
}

/// `other` are the weights, or in the backward `d_y`.
fn mix(cx: &Cx, other: ValueId, ids: ValueId, table: ValueId, y: Address) -> MixParams {
    let (dtype, width, [mixtures, choices]) = (cx.dtype(table), cx.width(table), [0, 1].map(|dim| cx.shape(ids)[dim]));
    let [other, ids, table] = [other, ids, table].map(|id| cx.address(id));
    MixParams {
        weights: other,
        ids,
        table,
        d_y: other,
        y,
        width: width as i64,
        pieces: Pieces::new(dtype, mixtures, width, &[table, y]),
        choices: choices as i32,
        dots: (mixtures * choices) as i32,
        unused: 0,
    }
}

fn sinusoidal(cx: &Cx, x: ValueId, dim: usize, cosines_first: bool, shift: f64) -> SinusoidalParams {
    let (numbers, half) = (cx.len(x), dim / 2);
    SinusoidalParams {
        x: cx.address(x),
        d_y: Address::NULL,
        y: cx.address(cx.output(0)),
        log_ratio: -PERIOD.ln() / (half as f64 - shift),
        half: Divisor::new(half),
        numbers: numbers as i32,
        count: (numbers * half) as i32,
        cosines_first: cosines_first.into(),
    }
}

/// One of `rows` rows of each sample, or its gradient.
fn pool(cx: &Cx, kernel: &str, x: ValueId, at: ValueId, samples: usize, rows: usize) -> Launch {
    let (y, dtype) = (cx.output(0), cx.dtype(x));
    let width = cx.len(x).max(cx.len(y)) / (samples * rows);
    let (from, to) = (cx.address(x), cx.address(y));
    let pieces = Pieces::new(dtype, cx.len(y) / width, width, &[from, to]);
    let (at, width, rows) = (cx.address(at), width as i64, Divisor::new(rows));
    let params = PoolParams { x: from, at, y: to, width, pieces, rows };
    Launch::new(format!("{kernel}_{dtype}"), pieces.grid(), THREADS, 0, params)
}
