//! Launches of attention. Contracts: kernels/attention_forward.cu and kernels/attention_backward.cu.

use super::cx::Cx;
use super::gemm::{aligned, pitch};
use super::kernels::constants::{
    BACKWARD_HALF, BACKWARD_SINGLE, DELTA_ROWS, FORWARD_HALF, FORWARD_SINGLE, FORWARD_SM90, SM90_ATTENTION_THREADS,
    SM90_QUERIES, SM90_SLOTS, STREAMED_COLUMNS, STREAMED_OTHER, STREAMED_OWN, STREAMED_THREADS,
};
use super::launch::{Address, Divisor, Launch, TensorMap};
use super::shape::Hopper;
use crate::program::{Attention, AttentionBackward, Cols, DType, Op, Program, ValueId};
use crate::{Error, Result};
use bytemuck::{Pod, Zeroable};

/// The largest head dimension that a kernel is made for; others are padded to the next one.
const LARGEST: usize = FORWARD_HALF[FORWARD_HALF.len() - 1][0];

/// The row of a table for a head dimension: the first that is as large.
fn row_of<const N: usize>(table: &[[usize; N]], head_dim: usize) -> Option<[usize; N]> {
    table.iter().copied().find(|row| row[0] >= head_dim)
}

/// Columns of rows as a kernel takes them. Matches `Columns` in kernels/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Columns {
    from: Address,
    stride: i32,
    aligned: i32,
}

impl Columns {
    fn new(cx: &Cx, cols: Cols, head_dim: usize) -> Columns {
        let (from, stride, dtype) = (cx.columns(cols), cx.width(cols.value), cx.dtype(cols.value));
        let whole = (head_dim * dtype.bytes()).is_multiple_of(16);
        Columns { from, stride: stride as i32, aligned: i32::from(aligned(dtype, from, stride) && whole) }
    }
}

/// Matches `AttentionParams` in kernels/attention_forward.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AttentionParams {
    q: Columns,
    k: Columns,
    v: Columns,
    out: Columns,
    lse: Address,
    head_dim: i32,
    queries: i32,
    keys: i32,
    ahead: i32,
    scale: f32,
    unused: i32,
}
const _: () = assert!(size_of::<AttentionParams>() == 96);

/// Refuses heads that no kernel is made for.
pub fn check(program: &Program) -> Result<()> {
    for node in &program.nodes {
        let Op::Attention(op) = &node.op else { continue };
        if op.head_dim > LARGEST {
            let what = format!("attention heads of {} dimensions; kernels have at most {LARGEST}", op.head_dim);
            return Err(Error::Program { program: program.name.clone(), what, at: node.at.to_string() });
        }
    }
    Ok(())
}

/// What of an op a launch follows from.
struct Sizes {
    dtype: DType,
    batch: usize,
    heads: usize,
    head_dim: usize,
    queries: usize,
    keys: usize,
    /// Query `i` sees keys `0 ..= i + ahead`.
    ahead: usize,
}

impl Sizes {
    fn new(op: &Attention, program: &Program) -> Sizes {
        let tokens = |id: ValueId| program.shape(id)[1..program.shape(id).len() - 1].iter().product::<usize>();
        let (queries, keys) = (tokens(op.q.value), tokens(op.k.value));
        Sizes {
            dtype: program.value(op.q.value).dtype,
            batch: program.shape(op.q.value)[0],
            heads: op.heads,
            head_dim: op.head_dim,
            queries,
            keys,
            ahead: if op.causal { keys - queries } else { keys },
        }
    }

    fn half(&self) -> bool {
        self.dtype != DType::F32
    }

    /// 1 / √head_dim.
    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Bytes of a tile.
    fn tile(&self, lines: usize, elements: usize) -> usize {
        lines * pitch(self.dtype, elements)
    }

    /// A block for each tile of `rows`, head and sample.
    fn grid(&self, count: usize, rows: usize) -> [usize; 3] {
        [count.div_ceil(rows), self.heads, self.batch]
    }
}

/// Tiles of the forward.
struct ForwardTiles {
    /// The head dimension of the kernel.
    dim: usize,
    rows: usize,
    threads: usize,
    keys: usize,
    slots: usize,
}

impl ForwardTiles {
    fn new(sizes: &Sizes) -> ForwardTiles {
        let table = if sizes.half() { FORWARD_HALF } else { FORWARD_SINGLE };
        let [dim, down, across, keys, slots] = row_of(&table, sizes.head_dim).expect("checked when it was loaded");
        ForwardTiles { dim, rows: 16 * down, threads: 32 * down * across, keys, slots }
    }

