//! An op at its place, as the launch code of every family sees it.

use super::kernels::constants;
use super::launch::Address;
use super::shape::Hopper;
use crate::program::{Activation, Cols, DType, Node, Origin, Program, ValueId};

/// An op at its place: what the launch code of a family sees.
pub struct Cx<'a> {
    pub program: &'a Program,
    pub node: &'a Node,
    /// Per value.
    pub addresses: &'a [Address],
    pub workspace: Address,
    pub hopper: Hopper,
}

impl Cx<'_> {
    pub fn shape(&self, id: ValueId) -> &[usize] {
        self.program.shape(id)
    }

    pub fn dtype(&self, id: ValueId) -> DType {
        self.program.value(id).dtype
    }

    pub fn address(&self, id: ValueId) -> Address {
        self.addresses[id.index()]
    }

    /// Null for what is not there.
    pub fn optional(&self, id: Option<ValueId>) -> Address {
        id.map_or(Address::NULL, |id| self.address(id))
    }

    /// Element `cols.at` of the first row.
    pub fn columns(&self, cols: Cols) -> Address {
        self.address(cols.value).offset(cols.at * self.dtype(cols.value).bytes())
    }

    /// The op's output of this number.
    pub fn output(&self, index: usize) -> ValueId {
        self.node.outputs[index]
    }

    /// Elements of a value.
    pub fn len(&self, id: ValueId) -> usize {
        self.program.value(id).len()
    }

    /// The last dimension.
    pub fn width(&self, id: ValueId) -> usize {
        let shape = self.shape(id);
        shape[shape.len() - 1]
    }

    /// Whether a weight is held as the right operand of products, `[N, K]`, and not in the order of its shape.
    pub fn is_rhs(&self, id: ValueId) -> bool {
        is_rhs(self.program, id)
    }
}

/// As [`Cx::is_rhs`].
pub fn is_rhs(program: &Program, id: ValueId) -> bool {
    match &program.value(id).origin {
        Origin::Weight(weight) => weight.pack.is_rhs(),
        Origin::Input(_) | Origin::Op(_) => false,
    }
}

/// An activation's number.
pub fn activation(activation: Activation) -> i32 {
    let number = match activation {
        Activation::None => constants::NONE,
        Activation::Silu => constants::SILU,
        Activation::Gelu => constants::GELU,
        Activation::QuickGelu => constants::QUICK_GELU,
        Activation::GeluTanh => constants::GELU_TANH,
        Activation::Geglu => constants::GEGLU,
    };
    number as i32
}
