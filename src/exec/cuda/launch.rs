//! A launch is a value: which kernel, how many blocks and threads, how much shared memory, and the bytes of its parameters.

use super::driver::Driver;
use super::tiles::Hopper;
use crate::Result;
use crate::program::{Activation, Cols, DType, Node, Origin, Program, ValueId};
use bytemuck::Pod;

/// An address in device memory (on the emulated driver: in host memory).
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Address(pub u64);

impl Address {
    /// Of what is not there: a kernel takes it as absent.
    pub const NULL: Address = Address(0);

    pub fn offset(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }

    /// Whether 16 bytes can be read at once from here.
    pub fn is_aligned(self) -> bool {
        self.0.is_multiple_of(16)
    }
}

/// A tensor of 16-bit elements and the box of it that Hopper's copy engine brings at a time, 128 bytes along the first dimension.
/// What of a box lies outside the tensor is 0.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorMap {
    pub dtype: DType,
    /// Of the first element; a multiple of 16.
    pub address: Address,
    /// Elements along each dimension, the first one contiguous.
    pub extents: [usize; 4],
    /// Elements from one to the next along each dimension behind the first; multiples of 8, and of no matter where the extent is 1.
    pub strides: [usize; 3],
    /// Of the box: at most 256 each.
    pub window: [usize; 4],
}

impl TensorMap {
    /// Bytes in a kernel's parameters.
    pub const BYTES: usize = 128;

    /// Bytes of the box along its first dimension.
    pub const LINE_BYTES: usize = 128;

    /// Elements of it.
    pub const LINE: usize = 64;

    /// Bytes from one to the next along each dimension behind the first, of a dimension of one element 16.
    pub fn byte_strides(&self) -> [u64; 3] {
        std::array::from_fn(
            |i| if self.extents[i + 1] == 1 { 16 } else { (self.strides[i] * self.dtype.bytes()) as u64 },
        )
    }
}

/// One kernel launch. Every kernel takes one parameter, a `#[repr(C)]` structure passed by value.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's symbol.
    pub kernel: String,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block, in one dimension.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    pub params: Vec<u8>,
    /// What the parameters begin with, in a form that only the driver knows.
    pub maps: Vec<TensorMap>,
}

impl Launch {
    pub fn new<P: Pod>(kernel: impl Into<String>, grid: [usize; 3], block: usize, shared: usize, params: P) -> Launch {
        Launch {
            kernel: kernel.into(),
            grid: grid.map(|n| n as u32),
            block: block as u32,
            shared: shared as u32,
            params: bytemuck::bytes_of(&params).to_vec(),
            maps: vec![],
        }
    }

    /// The same, with parameters behind tensor maps: a structure that begins with as many times [`TensorMap::BYTES`].
    pub fn with_maps(mut self, maps: Vec<TensorMap>) -> Launch {
        let params = std::mem::replace(&mut self.params, vec![0; maps.len() * TensorMap::BYTES]);
        self.params.extend(params);
        self.maps = maps;
        self
    }

    /// Puts the tensor maps where the kernel looks for them.
    pub fn encode_maps(&mut self, driver: &dyn Driver) -> Result<()> {
        for (map, place) in self.maps.iter().zip(self.params.chunks_exact_mut(TensorMap::BYTES)) {
            place.copy_from_slice(&driver.tensor_map(map)?);
        }
        Ok(())
    }
}

impl std::fmt::Display for Launch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [x, y, z] = self.grid;
        write!(f, "{} grid {x}x{y}x{z} block {} shared {}", self.kernel, self.block, self.shared)
    }
}

/// Divides by a number known at launch, as `divide` in kernels/common.cuh does: `(n · multiplier >> 32) >> shift` for `n < 2^31`;
/// a multiplier of 0 stands for a divisor of 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Divisor {
    divisor: u32,
    multiplier: u32,
    shift: u32,
}

impl Divisor {
    /// Panics when the divisor is 0 or 2^31 or more; dimensions are neither.
    pub fn new(divisor: usize) -> Divisor {
        assert!(divisor > 0 && divisor < 1 << 31, "a divisor of {divisor}");
        let divisor = divisor as u32;
        if divisor == 1 {
            return Divisor { divisor, multiplier: 0, shift: 0 };
        }
        // With 2^(s-1) < divisor <= 2^s, m = ceil(2^(31+s) / divisor) fits 32 bits, and n m / 2^(31+s) errs by less than
        // n / 2^31 of 1 / divisor.
        let s = 32 - (divisor - 1).leading_zeros();
        let multiplier = (1u64 << (31 + s)).div_ceil(divisor as u64) as u32;
        Divisor { divisor, multiplier, shift: s - 1 }
    }
}

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
    pub fn is_factor(&self, id: ValueId) -> bool {
        is_factor(self.program, id)
    }
}

/// As [`Cx::is_factor`].
pub fn is_factor(program: &Program, id: ValueId) -> bool {
    match &program.value(id).origin {
        Origin::Weight(weight) => weight.pack.is_factor(),
        Origin::Input(_) | Origin::Op(_) => false,
    }
}

/// An activation's number in kernels/activation.cuh.
pub fn activation(activation: Activation) -> i32 {
    match activation {
        Activation::None => 0,
        Activation::Silu => 1,
        Activation::Gelu => 2,
        Activation::QuickGelu => 3,
        Activation::GeluTanh => 4,
        Activation::Geglu => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel divides.
    fn divide(n: u32, by: Divisor) -> u32 {
        if by.multiplier == 0 { n } else { ((n as u64 * by.multiplier as u64) >> 32) as u32 >> by.shift }
    }

    #[test]
    fn divisors_divide() {
        let largest = (1u32 << 31) - 1;
        for divisor in (1..2000).chain([4095, 4096, 4097, 65_537, 1 << 20, (1 << 30) + 1, largest]) {
            let by = Divisor::new(divisor as usize);
            let near =
                (0..8u32).flat_map(|k| [k * divisor % largest, (k * divisor).wrapping_sub(1) % largest, largest - k]);
            for n in near.chain([0, 1, 12_345_678]) {
                assert_eq!(divide(n, by), n / divisor, "{n} / {divisor}");
            }
        }
    }
}
