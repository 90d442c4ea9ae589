//! The gradient of attention from its log-sum-exp: probabilities are made again tile by tile and never stored (FlashAttention-2).
//!
//! Contract: with `s = q kᵀ / √head_dim`, `p = e^(s - lse)` and `δ = Σ out ∘ d_out` per row and head: `d_v = pᵀ d_out`,
//! `d_s = p ∘ (d_out vᵀ - δ)`, `d_q = d_s k / √head_dim`, `d_k = d_sᵀ q / √head_dim`; every gradient dense, `heads·head_dim` wide;
//! accumulation in the element type, δ in f64. Five products for all three gradients, three for `d_q` alone, four without it.
//!
//! A task is one head of one sample and a run of key chunks. A chunk's keys and values are packed and stay in the second-level
//! cache while tiles of query rows pass, panel by panel of keys: `p` and `d_s` of a tile and panel stay in the first. They come
//! out of their products as right operands in panels, so `d_k` and `d_v` are accumulated transposed, `[head_dim, keys]` in
//! panels, from transposed tiles of `q` and `d_out`. A task owns `d_k` and `d_v` of its keys; its share of `d_q` is added to those
//! of the other runs, in order, at the end. Chunks and runs depend on heads and keys only: bits depend on neither batch nor threads.

use super::attention::DEPTH_BLOCK;
use super::context::{Cx, Outputs};
use super::microkernel::{Blocks, Dense, Target, multiply};
use super::pack::{Columns, Packed, Tiling};
use super::real::Float;
use super::reduce::dot;
use super::transpose::{ROWS_OF_TILE, Transpose};
use crate::program::{AttentionBackward, Program};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Most keys of a chunk: a query tile's transposes and reloads are spread over this many, and with head dimensions up to 80
/// all that belongs to a chunk fits half a MiB.
const CHUNK: usize = 512;
/// Tasks that a sample is cut into, where it has as many heads and chunks: enough for a processor with as many cores.
const TASKS: usize = 16;

/// The sizes of one attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    dim: usize,
    queries: usize,
    keys: usize,
    causal: bool,
    to_q: bool,
    to_kv: bool,
    tiling: Tiling,
    /// Keys of a chunk, and chunks of a run; the last ones may be shorter.
    chunk: usize,
    run: usize,
    /// Runs of a head.
    runs: usize,
}

impl Sizes {
    fn new(op: &AttentionBackward, program: &Program, tiling: Tiling) -> Sizes {
        let tokens = |s: &[usize]| s[1..s.len() - 1].iter().product::<usize>();
        let forward = &op.forward;
        let (q, k) = (program.shape(forward.q.value), program.shape(forward.k.value));
        let (keys, heads) = (tokens(k), forward.heads);
        let chunk = keys.div_ceil(keys.div_ceil(CHUNK));
        let chunks = keys.div_ceil(chunk);
        let run = chunks.div_ceil(TASKS.div_ceil(heads).min(chunks));
        Sizes {
            batch: q[0],
            heads,
            dim: forward.head_dim,
            queries: tokens(q),
            keys,
            causal: forward.causal,
            to_q: op.to_q,
            to_kv: op.to_kv,
            tiling,
            chunk,
            run,
            runs: chunks.div_ceil(run),
        }
    }

    /// How many keys a query sees. Causal: the last query sees the last key.
    fn visible(&self, query: usize) -> usize {
        if self.causal { query + 1 + self.keys - self.queries } else { self.keys }
    }

    /// The keys of a chunk.
    fn chunk(&self, index: usize) -> Range<usize> {
        index * self.chunk..((index + 1) * self.chunk).min(self.keys)
    }

    /// The head dimension with padding: rows of `d_q` then are whole vectors.
    fn width(&self) -> usize {
        Columns::new(self.dim, self.tiling).padded()
    }

    /// Elements of a matrix `[dim, keys of a chunk]` in panels.
    fn panels(&self) -> usize {
        self.dim * Columns::new(self.chunk, self.tiling).padded()
    }

    /// Elements of a task's share of `d_q`, of its `d_k` and `d_v` per chunk, and of both for the whole task.
    fn d_q(&self) -> usize {
        if self.to_q { self.queries * self.width() } else { 0 }
    }

    fn d_kv(&self) -> usize {
        if self.to_kv { 2 * self.panels() } else { 0 }
    }

    fn task(&self) -> usize {
        self.d_q() + self.run * self.d_kv()
    }
}

