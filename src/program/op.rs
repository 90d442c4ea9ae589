//! The ops: eight families, already fused as the kernels are, with their inputs, what may be overwritten, and their FLOPs.

use super::{Program, ValueId};

/// Columns `at ..` of a value's last dimension; how a fused projection is read without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cols {
    pub value: ValueId,
    pub at: usize,
}

impl From<ValueId> for Cols {
    fn from(value: ValueId) -> Cols {
        Cols { value, at: 0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None,
    Silu,
    /// Exact: `x Φ(x)`.
    Gelu,
    /// `x σ(1.702 x)` (CLIP-L).
    QuickGelu,
    /// The projection is `[K, 2H]`; the output `[.., H]` is `a * gelu(g)` with `a` the first and `g` the last `H` columns.
    Geglu,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Gemm(Gemm),
    Conv2d(Conv2d),
    Attention(Attention),
    Norm(Norm),
    Elementwise(Elementwise),
    Resample(Resample),
    Embedding(Embedding),
    Update(Update),
}

/// `activation(x w + bias) + residual`; `x [.., K]`, `w [K, N]`, `bias [N]`, `residual` like the output `[.., N]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    pub x: ValueId,
    pub w: ValueId,
    pub bias: Option<ValueId>,
    pub residual: Option<ValueId>,
    pub activation: Activation,
}

/// `conv(x, w) + bias + shift + residual`; `x [B, H, W, I]`, `w [kh, kw, I, O]`, `bias [O]`, `shift` columns `[B or 1, ..O..]`
/// (the time embedding), `residual` like the output `[B, Ho, Wo, O]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2d {
    pub x: ValueId,
    pub w: ValueId,
    pub bias: Option<ValueId>,
    pub shift: Option<Cols>,
    pub residual: Option<ValueId>,
    pub stride: usize,
    /// Zero padding: top, left, bottom, right.
    pub padding: [usize; 4],
}

