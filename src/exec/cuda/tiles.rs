//! How a product is cut over the multiprocessors: the tile of outputs that a block computes, and the parts its reduced dimension is
//! split into. A pure function of the shape, fed by one table; the same on every GPU.
//!
//! Nothing here was measured. The model counts clocks of a nominal GPU of 132 multiprocessors: the busiest one's rounds of
//! blocks, the weights' way from memory, and for split products the way of the parts through memory and one more launch.

use crate::program::DType;

/// A block of outputs as kernels/gemm.cu and kernels/conv2d.cu have it, or kernels/product_hopper.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tile {
    /// In the kernels' names.
    pub name: &'static str,
    /// Of kernels/product_hopper.cu.
    pub hopper: bool,
    pub rows: usize,
    pub columns: usize,
    pub threads: usize,
    rates: Rates,
}

/// What the model knows of a tile.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rates {
    /// Blocks that a multiprocessor runs at once, by their registers and shared memory.
    resident: usize,
    /// Products of one output and one reduced element that a multiprocessor makes in a clock, fully occupied.
    rate: f64,
    /// Clocks between stages that come from memory: its latency, about 800, by the stages that the ring asks for ahead.
    wait: f64,
    /// Clocks of a block before its first and after its last stage.
    ends: f64,
}

const fn tile(name: &'static str, [rows, columns]: [usize; 2], threads: usize, rates: Rates) -> Tile {
    Tile { name, hopper: false, rows, columns, threads, rates }
}

const fn on_hopper(name: &'static str, sides: [usize; 2], threads: usize, rates: Rates) -> Tile {
    Tile { hopper: true, ..tile(name, sides, threads, rates) }
}

/// Of 16-bit types. Rates are what shared memory allows at 128 bytes a clock: for 16 reduced elements a warp of 64x32 reads 3 KiB
/// and makes 32768 products, one of 32x32 2 KiB and 16384, and a block of 128x128 writes 8 KiB for 262144, one of 64x64 4 KiB for
/// 65536; together 1/8 and 3/16 of a byte a product.
const HALF: [Tile; 2] = [
    tile("128", [128, 128], 256, Rates { resident: 2, rate: 1024.0, wait: 400.0, ends: 2000.0 }),
    tile("64", [64, 64], 128, Rates { resident: 5, rate: 683.0, wait: 400.0, ends: 2000.0 }),
];

/// Of 16-bit types on Hopper: four fifths of its tensor cores' 2048, which shared memory does not limit: for 16 reduced elements
/// 64x128 (64x160) read it for 48 (56) of 64 (80) clocks. Their ring is four stages of 128 bytes ahead; a block begins with barriers
/// and tensor maps that are new to its multiprocessor.
const HOPPER: [Tile; 2] = [
    on_hopper("160", [128, 160], 288, Rates { resident: 1, rate: 1638.0, wait: 100.0, ends: 3000.0 }),
    on_hopper("128", [128, 128], 288, Rates { resident: 1, rate: 1638.0, wait: 100.0, ends: 3000.0 }),
];

/// Of f32: for 1024 products a warp reads 12 times 128 bytes.
const SINGLE: [Tile; 1] = [tile("64", [64, 64], 128, Rates { resident: 5, rate: 85.0, wait: 400.0, ends: 2000.0 })];

/// The nominal GPU, about an H100: multiprocessors, and bytes of device memory a clock.
const MULTIPROCESSORS: usize = 132;
const BANDWIDTH: f64 = 2048.0;
/// Clocks of one more launch in a graph.
const LAUNCH: f64 = 3000.0;

/// Bytes of depth of a stage, and of what parts are made of: whole stages of every kernel, so that all tiles split alike.
const STAGE: usize = 64;
const GRAIN: usize = 128;
const MOST_SPLITS: usize = 32;
/// Of all splits that come this close to the best the fewest are taken: in a larger batch parts are as many bytes more, and of less
/// use.
const CLOSE: f64 = 1.25;
/// Samples that splits are chosen for, whatever the batch: those of guidance.
const NOMINAL_BATCH: usize = 2;

/// Which products are for kernels/product_hopper.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hopper {
    /// None: the kernels for any GPU do all.
    Off,
    /// Those that it is expected to be faster at.
    Auto,
    /// All that it can make.
    Always,
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
    /// The same where it can make something, else off.
    pub fn where_it_can(self, can: bool) -> Hopper {
        if can { self } else { Hopper::Off }
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
    /// Off where kernels/product_hopper.cu cannot make it.
    pub hopper: Hopper,
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    pub tile: Tile,
    /// At least 1; none is empty.
    pub splits: usize,
    /// Reduced elements of a part, the last one's excepted.
    pub depth: usize,
}