/// Elements of workspace: what the tasks accumulate.
pub fn workspace(op: &AttentionBackward, program: &Program, tiling: Tiling) -> usize {
    let sizes = Sizes::new(op, program, tiling);
    sizes.batch * sizes.heads * sizes.runs * sizes.task()
}

/// Elements of thread scratch, see [`Scratch`].
pub fn scratch(op: &AttentionBackward, program: &Program, tiling: Tiling) -> usize {
    let sizes = Sizes::new(op, program, tiling);
    let panel = tiling.widest * tiling.lanes;
    let chunk = 2 * sizes.panels() + sizes.chunk * sizes.width();
    chunk + ROWS_OF_TILE * (2 * sizes.dim + 2 * panel + sizes.chunk + 1)
}

pub fn run<T: Float>(cx: &Cx<'_, T>, op: &AttentionBackward, outputs: Outputs<'_, T>) {
    let Outputs { values: [a, b, c], workspace, .. } = outputs;
    // Outputs that are not asked for are empty.
    let (d_q, d_k, d_v) = if op.to_q { (a, b, c) } else { (c, a, b) };
    let sizes = Sizes::new(op, cx.program, cx.machine.tiling);
    let Sizes { heads, dim, queries, keys, runs, .. } = sizes;
    let (forward, all) = (&op.forward, heads * dim);
    let rows = |value, at, first, head| {
        let width = cx.shape(value)[cx.shape(value).len() - 1];
        Rows { values: &cx.value(value)[first * width + at + head * dim..], stride: width }
    };

    let tasks = &mut workspace[..sizes.batch * heads * runs * sizes.task()];
    tasks.par_chunks_mut(sizes.task()).enumerate().for_each(|(i, block)| {
        let (sample, head, run) = (i / runs / heads, i / runs % heads, i % runs);
        let (first, first_key) = (sample * queries, sample * keys);
        let task = Task {
            sizes,
            q: rows(forward.q.value, forward.q.at, first, head),
            k: rows(forward.k.value, forward.k.at, first_key, head),
            v: rows(forward.v.value, forward.v.at, first_key, head),
            out: rows(op.out, 0, first, head),
            d_out: rows(op.d_out, 0, first, head),
            lse: &cx.value(op.lse)[(sample * heads + head) * queries..][..queries],
            chunks: run * sizes.run..((run + 1) * sizes.run).min(keys.div_ceil(sizes.chunk)),
        };
        cx.scratch.with(|scratch| cx.machine.arch.dispatch(Run { task, block, scratch }));
    });

    let tasks = &*tasks;
    let scale = T::from_f64(1.0 / (dim as f64).sqrt());
    d_q.par_chunks_mut(all).enumerate().for_each(|(i, out)| {
        let (sample, query) = (i / queries, i % queries);
        for (head, out) in out.chunks_exact_mut(dim).enumerate() {
            let shares = tasks.chunks_exact(sizes.task()).skip((sample * heads + head) * runs).take(runs);
            out.fill(T::ZERO);
            for share in shares {
                out.iter_mut().zip(&share[query * sizes.width()..]).for_each(|(out, &share)| *out += share);
            }
            out.iter_mut().for_each(|out| *out *= scale);
        }
    });
    for (d, at, scale) in [(d_k, 0, scale), (d_v, sizes.panels(), T::ONE)] {
        d.par_chunks_mut(keys * all).enumerate().for_each(|(sample, d)| {
            d.par_chunks_mut(sizes.chunk * all).enumerate().for_each(|(chunk, d)| {
                let columns = Columns::new(sizes.chunk(chunk).len(), sizes.tiling);
                for head in 0..heads {
                    let task = (sample * heads + head) * runs + chunk / sizes.run;
                    let at = task * sizes.task() + sizes.d_q() + chunk % sizes.run * sizes.d_kv() + at;
                    for panel in (0..columns.panels).map(|index| columns.panel(index)) {
                        let source = &tasks[at + panel.start * dim..];
                        let stride = columns.padded_width(panel);
                        let out = &mut d[panel.start * all + head * dim..];
                        let panel = Transpose { source, stride, rows: dim, columns: panel.width, out, width: all };
                        cx.machine.arch.dispatch(panel);
                    }
                }
                d.iter_mut().for_each(|d| *d *= scale);
            });
        });
    }
}

/// Rows of one head, `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    values: &'a [T],
    stride: usize,
}