/// `softmax(q kᵀ / √head_dim) v` per head. `q` columns `[B, .., heads·head_dim]`, `k` and `v` columns `[B, .., heads·head_dim]`.
/// Outputs: `out` shaped like `q`'s rows `[.., heads·head_dim]`, and the log-sum-exp of the scaled scores `[B, heads, Tq]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub q: Cols,
    pub k: Cols,
    pub v: Cols,
    pub heads: usize,
    pub head_dim: usize,
    pub causal: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Norm {
    /// Over each of `groups` channel groups of `x [B, .., C]`, biased variance, then SiLU if asked.
    /// Outputs: `y`, `mean [B, groups]`, `rstd [B, groups]`.
    Group { x: ValueId, gamma: ValueId, beta: ValueId, groups: usize, eps: f64, silu: bool },
    /// Over the last dimension. Outputs: `y`, `mean [..]`, `rstd [..]`.
    Layer { x: ValueId, gamma: ValueId, beta: ValueId, eps: f64 },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Elementwise {
    Activate {
        x: ValueId,
        activation: Activation,
    },
    Add {
        a: ValueId,
        b: ValueId,
    },
    /// `a [S, C]`, `b [B, C]` → `[S, B, C]`, `a_s + b_b`.
    OuterAdd {
        a: ValueId,
        b: ValueId,
    },
    /// `x * scale + shift`, constants.
    Affine {
        x: ValueId,
        scale: f64,
        shift: f64,
    },
    /// Along the last dimension.
    Concat {
        a: ValueId,
        b: ValueId,
    },
    /// The whole batch again, `times` over: `[B, ..]` → `[times·B, ..]`.
    Repeat {
        x: ValueId,
        times: usize,
    },
    /// Rows `start .. start + len` of the first dimension.
    Slice {
        x: ValueId,
        start: usize,
        len: usize,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Resample {
    /// Nearest-neighbour doubling of `[B, H, W, C]`, cut to `height` × `width` (`2n` or `2n - 1` each, where a skip has an odd size).
    Nearest2x { x: ValueId, height: usize, width: usize },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Embedding {
    /// `table[ids[b, t]] + positions[t]`; `ids [B, T]` i32, `table [V, C]`, `positions [P ≥ T, C]` → `[B, T, C]`.
    Tokens { ids: ValueId, table: ValueId, positions: ValueId },
    /// Sinusoidal embedding of every number, period 10000 (Ho et al. 2020; `get_timestep_embedding` of diffusers):
    /// `x [N]` → `[N, dim]`, `x [B, n]` → `[B, n·dim]`.
    Sinusoidal { x: ValueId, dim: usize, flip_sin_to_cos: bool, freq_shift: f64 },
    /// Row `at[b]` of each sample: `x [B, T, C]`, `at [B]` i32 → `[B, C]` (pooling at the end-of-text token).
    Pool { x: ValueId, at: ValueId },
    /// Entry `at[0]` of the first dimension (this step's time projections): `x [S, C]`, `at [1]` i32 → `[1, C]`; `x [S, B, C]` → `[B, C]`.
    Select { x: ValueId, at: ValueId },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// `Σ coefficients[i] · terms[i]`, terms of one shape, `coefficients [n]` f32 read from memory: guidance, every sampler step.
    /// A zero coefficient leaves its term out even where the term is not finite.
    Combine { terms: Vec<ValueId>, coefficients: ValueId },
}

impl Op {
    pub fn family(&self) -> &'static str {
        match self {
            Op::Gemm(_) => "gemm",
            Op::Conv2d(_) => "conv2d",
            Op::Attention(_) => "attention",
            Op::Norm(_) => "norm",
            Op::Elementwise(_) => "elementwise",
            Op::Resample(_) => "resample",
            Op::Embedding(_) => "embedding",
            Op::Update(_) => "update",
        }
    }

    /// Every value the op reads, in a fixed order; a value may appear twice.
    pub fn inputs(&self) -> Vec<ValueId> {
        let some = |ids: &[Option<ValueId>]| ids.iter().flatten().copied().collect::<Vec<_>>();
        match self {
            Op::Gemm(g) => some(&[Some(g.x), Some(g.w), g.bias, g.residual]),
            Op::Conv2d(c) => some(&[Some(c.x), Some(c.w), c.bias, c.shift.map(|s| s.value), c.residual]),
            Op::Attention(a) => vec![a.q.value, a.k.value, a.v.value],
            Op::Norm(Norm::Group { x, gamma, beta, .. }) => vec![*x, *gamma, *beta],
            Op::Norm(Norm::Layer { x, gamma, beta, .. }) => vec![*x, *gamma, *beta],
            Op::Elementwise(e) => match e {
                Elementwise::Activate { x, .. } => vec![*x],
                Elementwise::Add { a, b } => vec![*a, *b],
                Elementwise::OuterAdd { a, b } => vec![*a, *b],
                Elementwise::Affine { x, .. } => vec![*x],
                Elementwise::Concat { a, b } => vec![*a, *b],
                Elementwise::Repeat { x, .. } => vec![*x],
                Elementwise::Slice { x, .. } => vec![*x],
            },
            Op::Resample(Resample::Nearest2x { x, .. }) => vec![*x],
            Op::Embedding(e) => match e {
                Embedding::Tokens { ids, table, positions } => vec![*ids, *table, *positions],
                Embedding::Sinusoidal { x, .. } => vec![*x],
                Embedding::Pool { x, at } => vec![*x, *at],
                Embedding::Select { x, at } => vec![*x, *at],
            },
            Op::Update(Update::Combine { terms, coefficients }) => {
                let mut ids = terms.clone();
                ids.push(*coefficients);
                ids
            }
        }
    }

    /// The input whose storage output 0 may take over: kernels read each of its elements no later than they write it.
    /// The only source of aliasing; the planner also asks that the input dies here and is read once.
    pub fn may_alias(&self) -> Option<ValueId> {
        match self {
            Op::Gemm(g) => g.residual,
            Op::Conv2d(c) => c.residual,
            Op::Attention(_) => None,
            Op::Norm(Norm::Group { x, .. } | Norm::Layer { x, .. }) => Some(*x),
            Op::Elementwise(e) => match e {
                Elementwise::Activate { x, .. } | Elementwise::Affine { x, .. } => Some(*x),
                Elementwise::Add { a, .. } => Some(*a),
                Elementwise::OuterAdd { .. }
                | Elementwise::Concat { .. }
                | Elementwise::Repeat { .. }
                | Elementwise::Slice { .. } => None,
            },
            Op::Resample(Resample::Nearest2x { .. }) => None,
            Op::Embedding(_) => None,
            Op::Update(Update::Combine { terms, .. }) => terms.first().copied(),
        }
    }

    /// Multiply-accumulates, counted as performance tables do: products of gemm, convolution and attention only.
    pub fn macs(&self, program: &Program, outputs: &[ValueId]) -> u64 {
        let len = |id: ValueId| program.value(id).len() as u64;
        match self {
            Op::Gemm(g) => {
                let w = program.shape(g.w);
                len(g.x) / w[0] as u64 * w[0] as u64 * w[1] as u64
            }
            Op::Conv2d(c) => {
                let w = program.shape(c.w);
                len(outputs[0]) * (w[0] * w[1] * w[2]) as u64
            }
            Op::Attention(a) => {
                let k = program.shape(a.k.value);
                let keys: usize = k[1..k.len() - 1].iter().product();
                2 * len(outputs[0]) * keys as u64
            }
            Op::Norm(_) | Op::Elementwise(_) | Op::Resample(_) | Op::Embedding(_) | Op::Update(_) => 0,
        }
    }
}
