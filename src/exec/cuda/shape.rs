//! What products and their tiles are described by: a product's shape, a block's tile, how the one is cut into the other.

use super::kernels::constants::SM90_ROWS;
use super::launch::TensorMap;
use crate::program::DType;

/// What the lines of an operand run along (`Lines` in kernels/tile.cuh).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    KMajor,
    MNMajor,
}

/// A block of outputs as kernels/gemm.cu and kernels/conv2d.cu have it, or kernels/sm90_gemm.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tile {
    /// In the kernels' names.
    pub name: &'static str,
    /// Of kernels/sm90_gemm.cu.
    pub hopper: bool,
    pub rows: usize,
    pub columns: usize,
    /// Of the ring in shared memory, if so many fit.
    pub stages: usize,
    /// Bytes of depth of one.
    pub stage_bytes: usize,
    pub rates: Rates,
}

/// What the model knows of a tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Blocks that a multiprocessor runs at once, by their registers and shared memory.
    pub resident: usize,
    /// Products of one output and one reduced element that a multiprocessor makes in a clock, fully occupied.
    pub rate: f64,
    /// Clocks from asking for a stage of the ring to having it.
    pub latency: f64,
    /// Clocks of a block before its first and after its last stage.
    pub ends: f64,
}

/// Which products are for kernels/sm90_gemm.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hopper {
    /// None: the kernels for any GPU do all.
    Off,
    /// Those that it is expected to be faster at.
    Auto,
    /// All that it can make.
    Always,
    /// For measurements: every product is cut like this, and a program with one that cannot be is refused when it is loaded.
    Forced(Cut),
}

impl std::str::FromStr for Hopper {
    type Err = String;

    fn from_str(name: &str) -> Result<Hopper, String> {
        match name {
            "off" => Ok(Hopper::Off),
            "auto" => Ok(Hopper::Auto),
            "always" => Ok(Hopper::Always),
            _ => Err("one of auto, off, always".into()),
        }
    }
}

impl Hopper {
    /// The same on a GPU that can run it, else off. What is forced stays: nothing else is measured in its place.
    pub fn where_it_can(self, can: bool) -> Hopper {
        if can || matches!(self, Hopper::Forced(_)) { self } else { Hopper::Off }
    }
}

/// A product of `[rows, depth]` and `[depth, columns]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub dtype: DType,
    pub rows: usize,
    /// What splits are chosen for instead of `rows`.
    pub nominal_rows: usize,
    /// Of the right operand: 2 H for a GEGLU.
    pub columns: usize,
    pub depth: usize,
    pub hopper: Hopper,
    /// How kernels/sm90_gemm.cu would hold the right operand; none where it cannot make the product.
    pub boxes: Option<Lines>,
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    pub tile: Tile,
    /// At least 1; none is empty.
    pub splits: usize,
    /// Of the ring in shared memory.
    pub stages: usize,
    /// Reduced elements of a part, the last one's excepted.
    pub depth: usize,
}

impl Shape {
    /// Bytes of the parts of a split product, f32 `[splits, rows, columns]`.
    pub fn partial_bytes(&self, splits: usize) -> usize {
        splits * self.rows * self.columns * size_of::<f32>()
    }
}

/// Slots of the ring that stages go through, as far as shared memory allows; with 2 it would be right too, and slower.
pub const RINGS: [usize; 4] = [3, 4, 5, 6];

/// Bytes of a ring for tiles of so many columns, with two barriers for each of its slots.
pub fn ring_bytes(columns: usize, right: Lines, stages: usize) -> usize {
    let lines = match right {
        Lines::KMajor => columns,
        Lines::MNMajor => columns.next_multiple_of(TensorMap::LINE),
    };
    stages * ((SM90_ROWS + lines) * TensorMap::LINE_BYTES + 2 * 8)
}
