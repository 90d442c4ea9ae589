//! A launch is a value: which kernel, how many blocks and threads, how much shared memory, and the bytes of its parameters.

use super::kernels::constants;
use crate::program::DType;
use crate::{Error, Result};
use bytemuck::Pod;
use std::ops::RangeInclusive;

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
/// What of a box lies outside the tensor is 0. [`TensorMap::check`] has the limits.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorMap {
    pub dtype: DType,
    /// Of the first element.
    pub address: Address,
    /// Elements along each dimension, the first one contiguous.
    pub extents: [usize; 4],
    /// Elements from one to the next along each dimension behind the first; of no matter where the extent is 1.
    pub strides: [usize; 3],
    /// Of the box.
    pub window: [usize; 4],
}

impl TensorMap {
    /// Bytes in a kernel's parameters.
    pub const BYTES: usize = 128;

    /// Bytes of the box along its first dimension.
    pub const LINE_BYTES: usize = constants::LINE_BYTES;

    /// Elements of it.
    pub const LINE: usize = TensorMap::LINE_BYTES / 2;

    /// Bytes from one to the next along each dimension behind the first, of a dimension of one element 16.
    pub fn byte_strides(&self) -> [u64; 3] {
        std::array::from_fn(
            |i| if self.extents[i + 1] == 1 { 16 } else { (self.strides[i] * self.dtype.bytes()) as u64 },
        )
    }

    /// Refuses what the driver would (`cuTensorMapEncodeTiled`, with lines permuted by 128 bytes), in words.
    pub fn check(&self) -> Result<()> {
        let TensorMap { dtype, address, extents, window, .. } = self;
        let refuse = |what: String| Err(Error::Device(format!("a tensor map has {what}")));
        if dtype.bytes() != 2 {
            return refuse(format!("elements of 16 bits, not of {dtype}"));
        }
        if !address.is_aligned() {
            return refuse(format!("an address that is a multiple of 16, not {:#x}", address.0));
        }
        if let Some(extent) = extents.iter().find(|extent| !EXTENTS.contains(extent)) {
            return refuse(format!("extents of 1 to 2^32, not {extent}"));
        }
        if let Some(stride) = self.byte_strides().iter().find(|stride| *stride % 16 > 0 || **stride >= 1 << 40) {
            return refuse(format!("strides of multiples of 16 bytes below 2^40, not {stride}"));
        }
        if let Some(extent) = window.iter().find(|extent| !WINDOW.contains(extent)) {
            return refuse(format!("boxes of 1 to 256 elements along a dimension, not {extent}"));
        }
        if window[0] != TensorMap::LINE {
            return refuse(format!(
                "boxes of {} elements along the first dimension, not {}",
                TensorMap::LINE,
                window[0]
            ));
        }
        Ok(())
    }
}

