//! The ops: nine families, already fused as the kernels are. A family's file holds all that the IR knows of it: operands, types,
//! what may be overwritten, products counted, one printed line.

mod attention;
mod conv2d;
mod elementwise;
mod embedding;
mod gemm;
mod norm;
mod resample;
mod rowwise;
mod update;

pub use attention::{Attention, AttentionBackward};
pub use conv2d::{Conv2d, Conv2dBackward};
pub use elementwise::{Elementwise, Scalar};
pub use embedding::Embedding;
pub use gemm::{Gemm, GemmBackward};
pub use norm::{Norm, Over};
pub use resample::{Filter, Interpolation, Resample};
pub use rowwise::Rowwise;
pub use update::Update;

use super::infer::{Infer, Types};
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

/// Rows `at ..` of a value's first dimension; how the two halves of a guided prediction are read without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    pub value: ValueId,
    pub at: usize,
}

impl From<ValueId> for Rows {
    fn from(value: ValueId) -> Rows {
        Rows { value, at: 0 }
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
    /// `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))` (GPT-2).
    GeluTanh,
    /// The projection is `[K, 2H]`; the output `[.., H]` is `a * gelu(g)` with `a` the first and `g` the last `H` columns.
    Geglu,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Gemm(Gemm),
    GemmBackward(GemmBackward),
    Conv2d(Conv2d),
    Conv2dBackward(Conv2dBackward),
    Attention(Attention),
    AttentionBackward(AttentionBackward),
    Norm(Norm),
    Rowwise(Rowwise),
    Elementwise(Elementwise),
    Resample(Resample),
    Embedding(Embedding),
    Update(Update),
}

/// What the IR asks of an op.
pub(super) trait OpKind: Clone {
    /// Every value the op reads, in a fixed order; a value may appear twice.
    fn operands(&mut self) -> Vec<&mut ValueId>;
    /// The types of its outputs, or what is wrong with its operands.
    fn infer(&self, cx: &Infer) -> Result<Types, String>;
    /// See [`Op::may_alias`].
    fn alias(&self) -> Option<ValueId> {
        None
    }
    /// See [`Op::macs`].
    fn macs(&self, _: &Program, _: &[ValueId]) -> u64 {
        0
    }
    /// The op with its operands and attributes, in one line.
    fn show(&self, program: &Program) -> String;
}

/// Calls a method of whatever op it is.
macro_rules! each {
    ($op:expr, $kind:ident => $call:expr) => {
        match $op {
            Op::Gemm($kind) => $call,
            Op::GemmBackward($kind) => $call,
            Op::Conv2d($kind) => $call,
            Op::Conv2dBackward($kind) => $call,
            Op::Attention($kind) => $call,
            Op::AttentionBackward($kind) => $call,
            Op::Norm($kind) => $call,
            Op::Rowwise($kind) => $call,
            Op::Elementwise($kind) => $call,
            Op::Resample($kind) => $call,
            Op::Embedding($kind) => $call,
            Op::Update($kind) => $call,
        }
    };
}

impl Op {
    pub fn family(&self) -> &'static str {
        match self {
            Op::Gemm(_) | Op::GemmBackward(_) => "gemm",
            Op::Conv2d(_) | Op::Conv2dBackward(_) => "conv2d",
            Op::Attention(_) | Op::AttentionBackward(_) => "attention",
            Op::Norm(_) => "norm",
            Op::Rowwise(_) => "rowwise",
            Op::Elementwise(_) => "elementwise",
            Op::Resample(_) => "resample",
            Op::Embedding(_) => "embedding",
            Op::Update(_) => "update",
        }
    }

    /// Every value the op reads, in a fixed order; a value may appear twice.
    pub fn inputs(&self) -> Vec<ValueId> {
        self.clone().operands().into_iter().map(|id| *id).collect()
    }

    /// The same op reading other values.
    pub fn with_inputs(&self, mut f: impl FnMut(ValueId) -> ValueId) -> Op {
        let mut op = self.clone();
        op.operands().into_iter().for_each(|id| *id = f(*id));
        op
    }

    fn operands(&mut self) -> Vec<&mut ValueId> {
        each!(self, op => op.operands())
    }

    pub(super) fn infer(&self, cx: &Infer) -> Result<Types, String> {
        each!(self, op => op.infer(cx))
    }

    /// The input whose storage output 0 may take over: kernels read each of its elements no later than they write it.
    /// The only source of aliasing; the planner also asks that the input dies here and is read once.
    pub fn may_alias(&self) -> Option<ValueId> {
        each!(self, op => op.alias())
    }

    /// Multiply-accumulates, counted as performance tables do: products of gemm, convolution and attention only.
    pub fn macs(&self, program: &Program, outputs: &[ValueId]) -> u64 {
        each!(self, op => op.macs(program, outputs))
    }

    pub(super) fn show(&self, program: &Program) -> String {
        each!(self, op => op.show(program))
    }
}

fn show_cols(p: &Program, cols: Cols) -> String {
    let value = p.show(cols.value);
    if cols.at == 0 { value } else { format!("{value}[{}..]", cols.at) }
}

/// ` name value`, or nothing.
fn show_optional(p: &Program, name: &str, id: Option<ValueId>) -> String {
    id.map(|id| format!(" {name} {}", p.show(id))).unwrap_or_default()
}