    fn shared(&self, sizes: &Sizes) -> usize {
        let probabilities = if sizes.half() { 0 } else { sizes.tile(self.rows, self.keys) };
        sizes.tile(self.rows, self.dim) + self.slots * sizes.tile(self.keys, self.dim) + probabilities
    }
}

/// Matches what is behind the tensor maps of `Sm90AttentionParams` in kernels/sm90_attention.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Sm90AttentionParams {
    out: Address,
    lse: Address,
    out_stride: i32,
    head_dim: i32,
    queries: i32,
    keys: i32,
    scale: f32,
    unused: [i32; 23],
}
const _: () = assert!(size_of::<Sm90AttentionParams>() + 3 * TensorMap::BYTES == 512);

/// Tiles of the forward on Hopper.
struct Sm90Tiles {
    dim: usize,
    keys: usize,
}

impl Sm90Tiles {
    /// None for heads and masks that the kernels do not have.
    fn new(op: &Attention, sizes: &Sizes) -> Option<Sm90Tiles> {
        let [dim, keys] = row_of(&FORWARD_SM90, op.head_dim)?;
        let possible = sizes.half() && !op.causal && op.head_dim.is_multiple_of(8);
        possible.then_some(Sm90Tiles { dim, keys })
    }

    fn shared(&self) -> usize {
        let boxes = self.dim.div_ceil(TensorMap::LINE);
        let (queries, others) = (SM90_QUERIES, 2 * SM90_SLOTS * self.keys);
        // Queries, slots of keys and of values; a barrier for the queries and two for each slot.
        boxes * TensorMap::LINE_BYTES * (queries + others) + 8 * (1 + 2 * 2 * SM90_SLOTS)
    }
}

/// A head's columns of rows, a box of `rows` of them at a time.
fn tensor_map(cx: &Cx, cols: Cols, sizes: &Sizes, tokens: usize, rows: usize) -> TensorMap {
    let (width, head_dim) = (cx.width(cols.value), sizes.head_dim);
    TensorMap {
        dtype: sizes.dtype,
        address: cx.columns(cols),
        extents: [head_dim, sizes.heads, tokens, sizes.batch],
        strides: [head_dim, width, tokens * width],
        window: [TensorMap::LINE, 1, rows, 1],
    }
}

/// On Hopper, if its kernels can: rows and heads begin at multiples of 16 bytes.
fn hopper(op: &Attention, cx: &Cx, sizes: &Sizes) -> Option<Launch> {
    let tiles = Sm90Tiles::new(op, sizes).filter(|_| matches!(cx.hopper, Hopper::Auto | Hopper::Always))?;
    let columns = [op.q, op.k, op.v].map(|cols| Columns::new(cx, cols, op.head_dim));
    if columns.iter().any(|columns| columns.aligned == 0) {
        return None;
    }
    let params = Sm90AttentionParams {
        out: cx.address(cx.output(0)),
        lse: cx.address(cx.output(1)),
        out_stride: cx.width(cx.output(0)) as i32,
        head_dim: op.head_dim as i32,
        queries: sizes.queries as i32,
        keys: sizes.keys as i32,
        scale: (sizes.scale() * std::f64::consts::LOG2_E) as f32,
        unused: [0; 23],
    };
    let map = |cols, tokens, rows| tensor_map(cx, cols, sizes, tokens, rows);
    let maps = vec![
        map(op.q, sizes.queries, SM90_QUERIES),
        map(op.k, sizes.keys, tiles.keys),
        map(op.v, sizes.keys, tiles.keys),
    ];
    let name = format!("sm90_attention_{}_{}", tiles.dim, sizes.dtype);
    let grid = sizes.grid(sizes.queries, SM90_QUERIES);
    Some(Launch::new(name, grid, SM90_ATTENTION_THREADS, tiles.shared(), params).with_maps(maps))
}

pub fn launches(op: &Attention, cx: &Cx) -> Vec<Launch> {
    let sizes = Sizes::new(op, cx.program);
    if let Some(launch) = hopper(op, cx, &sizes) {
        return vec![launch];
    }
    let tiles = ForwardTiles::new(&sizes);
    let columns = |cols| Columns::new(cx, cols, op.head_dim);
    let params = AttentionParams {
        q: columns(op.q),
        k: columns(op.k),
        v: columns(op.v),
        out: columns(cx.output(0).into()),
        lse: cx.address(cx.output(1)),
        head_dim: op.head_dim as i32,
        queries: sizes.queries as i32,
        keys: sizes.keys as i32,
        ahead: sizes.ahead as i32,
        scale: (sizes.scale() * std::f64::consts::LOG2_E) as f32,
        unused: 0,
    };
    let name = format!("attention_{}_{}", tiles.dim, sizes.dtype);
    let grid = sizes.grid(sizes.queries, tiles.rows);
    vec![Launch::new(name, grid, tiles.threads, tiles.shared(&sizes), params)]
}