/// What the driver takes: extents of a tensor and of a box.
const EXTENTS: RangeInclusive<usize> = 1..=1 << 32;
const WINDOW: RangeInclusive<usize> = 1..=256;
/// Blocks along x, y and z; threads of a block. Pixels, tokens and elements go along x alone. Along y and z go samples, heads, splits,
/// chunks (some hundreds at most) and blocks of columns (hundreds of elements each): of these only a batch is the user's to choose, and
/// one of 65536 is refused.
const GRID: [RangeInclusive<u32>; 3] = [1..=(1 << 31) - 1, 1..=65_535, 1..=65_535];
const BLOCK: RangeInclusive<u32> = 1..=1024;
/// Bytes of dynamic shared memory on sm_90, which has the most that kernels here ask for; a device may have less, and says so.
pub const SHARED: u32 = 227 << 10;
/// Bytes of parameters.
const PARAMS: usize = 4096;

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
    /// Whether a driver takes it [`Launch::check`] says: sizes are the user's.
    pub fn new<P: Pod>(kernel: impl Into<String>, grid: [usize; 3], block: usize, shared: usize, params: P) -> Launch {
        // What 32 bits do not hold is beyond every limit, and stays so.
        let to_u32 = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Launch {
            kernel: kernel.into(),
            grid: grid.map(to_u32),
            block: to_u32(block),
            shared: to_u32(shared),
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

    /// Refuses what every driver would, in words: the emulation has no other limits than a GPU.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Device(format!("{self}: {what}")));
        for ((axis, blocks), limit) in ["x", "y", "z"].iter().zip(self.grid).zip(GRID) {
            if !limit.contains(&blocks) {
                let hint = if blocks > 0 { "; use a smaller --batch or --size" } else { "" };
                return refuse(format!("a grid has 1 to {} blocks along {axis}{hint}", limit.end()));
            }
        }
        if !BLOCK.contains(&self.block) {
            return refuse(format!("a block has {} to {} threads", BLOCK.start(), BLOCK.end()));
        }
        if self.shared > SHARED {
            return refuse(format!("a block has at most {SHARED} bytes of shared memory"));
        }
        if self.params.len() > PARAMS {
            return refuse(format!("{} bytes of parameters, a kernel takes at most {PARAMS}", self.params.len()));
        }
        self.maps.iter().try_for_each(|map| map.check().or_else(|error| refuse(error.to_string())))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel divides.
    fn divide(n: u32, by: Divisor) -> u32 {
        if by.multiplier == 0 { n } else { ((n as u64 * by.multiplier as u64) >> 32) as u32 >> by.shift }
    }

    fn launch() -> Launch {
        let map = TensorMap {
            dtype: DType::F16,
            address: Address(1 << 20),
            extents: [320, 64, 64, 2],
            strides: [320, 64 * 320, 64 * 64 * 320],
            window: [64, 16, 8, 1],
        };
        Launch::new("product", [2, 3, 4], 288, 200_000, [0u64; 32]).with_maps(vec![map.clone(), map])
    }

    #[test]
    fn what_a_driver_takes_is_let_through() {
        launch().check().unwrap();
        let (grid, params) = ([(1 << 31) - 1, 65_535, 65_535], vec![0; 4096]);
        Launch { grid, block: 1024, shared: 227 << 10, params, ..launch() }.check().unwrap();
        let mut ends = launch();
        let map = &mut ends.maps[0];
        (map.extents, map.strides, map.window) = ([1 << 32, 1, 1, 2], [0, 0, (1 << 39) - 8], [64, 256, 1, 1]);
        // Of one element along a dimension strides are of no matter.
        map.strides[0] = 3;
        ends.check().unwrap();
    }

    #[test]
    fn what_a_driver_refuses_is_one_line() {
        let of = |change: &dyn Fn(&mut Launch)| {
            let mut launch = Launch { params: vec![0; 4096], ..launch() };
            change(&mut launch);
            launch
        };
        let of_map = |change: &dyn Fn(&mut TensorMap)| of(&|launch| change(&mut launch.maps[1]));
        let refused = [
            (Launch::new("k", [1 << 31, 1, 1], 32, 0, 0u64), "along x"),
            (Launch::new("k", [1 << 40, 1, 1], 32, 0, 0u64), "along x"),
            (Launch::new("k", [0, 1, 1], 32, 0, 0u64), "along x"),
            (of(&|launch| launch.grid[1] = 65_536), "1 to 65535 blocks along y"),
            (of(&|launch| launch.grid[1] = 0), "along y"),
            (of(&|launch| launch.grid[2] = 65_536), "along z"),
            (of(&|launch| launch.grid[2] = 0), "along z"),
            (of(&|launch| launch.block = 0), "1 to 1024 threads"),
            (of(&|launch| launch.block = 1025), "1 to 1024 threads"),
            (of(&|launch| launch.shared = (227 << 10) + 1), "shared memory"),
            (of(&|launch| launch.params.push(0)), "4097 bytes of parameters"),
            (of_map(&|map| map.dtype = DType::F32), "elements of 16 bits, not of f32"),
            (of_map(&|map| map.address = Address(24)), "multiple of 16, not 0x18"),
            (of_map(&|map| map.extents[2] = 0), "extents of 1 to 2^32, not 0"),
            (of_map(&|map| map.extents[0] = (1 << 32) + 1), "extents of 1 to 2^32"),
            (of_map(&|map| map.strides[1] += 4), "multiples of 16 bytes"),
            (of_map(&|map| map.strides[2] = 1 << 39), "below 2^40"),
            (of_map(&|map| map.window[3] = 0), "boxes of 1 to 256"),
            (of_map(&|map| map.window[1] = 257), "boxes of 1 to 256"),
            (of_map(&|map| map.window[0] = 32), "boxes of 64 elements along the first dimension"),
        ];
        for (launch, what) in refused {
            let error = launch.check().unwrap_err().to_string();
            assert!(error.contains(what) && error.contains(&launch.kernel) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn divisors_divide() {
        let largest = (1u32 << 31) - 1;
        for divisor in (1..2000).chain([4095, 4096, 4097, 65_537, 1 << 20, (1 << 30) + 1, largest]) {
            let by = Divisor::new(divisor as usize);
            let near = (0..8u32).flat_map(|k| {
                [k.wrapping_mul(divisor) % largest, k.wrapping_mul(divisor).wrapping_sub(1) % largest, largest - k]
            });
            for n in near.chain([0, 1, 12_345_678]) {
                assert_eq!(divide(n, by), n / divisor, "{n} / {divisor}");
            }
        }
    }
}
