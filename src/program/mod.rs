//! The program: a flat list of coarse ops in execution order, with typed values, that every later stage reads.
//!
//! A program knows neither weights' bytes nor devices. Weights are named values; the executor fetches them by [`Weight`].
//! Activations are dense: images `[B, H, W, C]`, tokens `[B, T, C]`; ops on tokens accept any middle dims
//! (`T` is their product), so moving between the two needs no op.

mod build;
mod infer;
mod ops;
mod print;
mod single_op;
mod verify;

pub use build::Builder;
pub use ops::*;
pub use single_op::Kind;

use crate::weights::Weight;
use std::panic::Location;

/// Element type of a value. Weights and activations of a program are of one float type, its own, but for networks that need
/// another; statistics, losses and state are of its accumulator type (an op computes in the type of its operands); `I32` holds token ids
/// and indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    I32,
}

impl DType {
    pub fn bytes(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The type of sums and of state beside values of this one: f32, beside f64 that.
    pub fn accumulator(self) -> DType {
        if self == DType::F64 { DType::F64 } else { DType::F32 }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        })
    }
}

/// Dimensions, outermost first.
pub type Shape = Vec<usize>;

/// Index of a value in `Program::values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

impl ValueId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// A named buffer that the executor keeps between runs and the host (or another program's output) writes.
    Input(String),
    Weight(Weight),
    /// Output of the op with this index.
    Op(usize),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    pub shape: Shape,
    pub dtype: DType,
    pub origin: Origin,
}

impl Value {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }
}

/// An op at its place: what it computes, the values it writes (order documented at the op), and the model line that appended it.
#[derive(Clone, Debug)]
pub struct Node {
    pub op: Op,
    pub outputs: Vec<ValueId>,
    pub at: &'static Location<'static>,
}

/// A flat list of ops in execution order.
///
/// Inputs and outputs are named buffers. A run reads the buffers its inputs name, and when its last op is done the outputs
/// are copied into the buffers they name; an output may carry the name of an input (latents, sampler history), which is
/// how state moves from one run to the next and from one program to another.
#[derive(Clone, Debug)]
pub struct Program {
    pub name: String,
    pub dtype: DType,
    pub nodes: Vec<Node>,
    pub values: Vec<Value>,
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<(String, ValueId)>,
}

impl Program {
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    pub fn shape(&self, id: ValueId) -> &[usize] {
        &self.values[id.index()].shape
    }

    /// The input that a named buffer is.
    pub fn input(&self, name: &str) -> Option<ValueId> {
        let is = |id: &&ValueId| matches!(&self.value(**id).origin, Origin::Input(found) if found == name);
        self.inputs.iter().find(is).copied()
    }

    /// The weights the program reads, each once, in order of first use.
    pub fn weights(&self) -> impl Iterator<Item = (ValueId, &Weight)> {
        self.values.iter().enumerate().filter_map(|(i, v)| match &v.origin {
            Origin::Weight(w) => Some((ValueId(i as u32), w)),
            Origin::Input(_) | Origin::Op(_) => None,
        })
    }

    /// Floating-point operations of all products, two per multiply-accumulate.
    pub fn flops(&self) -> u64 {
        self.nodes.iter().map(|node| 2 * node.op.macs(self, &node.outputs)).sum()
    }

    /// Bytes an op reads and writes, each value once.
    pub fn bytes_of(&self, node: &Node) -> usize {
        let mut touched = [node.op.inputs(), node.outputs.clone()].concat();
        touched.sort();
        touched.dedup();
        touched.iter().map(|id| self.value(*id).bytes()).sum()
    }

    /// Re-checks every rule of the IR; run after build, after autodiff and after planning.
    pub fn verify(&self) -> crate::Result<()> {
        verify::verify(self)
    }
}
