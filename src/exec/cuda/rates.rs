//! What a cut of a product is expected to take: one table, and the model that reads it.
//!
//! The model counts clocks of a nominal GPU of 132 multiprocessors: the busiest one's rounds of blocks, the right operand's way from
//! memory, and for split products the way of the parts through memory and one more launch. `tools/kernels/fit` fits the table to
//! what was measured (`gpu_check sweep`), by this same model.

use super::kernels::constants::{LINE_BYTES, STAGE_DEPTH_BYTES, STAGES};
use super::shape::{Cut, Rates, Shape, Tile};
use crate::program::DType;

/// The table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Table {
    /// Of 16-bit types, on any GPU.
    pub half: [Tile; 2],
    /// Of 16-bit types, by kernels/sm90_gemm.cu.
    pub hopper: [Tile; 2],
    /// Of f32.
    pub single: [Tile; 1],
    /// Bytes of device memory a clock.
    pub bandwidth: f64,
    /// Clocks of one more launch in a graph.
    pub launch: f64,
}

// fit: what follows was derived, nothing of it was measured. Shared memory gives 128 bytes a clock, device memory has a latency of
// about 800 clocks. `half`: for 16 reduced elements a warp of 64x32 reads 3 KiB and makes 32768 products, one of 32x32 2 KiB and
// 16384, and a block of 128x128 writes 8 KiB for 262144, one of 64x64 4 KiB for 65536; together 1/8 and 3/16 of a byte a product.
// `hopper`: four fifths of the tensor cores' 2048, which shared memory does not limit: for 16 reduced elements 64x128 (64x160) read
// it for 48 (56) of 64 (80) clocks; a block begins with barriers and tensor maps that are new to its multiprocessor. `single`: for
// 1024 products a warp reads 12 times 128 bytes. Memory is about an H100's.
pub const TABLE: Table = Table {
    half: [
        tile("128", [128, 128], Rates { resident: 2, rate: 1024.0, latency: 800.0, ends: 2000.0 }),
        tile("64", [64, 64], Rates { resident: 5, rate: 683.0, latency: 800.0, ends: 2000.0 }),
    ],
    hopper: [
        on_hopper("160", [128, 160], 5, Rates { resident: 1, rate: 1638.0, latency: 800.0, ends: 3000.0 }),
        on_hopper("128", [128, 128], 5, Rates { resident: 1, rate: 1638.0, latency: 800.0, ends: 3000.0 }),
    ],
    single: [tile("64", [64, 64], Rates { resident: 5, rate: 85.0, latency: 800.0, ends: 2000.0 })],
    bandwidth: 2048.0,
    launch: 3000.0,
};
// fit: end

/// Of the nominal GPU.
pub const MULTIPROCESSORS: usize = 132;
/// Bytes of depth that the model counts in.
const STEP: usize = 64;

const fn tile(name: &'static str, [rows, columns]: [usize; 2], rates: Rates) -> Tile {
    Tile { name, hopper: false, rows, columns, stages: STAGES, stage_bytes: STAGE_DEPTH_BYTES, rates }
}

const fn on_hopper(name: &'static str, sides: [usize; 2], stages: usize, rates: Rates) -> Tile {
    Tile { hopper: true, stages, stage_bytes: LINE_BYTES, ..tile(name, sides, rates) }
}

impl Table {
    /// The tiles of one kind of instructions.
    pub fn tiles(&self, hopper: bool, dtype: DType) -> &[Tile] {
        match (hopper, dtype) {
            (true, DType::F32) => &[],
            (true, _) => &self.hopper,
            (false, DType::F32) => &self.single,
            (false, _) => &self.half,
        }
    }

    /// All of them.
    pub fn tiles_mut(&mut self) -> impl Iterator<Item = &mut Tile> {
        self.half.iter_mut().chain(&mut self.hopper).chain(&mut self.single)
    }

    /// The clocks of a product: the busiest multiprocessor's rounds of blocks, or the right operand's way from memory; then the
    /// parts' way to memory and back. The rates are those of the cut's tile.
    pub fn clocks(&self, shape: &Shape, cut: &Cut) -> f64 {
        let Cut { tile, splits, stages, depth } = *cut;
        let Rates { resident, rate, latency, ends } = tile.rates;
        let blocks = shape.rows.div_ceil(tile.rows) * shape.columns.div_ceil(tile.columns) * splits;
        let busiest = blocks.div_ceil(MULTIPROCESSORS);
        let rounds = busiest.div_ceil(resident);
        let together = busiest.div_ceil(rounds);
        let deep = STEP / shape.dtype.bytes();
        let step = (together * tile.rows * tile.columns * deep) as f64 / rate;
        // All stages but the one that is computed with are on their way at once.
        let wait = latency * STEP as f64 / ((stages - 1) * tile.stage_bytes) as f64;
        let steps = depth.min(shape.depth).div_ceil(deep) as f64;
        let work = rounds as f64 * (ends + steps * step.max(wait));
        let memory = (shape.columns * shape.depth * shape.dtype.bytes()) as f64 / self.bandwidth;
        let finish =
            if splits > 1 { self.launch + 2.0 * shape.partial_bytes(splits) as f64 / self.bandwidth } else { 0.0 };
        work.max(memory) + finish
    }
}
