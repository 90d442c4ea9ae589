//! Tiled attention with an online softmax: `out = softmax(q kᵀ / √head_dim) v` per head, and the log-sum-exp of each row.
//!
//! Contract: `q`, `k`, `v` are columns of `[B, .., C]` values, `out [B, .., heads·head_dim]`, `lse [B, heads, Tq]`; accumulation
//! in the element type. Per (sample, head), `kᵀ` (scaled) and `v` are packed into the workspace. A task is a tile of query rows
//! of one sample, all heads: its rows of `out` are contiguous. It walks over key blocks with a running maximum `m` and sum `l`;
//! scores never leave the cache. Key blocks depend on the number of keys only and a row never sees another row, so bits depend
//! neither on the batch nor on the tile height.

use super::context::{Cx, Machine, Outputs};
use super::microkernel::{Blocks, Dense, Target, multiply};
use super::pack::{Columns, Packed, Tiling};
use super::real::Float;
use super::reduce::{LANES, largest};
use crate::program::{Attention, Program};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Most query rows of a tile; a multiple of every register tile's height.
const MOST_ROWS: usize = 48;
/// Key panels of a block: with AVX-512 512 keys, whose scores for a tile take a tenth of the second-level cache.
const PANELS_PER_BLOCK: usize = 8;
/// Longest stretch of head dimension in one pass of the score product.
pub const DEPTH_BLOCK: usize = 256;

/// The sizes of one attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    dim: usize,
    queries: usize,
    keys: usize,
    causal: bool,
    /// Columns of kᵀ and of v.
    key_columns: Columns,
    value_columns: Columns,
    /// Query rows of a tile.
    rows: usize,
}

impl Sizes {
    fn new(op: &Attention, program: &Program, tiling: Tiling, threads: usize) -> Sizes {
        let tokens = |s: &[usize]| s[1..s.len() - 1].iter().product::<usize>();
        let (q, k) = (program.shape(op.q.value), program.shape(op.k.value));
        let (batch, queries, keys) = (q[0], tokens(q), tokens(k));
        // Two tiles per thread where there are enough rows.
        let share = (batch * queries).div_ceil(2 * threads).next_multiple_of(12).min(MOST_ROWS);
        Sizes {
            batch,
            heads: op.heads,
            dim: op.head_dim,
            queries,
            keys,
            causal: op.causal,
            key_columns: Columns::new(keys, tiling),
            value_columns: Columns::new(op.head_dim, tiling),
            rows: share,
        }
    }

    /// How many keys a query sees. Causal: the last query sees the last key.
    fn visible(&self, query: usize) -> usize {
        if self.causal { query + 1 + self.keys - self.queries } else { self.keys }
    }

    /// Elements of packed kᵀ and packed v of one head.
    fn packed(&self) -> (usize, usize) {
        (self.dim * self.key_columns.padded(), self.keys * self.value_columns.padded())
    }

    fn tiles(&self) -> usize {
        self.queries.div_ceil(self.rows)
    }

    /// Elements of log-sum-exp of one tile.
    fn tile_lse(&self) -> usize {
        self.heads * self.rows
    }

    fn block_width(&self) -> usize {
        PANELS_PER_BLOCK * self.key_columns.widest()
    }
}

/// Elements of workspace: packed keys and values, and the log-sum-exp in tile order.
pub fn workspace(op: &Attention, program: &Program, machine: &Machine) -> usize {
    let sizes = Sizes::new(op, program, machine.tiling, machine.threads);
    let (keys, values) = sizes.packed();
    sizes.batch * (sizes.heads * (keys + values) + sizes.tiles() * sizes.tile_lse())
}

/// Elements of thread scratch: scores, output tile, running maximum and sum.
pub fn scratch(op: &Attention, program: &Program, tiling: Tiling) -> usize {
    let sizes = Sizes::new(op, program, tiling, 1);
    MOST_ROWS * (sizes.block_width() + sizes.dim + 2)
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &Attention, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, lse, _], workspace, .. } = outputs;
    let sizes = Sizes::new(op, cx.program, cx.machine.tiling, cx.machine.threads);
    let Sizes { heads, dim, queries, keys, .. } = sizes;
    let width = |value| cx.shape(value)[cx.shape(value).len() - 1];
    let (q, k, v) = (cx.value(op.q.value), cx.value(op.k.value), cx.value(op.v.value));
    let (q_width, k_width, v_width) = (width(op.q.value), width(op.k.value), width(op.v.value));
    let (key_size, value_size) = sizes.packed();
    let (packed, tile_lse) = workspace.split_at_mut(sizes.batch * heads * (key_size + value_size));

    let scale = T::from_f64(1.0 / (dim as f64).sqrt());
    packed.par_chunks_mut(key_size + value_size).enumerate().for_each(|(i, packed)| {
        let (sample, head) = (i / heads, i % heads);
        let (kt, values) = packed.split_at_mut(key_size);
        let k = &k[sample * keys * k_width + op.k.at + head * dim..];
        sizes.key_columns.pack_transposed(k, k_width, dim, scale, kt);
        let v = &v[sample * keys * v_width + op.v.at + head * dim..];
        sizes.value_columns.pack(v, v_width, keys, values);
    });

    let packed = &*packed;
    let samples = out.par_chunks_mut(queries * heads * dim);
    let tile_lse = &mut tile_lse[..sizes.batch * sizes.tiles() * sizes.tile_lse()];
    let lses = tile_lse.par_chunks_mut(sizes.tiles() * sizes.tile_lse());
    samples.zip(lses).zip(lse.par_chunks_mut(heads * queries)).enumerate().for_each(|(sample, ((out, tiles), lse))| {
        let q = &q[sample * queries * q_width + op.q.at..];
        let packed = &packed[sample * heads * (key_size + value_size)..];
        let chunks = out.par_chunks_mut(sizes.rows * heads * dim).zip(tiles.par_chunks_mut(sizes.tile_lse()));
        chunks.enumerate().for_each(|(tile, (out, lse))| {
            let rows = tile * sizes.rows..((tile + 1) * sizes.rows).min(queries);
            cx.scratch.with(|scratch| {
                cx.machine.arch.dispatch(Tile { sizes, q, q_width, packed, rows, out, lse, scratch });
            });
        });
        for (head, lse) in lse.chunks_exact_mut(queries).enumerate() {
            for (lse, tile) in lse.chunks_mut(sizes.rows).zip(tiles.chunks_exact(sizes.tile_lse())) {
                lse.copy_from_slice(&tile[head * sizes.rows..][..lse.len()]);
            }
        }
    });
}