impl<'a, T: Float> Rows<'a, T> {
    fn from(&self, row: usize) -> &'a [T] {
        &self.values[row * self.stride..]
    }

    fn dense(&self, row: usize) -> Dense<'a, T> {
        Dense { values: self.from(row), stride: self.stride }
    }

    /// The transpose of some of its rows and `columns` columns, in rows of `width` values.
    #[inline(always)]
    fn transpose<S: Simd>(&self, simd: S, rows: Range<usize>, columns: usize, out: &mut [T], width: usize) {
        let (source, stride) = (self.from(rows.start), self.stride);
        simd.vectorize(Transpose { source, stride, rows: rows.len(), columns, out, width });
    }
}

/// What one head of one sample and a run of its key chunks reads.
struct Task<'a, T> {
    sizes: Sizes,
    q: Rows<'a, T>,
    k: Rows<'a, T>,
    v: Rows<'a, T>,
    out: Rows<'a, T>,
    d_out: Rows<'a, T>,
    lse: &'a [T],
    chunks: Range<usize>,
}

struct Run<'a, T> {
    task: Task<'a, T>,
    /// The share of `d_q`, then `d_k` and `d_v` of each chunk.
    block: &'a mut [T],
    scratch: &'a mut [T],
}

impl<T: Float> WithSimd for Run<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Run { task, block, scratch } = self;
        let sizes = &task.sizes;
        block.fill(T::ZERO);
        let (d_q, d_kv) = block.split_at_mut(sizes.d_q());
        let (chunk, tile) = scratch.split_at_mut(2 * sizes.panels() + sizes.chunk * sizes.width());
        let mut tile = TileScratch::new(sizes, tile);
        for (i, index) in task.chunks.clone().enumerate() {
            let chunk = Chunk::pack(simd, &task, sizes.chunk(index), chunk);
            let (d_k, d_v) = d_kv[i * sizes.d_kv()..][..sizes.d_kv()].split_at_mut(sizes.d_kv() / 2);
            for start in (0..sizes.queries).step_by(ROWS_OF_TILE) {
                let rows = start..(start + ROWS_OF_TILE).min(sizes.queries);
                if chunk.keys.start < sizes.visible(rows.end - 1) {
                    chunk.tile(simd, &task, rows, [d_q, d_k, d_v], &mut tile);
                }
            }
        }
    }
}

/// What a tile of query rows needs at a time.
struct TileScratch<'a, T> {
    /// Transposed rows of `q` and `d_out`: `[dim, ROWS_OF_TILE]`.
    qt: &'a mut [T],
    d_out_t: &'a mut [T],
    /// Probabilities and gradients of the scores, `[rows, keys of a panel]`.
    p: &'a mut [T],
    d_s: &'a mut [T],
    /// Gradients of the scores, `[rows, keys of the chunk]`.
    all_d_s: &'a mut [T],
    delta: &'a mut [T],
}

impl<'a, T: Float> TileScratch<'a, T> {
    fn new(sizes: &Sizes, scratch: &'a mut [T]) -> TileScratch<'a, T> {
        let panel = ROWS_OF_TILE * sizes.tiling.widest * sizes.tiling.lanes;
        let (qt, scratch) = scratch.split_at_mut(ROWS_OF_TILE * sizes.dim);
        let (d_out_t, scratch) = scratch.split_at_mut(ROWS_OF_TILE * sizes.dim);
        let (p, scratch) = scratch.split_at_mut(panel);
        let (d_s, scratch) = scratch.split_at_mut(panel);
        let (all_d_s, scratch) = scratch.split_at_mut(ROWS_OF_TILE * sizes.chunk);
        TileScratch { qt, d_out_t, p, d_s, all_d_s, delta: &mut scratch[..ROWS_OF_TILE] }
    }
}

/// A chunk of keys, packed.
struct Chunk<'a, T> {
    keys: Range<usize>,
    /// kᵀ (scaled) and vᵀ.
    kt: Packed<'a, T>,
    vt: Packed<'a, T>,
    k: Packed<'a, T>,
}