impl Shape {
    /// Of rows that belong to samples: `[B, .., C]`.
    pub fn of_samples(dtype: DType, of_rows: &[usize], columns: usize, depth: usize) -> Shape {
        let per_sample: usize = of_rows[1..of_rows.len() - 1].iter().product();
        let (rows, nominal_rows) = (of_rows[0] * per_sample, NOMINAL_BATCH * per_sample);
        Shape { dtype, rows, nominal_rows, columns, depth, hopper: Hopper::Off }
    }

    /// The same for kernels/product_hopper.cu, if it can make it in 16 bits.
    pub fn on_hopper(self, hopper: Hopper, can: bool) -> Shape {
        Shape { hopper: hopper.where_it_can(can && self.dtype != DType::F32), ..self }
    }

    /// Splits and instructions change the order of additions, so they follow from what a sample has; a tile does not
    /// (kernels/product.cuh), so it follows from all rows.
    pub fn cut(&self) -> Cut {
        let best = |cuts: Vec<(Cut, f64)>| cuts.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b)).expect("a tile");
        let nominal = Shape { rows: self.nominal_rows, ..*self };
        let every: Vec<(Cut, f64)> = (1..=MOST_SPLITS).map(|splits| best(nominal.cuts(splits))).collect();
        let limit = CLOSE * every.iter().map(|(_, clocks)| *clocks).fold(f64::INFINITY, f64::min);
        let (fewest, _) = every.into_iter().find(|(_, clocks)| *clocks <= limit).expect("the best one");
        best(self.cuts_of(fewest.splits, fewest.tile.hopper)).0
    }

    /// Every tile with as many parts as asked for, or fewer where some would be empty, and the clocks it takes.
    fn cuts(&self, splits: usize) -> Vec<(Cut, f64)> {
        match self.hopper {
            Hopper::Off => self.cuts_of(splits, false),
            Hopper::Auto => [self.cuts_of(splits, false), self.cuts_of(splits, true)].concat(),
            Hopper::Always => self.cuts_of(splits, true),
        }
    }

    /// The same of one kind of instructions.
    fn cuts_of(&self, splits: usize, hopper: bool) -> Vec<(Cut, f64)> {
        let depth = self.depth.div_ceil(splits).next_multiple_of(GRAIN / self.dtype.bytes());
        let splits = self.depth.div_ceil(depth);
        let tiles: &[Tile] = match (hopper, self.dtype) {
            (true, _) => &HOPPER,
            (false, DType::F32) => &SINGLE,
            (false, _) => &HALF,
        };
        tiles.iter().map(|&tile| (Cut { tile, splits, depth }, self.clocks(Cut { tile, splits, depth }))).collect()
    }

    /// The busiest multiprocessor's rounds of blocks, or the right operand's way from memory; then the parts' way to memory and back.
    fn clocks(&self, Cut { tile, splits, depth }: Cut) -> f64 {
        let blocks = self.rows.div_ceil(tile.rows) * self.columns.div_ceil(tile.columns) * splits;
        let busiest = blocks.div_ceil(MULTIPROCESSORS);
        let rounds = busiest.div_ceil(tile.rates.resident);
        let together = busiest.div_ceil(rounds);
        let deep = STAGE / self.dtype.bytes();
        let stage = (together * tile.rows * tile.columns * deep) as f64 / tile.rates.rate;
        let work = rounds as f64
            * (tile.rates.ends + depth.min(self.depth).div_ceil(deep) as f64 * stage.max(tile.rates.wait));
        let memory = (self.columns * self.depth * self.dtype.bytes()) as f64 / BANDWIDTH;
        let finish = if splits > 1 { LAUNCH + 2.0 * self.partial_bytes(splits) as f64 / BANDWIDTH } else { 0.0 };
        work.max(memory) + finish
    }

    /// Bytes of the parts of a split product, f32 `[splits, rows, columns]`.
    fn partial_bytes(&self, splits: usize) -> usize {
        splits * self.rows * self.columns * size_of::<f32>()
    }

    /// Scratch of the product.
    pub fn workspace(&self) -> usize {
        match self.cut().splits {
            1 => 0,
            splits => self.partial_bytes(splits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Products of rows `[batch, side, side, ..]`.
    fn shape(dtype: DType, batch: usize, [side, columns, depth]: [usize; 3]) -> Shape {
        Shape::of_samples(dtype, &[batch, side, side, 1], columns, depth)
    }

    /// Side, columns and depth of what Stable Diffusion 1.5 is made of at 512x512, by level: a 3x3 convolution, a projection, the
    /// two products of a feed-forward.
    const LEVELS: [[[usize; 3]; 4]; 4] = [
        [[64, 320, 2880], [64, 320, 320], [64, 2560, 320], [64, 320, 1280]],
        [[32, 640, 5760], [32, 640, 640], [32, 5120, 640], [32, 640, 2560]],
        [[16, 1280, 11520], [16, 1280, 1280], [16, 10240, 1280], [16, 1280, 5120]],
        [[8, 1280, 11520], [8, 1280, 1280], [8, 10240, 1280], [8, 1280, 5120]],
    ];

    /// Some more: one row, the time embedding, ragged sizes, the decoder's last.
    const OTHERS: [[usize; 3]; 7] =
        [[1, 1, 1], [1, 1280, 320], [1, 1280, 1280], [3, 77, 5003], [7, 33, 130], [24, 640, 8640], [512, 3, 1152]];

    fn shapes() -> impl Iterator<Item = (DType, [usize; 3])> {
        let dtypes = [DType::F32, DType::F16, DType::BF16];
        let all = LEVELS.concat().into_iter().chain(OTHERS);
        all.flat_map(move |size| dtypes.map(|dtype| (dtype, size)))
    }

    #[test]
    fn small_images_split_and_large_ones_do_not() {
        let splits = |size| shape(DType::F16, 2, size).cut().splits;
        assert_eq!(LEVELS[0].map(splits), [1; 4]);
        for level in &LEVELS[2..] {
            assert!(splits(level[0]) > 1 && splits(level[3]) > 1, "{level:?}");
        }
        let Cut { tile, splits, .. } = shape(DType::F16, 2, LEVELS[3][0]).cut();
        assert!(128usize.div_ceil(tile.rows) * 1280usize.div_ceil(tile.columns) * splits >= 100);
    }

    /// Its kernel is for all of these, the deep ones in one round of blocks; at 8x8, where the weights' way from memory is what takes
    /// the time, on half of the multiprocessors.
    #[test]
    fn hopper_takes_the_levels_of_stable_diffusion() {
        for size in LEVELS.concat() {
            let shape = shape(DType::F16, 2, size).on_hopper(Hopper::Auto, true);
            let Cut { tile, splits, .. } = shape.cut();
            let blocks = shape.rows.div_ceil(tile.rows) * shape.columns.div_ceil(tile.columns) * splits;
            let least = if size[0] == 8 { 40 } else { 80 };
            assert!(tile.hopper, "{size:?}");
            assert!(size[2] < 2560 || (least..=132).contains(&blocks), "{size:?}: {blocks} blocks");
        }
    }

    #[test]
    fn hopper_is_where_it_can() {
        let small = shape(DType::F16, 1, [1, 8, 16]);
        assert!(!small.on_hopper(Hopper::Auto, true).cut().tile.hopper);
        assert!(small.on_hopper(Hopper::Always, true).cut().tile.hopper);
        let large = LEVELS[0][0];
        assert!(!shape(DType::F16, 2, large).on_hopper(Hopper::Always, false).cut().tile.hopper);
        assert!(!shape(DType::F32, 2, large).on_hopper(Hopper::Always, true).cut().tile.hopper);
    }

    #[test]
    fn splits_follow_from_the_sample() {
        for (dtype, size) in shapes() {
            let of_batch = |batch| {
                let Cut { splits, depth, .. } = shape(dtype, batch, size).cut();
                (splits, depth)
            };
            for batch in [2, 3, 16, 64] {
                assert_eq!(of_batch(batch), of_batch(1), "{dtype} {size:?}");
            }
        }
    }

    #[test]
    fn tiles_follow_from_all_rows() {
        let tile = |batch| shape(DType::F16, batch, [8, 1280, 1280]).cut().tile.name;
        assert_eq!((tile(1), tile(64)), ("64", "128"));
        for (_, size) in shapes() {
            assert_eq!(shape(DType::F32, 64, size).cut().tile.name, "64");
        }
    }

    #[test]
    fn parts_are_whole_stages_and_none_is_empty() {
        for (dtype, size) in shapes() {
            let shape = shape(dtype, 2, size);
            let Cut { splits, depth, .. } = shape.cut();
            assert!(depth.is_multiple_of(GRAIN / dtype.bytes()), "{dtype} {size:?}");
            assert!((splits - 1) * depth < shape.depth && shape.depth <= splits * depth, "{dtype} {size:?}");
            assert_eq!(shape.workspace() > 0, splits > 1);
        }
    }
}