/// All heads of one tile of query rows.
struct Tile<'a, T> {
    sizes: Sizes,
    q: &'a [T],
    q_width: usize,
    packed: &'a [T],
    rows: Range<usize>,
    out: &'a mut [T],
    lse: &'a mut [T],
    scratch: &'a mut [T],
}

impl<T: Float> WithSimd for Tile<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sizes { heads, dim, rows: height, .. } = self.sizes;
        let (keys, values) = self.sizes.packed();
        let count = self.rows.len();
        let (scores, scratch) = self.scratch.split_at_mut(height * self.sizes.block_width());
        let (sums, scratch) = scratch.split_at_mut(height * dim);
        let (highest, total) = scratch.split_at_mut(height);
        for (head, packed) in self.packed.chunks_exact(keys + values).take(heads).enumerate() {
            let q = &self.q[self.rows.start * self.q_width + head * dim..];
            let (kt, v) = packed.split_at(keys);
            sums.fill(T::ZERO);
            highest.fill(T::LOWEST);
            total.fill(T::ZERO);
            let state = State { scores, sums, highest, total };
            over_keys(simd, &self.sizes, Dense { values: q, stride: self.q_width }, self.rows.clone(), kt, v, state);
            for row in 0..count {
                let scale = T::ONE / total[row];
                let out = &mut self.out[(row * heads + head) * dim..][..dim];
                for (out, &sum) in out.iter_mut().zip(&sums[row * dim..]) {
                    *out = sum * scale;
                }
                self.lse[head * height + row] = highest[row] + T::from_f64(total[row].to_f64().ln());
            }
        }
    }
}

/// What a tile carries from key block to key block.
struct State<'a, T> {
    scores: &'a mut [T],
    /// Σ e^(s - m) v per row.
    sums: &'a mut [T],
    /// m, the largest score so far.
    highest: &'a mut [T],
    /// l = Σ e^(s - m).
    total: &'a mut [T],
}

#[inline(always)]
fn over_keys<T: Float, S: Simd>(
    simd: S,
    sizes: &Sizes,
    q: Dense<'_, T>,
    rows: Range<usize>,
    kt: &[T],
    v: &[T],
    state: State<'_, T>,
) {
    let State { scores, sums, highest, total } = state;
    let (dim, width) = (sizes.dim, sizes.block_width());
    let kt = Packed { columns: sizes.key_columns, k: dim, data: kt };
    let v = Packed { columns: sizes.value_columns, k: sizes.keys, data: v };
    for first in (0..kt.columns.panels).step_by(PANELS_PER_BLOCK) {
        let panels = first..(first + PANELS_PER_BLOCK).min(kt.columns.panels);
        let last = kt.columns.panel(panels.end - 1);
        let start = kt.columns.panel(first).start;
        let keys = last.start + last.width - start;
        if start >= sizes.visible(rows.end - 1) {
            break;
        }
        let out = Target { values: &mut *scores, stride: width, add: false };
        multiply(simd, &q, rows.len(), Blocks::new(1, dim, DEPTH_BLOCK), kt, panels, out);
        for (row, query) in rows.clone().enumerate() {
            let visible = sizes.visible(query).saturating_sub(start).min(keys);
            let (scores, hidden) = scores[row * width..][..keys].split_at_mut(visible);
            hidden.fill(T::ZERO);
            if scores.is_empty() {
                continue;
            }
            let top = largest(scores).greater(highest[row]);
            let fade = (highest[row] - top).exp::<S>();
            total[row] = total[row] * fade + exponentials::<T, S>(scores, top);
            if first > 0 {
                sums[row * dim..][..dim].iter_mut().for_each(|sum| *sum *= fade);
            }
            highest[row] = top;
        }
        let weights = Dense { values: &*scores, stride: width };
        let out = Target { values: &mut *sums, stride: dim, add: true };
        multiply(simd, &weights, rows.len(), Blocks::new(1, keys, keys).at(start), v, 0..v.columns.panels, out);
    }
}

/// Replaces values by e^(value - top) and returns their sum.
#[inline(always)]
fn exponentials<T: Float, S: Simd>(values: &mut [T], top: T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *value = (*value - top).exp::<S>();
            *lane += *value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *value = (*value - top).exp::<S>();
        *lane += *value;
    }
    lanes.iter().fold(T::ZERO, |sum, &lane| sum + lane)
}