/// Matches `DeltaParams` in kernels/attention_backward.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DeltaParams {
    out: Address,
    d_out: Address,
    delta: Address,
    heads: Divisor,
    head_dim: i32,
    queries: i32,
    aligned: i32,
}
const _: () = assert!(size_of::<DeltaParams>() == 48);

/// Matches `BackwardParams` in kernels/attention_backward.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BackwardParams {
    q: Columns,
    k: Columns,
    v: Columns,
    d_out: Columns,
    d_first: Columns,
    d_second: Columns,
    lse: Address,
    delta: Address,
    head_dim: i32,
    queries: i32,
    keys: i32,
    ahead: i32,
    scale: f32,
    unused: i32,
}
const _: () = assert!(size_of::<BackwardParams>() == 136);

/// Tiles of the backward.
struct BackwardTiles {
    /// The head dimension of the kernel.
    dim: usize,
    own: usize,
    threads: usize,
    shared: usize,
}

impl BackwardTiles {
    /// For `outputs` gradients: of keys and values, or of queries.
    fn new(sizes: &Sizes, outputs: usize) -> BackwardTiles {
        let half = sizes.half();
        let row = if half { row_of(&BACKWARD_HALF, sizes.head_dim) } else { row_of(&BACKWARD_SINGLE, sizes.head_dim) };
        let Some([dim, own, other, across]) = row else {
            let (own, other) = (STREAMED_OWN, STREAMED_OTHER);
            let shared = 2 * sizes.tile(other, STREAMED_COLUMNS) + outputs * sizes.tile(own, other);
            return BackwardTiles { dim: LARGEST, own, threads: STREAMED_THREADS, shared };
        };
        let scores = if half && across == 1 { 0 } else { outputs * sizes.tile(own, other) };
        let shared = 2 * sizes.tile(own, dim) + 4 * sizes.tile(other, dim) + scores;
        BackwardTiles { dim, own, threads: own / 16 * 32 * across, shared }
    }
}

/// Bytes of delta.
pub fn backward_workspace(op: &AttentionBackward, program: &Program) -> usize {
    let Sizes { batch, heads, queries, .. } = Sizes::new(&op.forward, program);
    batch * heads * queries * size_of::<f32>()
}

pub fn backward(op: &AttentionBackward, cx: &Cx) -> Vec<Launch> {
    let AttentionBackward { forward, out, lse, d_out, to_q, to_kv } = op;
    let sizes = Sizes::new(forward, cx.program);
    let Sizes { dtype, batch, heads, head_dim, queries, keys, .. } = sizes;
    let columns = |cols| Columns::new(cx, cols, head_dim);
    let delta = DeltaParams {
        out: cx.address(*out),
        d_out: cx.address(*d_out),
        delta: cx.workspace,
        heads: Divisor::new(heads),
        head_dim: head_dim as i32,
        queries: queries as i32,
        aligned: columns((*out).into()).aligned & columns((*d_out).into()).aligned,
    };
    let grid = [(queries * heads).div_ceil(DELTA_ROWS), batch, 1];
    let mut launches = vec![Launch::new(format!("attention_delta_{dtype}"), grid, 8 * DELTA_ROWS, 0, delta)];
    let params = BackwardParams {
        q: columns(forward.q),
        k: columns(forward.k),
        v: columns(forward.v),
        d_out: columns((*d_out).into()),
        d_first: Columns::default(),
        d_second: Columns::default(),
        lse: cx.address(*lse),
        delta: cx.workspace,
        head_dim: head_dim as i32,
        queries: queries as i32,
        keys: keys as i32,
        ahead: sizes.ahead as i32,
        scale: sizes.scale() as f32,
        unused: 0,
    };
    let mut launch = |name, outputs, count, params| {
        let BackwardTiles { dim, own, threads, shared } = BackwardTiles::new(&sizes, outputs);
        let kernel = format!("{name}_{dim}_{dtype}");
        launches.push(Launch::new(kernel, sizes.grid(count, own), threads, shared, params));
    };
    let output = |index| columns(cx.output(index).into());
    let of_k = usize::from(*to_q);
    if *to_kv {
        let params = BackwardParams { d_first: output(of_k), d_second: output(of_k + 1), ..params };
        launch("attention_to_kv", 2, keys, params);
    }
    if *to_q {
        launch("attention_to_q", 1, queries, BackwardParams { d_first: output(0), ..params });
    }
    launches
}