impl<'a, T: Float> Chunk<'a, T> {
    #[inline(always)]
    fn pack<S: Simd>(simd: S, task: &Task<'_, T>, keys: Range<usize>, scratch: &'a mut [T]) -> Chunk<'a, T> {
        let Sizes { dim, tiling, to_q, .. } = task.sizes;
        let (kt, scratch) = scratch.split_at_mut(task.sizes.panels());
        let (vt, k) = scratch.split_at_mut(task.sizes.panels());
        let (columns, dims) = (Columns::new(keys.len(), tiling), Columns::new(dim, tiling));
        let scale = T::from_f64(1.0 / (dim as f64).sqrt());
        for (data, rows, scale) in [(&mut *kt, task.k, scale), (&mut *vt, task.v, T::ONE)] {
            columns.fill_here(dim, data, |panel, out| {
                let first = keys.start + panel.start;
                out.fill(T::ZERO);
                rows.transpose(simd, first..first + panel.width, dim, out, columns.padded_width(panel));
                out.iter_mut().for_each(|out| *out *= scale);
            });
        }
        if to_q {
            let source = task.k.from(keys.start);
            dims.fill_here(keys.len(), k, |panel, out| dims.pack_panel(panel, source, task.k.stride, out));
        }
        let kt = Packed { columns, k: dim, data: kt };
        let vt = Packed { columns, k: dim, data: vt };
        // The same panels, padding counted as columns.
        let k = Packed { columns: Columns::new(dims.padded(), tiling), k: keys.len(), data: k };
        Chunk { keys, kt, vt, k }
    }

    /// Adds what a tile of query rows and these keys give to each gradient.
    #[inline(always)]
    fn tile<S: Simd>(
        &self,
        simd: S,
        task: &Task<'_, T>,
        rows: Range<usize>,
        [d_q, d_k, d_v]: [&mut [T]; 3],
        scratch: &mut TileScratch<'_, T>,
    ) {
        let Sizes { dim, to_q, to_kv, chunk, .. } = task.sizes;
        let TileScratch { qt, d_out_t, p, d_s, all_d_s, delta } = scratch;
        let count = rows.len();
        for (row, delta) in rows.clone().zip(delta.iter_mut()) {
            *delta = T::from_f64(dot(&task.out.from(row)[..dim], &task.d_out.from(row)[..dim]));
        }
        if to_kv {
            task.q.transpose(simd, rows.clone(), dim, qt, ROWS_OF_TILE);
            task.d_out.transpose(simd, rows.clone(), dim, d_out_t, ROWS_OF_TILE);
        }
        let (q, d_out) = (task.q.dense(rows.start), task.d_out.dense(rows.start));
        let depth = Blocks::new(1, dim, DEPTH_BLOCK);
        let mut seen = 0;
        for (index, panel) in (0..self.kt.columns.panels).map(|index| (index, self.kt.columns.panel(index))) {
            let first = self.keys.start + panel.start;
            if first >= task.sizes.visible(rows.end - 1) {
                break;
            }
            seen = panel.start + panel.width;
            let width = self.kt.columns.padded_width(panel);
            let tile = |values| Target { values, stride: width, add: false };
            multiply(simd, &q, count, depth, self.kt, index..index + 1, tile(p));
            multiply(simd, &d_out, count, depth, self.vt, index..index + 1, tile(d_s));
            let tiles = p.chunks_exact_mut(width).zip(d_s.chunks_exact_mut(width));
            for (i, ((p, d_s), row)) in tiles.zip(rows.clone()).enumerate() {
                let visible = task.sizes.visible(row).saturating_sub(first).min(panel.width);
                differentiate::<T, S>(p, d_s, visible, task.lse[row], delta[i]);
                if to_q {
                    all_d_s[i * chunk + panel.start..][..panel.width].copy_from_slice(&d_s[..panel.width]);
                }
            }
            if to_kv {
                let blocks = Blocks::new(1, count, ROWS_OF_TILE);
                for (left, right, d) in [(&*d_out_t, &*p, &mut *d_v), (&*qt, &*d_s, &mut *d_k)] {
                    let left = Dense { values: &left[..], stride: ROWS_OF_TILE };
                    let columns = Columns::new(panel.width, task.sizes.tiling);
                    let right = Packed { columns, k: count, data: right };
                    let out = Target { values: &mut d[panel.start * dim..], stride: width, add: true };
                    multiply(simd, &left, dim, blocks, right, 0..1, out);
                }
            }
        }
        if to_q {
            let d_s = Dense { values: &all_d_s[..], stride: chunk };
            let width = self.k.columns.n;
            let out = Target { values: &mut d_q[rows.start * width..], stride: width, add: true };
            multiply(simd, &d_s, count, Blocks::new(1, seen, seen), self.k, 0..self.k.columns.panels, out);
        }
    }
}

/// Scores to probabilities and their gradients to the scores' gradients, in one row of a tile; keys from `visible` on are hidden.
#[inline(always)]
fn differentiate<T: Float, S: Simd>(p: &mut [T], d_s: &mut [T], visible: usize, lse: T, delta: T) {
    for (p, d_s) in p[..visible].iter_mut().zip(&mut d_s[..visible]) {
        *p = (*p - lse).exp::<S>();
        *d_s = *p * (*d_s - delta);
    }
    p[visible..].fill(T::ZERO);
    d_s[visible..].fill(T::ZERO);
}
