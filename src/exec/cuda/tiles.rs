//! How a product is cut over the multiprocessors: the tile of outputs that a block computes, the parts its reduced dimension is
//! split into, the depth of its ring. A pure function of the shape, fed by one table (`rates`); the same on every GPU.

use super::launch::SHARED;
use super::rates::{TABLE, Table};
use super::shape::{Cut, Hopper, Lines, RINGS, Shape, Tile, ring_bytes};
use crate::program::DType;

/// Bytes of depth that parts are made of: whole stages of every kernel, so that all tiles split alike.
const GRAIN: usize = 128;
/// Parts that a product may be split into, where it is deep enough.
const SPLITS: [usize; 12] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32];
/// Of all splits that come this close to the best the fewest are taken: in a larger batch parts are as many bytes more, and of less
/// use.
const CLOSE: f64 = 1.25;
/// Samples that splits are chosen for, whatever the batch: those of guidance.
const NOMINAL_BATCH: usize = 2;

impl Shape {
    /// Of rows that belong to samples: `[B, .., C]`.
    pub fn of_samples(dtype: DType, of_rows: &[usize], columns: usize, depth: usize) -> Shape {
        let per_sample: usize = of_rows[1..of_rows.len() - 1].iter().product();
        let (rows, nominal_rows) = (of_rows[0] * per_sample, NOMINAL_BATCH * per_sample);
        Shape { dtype, rows, nominal_rows, columns, depth, hopper: Hopper::Off, boxes: None }
    }

    /// The same for kernels/sm90_gemm.cu, if it `can` make it in 16 bits, with such lines of the right operand.
    pub fn on_hopper(self, hopper: Hopper, lines: Lines, can: bool) -> Shape {
        Shape { hopper, boxes: (can && self.dtype != DType::F32).then_some(lines), ..self }
    }

    pub fn cut(&self) -> Cut {
        self.cut_by(&TABLE)
    }

    /// Splits and instructions change the order of additions, so they follow from what a sample has; a tile and its ring do not
    /// (kernels/gemm_mainloop.cuh), so the tile follows from all rows.
    pub fn cut_by(&self, table: &Table) -> Cut {
        let kinds: &[bool] = match self.hopper {
            Hopper::Forced(cut) => return cut,
            Hopper::Always if self.boxes.is_some() => &[true],
            Hopper::Auto if self.boxes.is_some() => &[false, true],
            Hopper::Off | Hopper::Auto | Hopper::Always => &[false],
        };
        let best = |shape: &Shape, kinds: &[bool], splits| {
            let cuts = kinds.iter().flat_map(|&kind| table.tiles(kind, shape.dtype));
            let cuts = cuts.map(|&tile| shape.with(tile, splits, shape.stages(&tile)));
            cuts.map(|cut| (cut, table.clocks(shape, &cut))).min_by(|(_, a), (_, b)| a.total_cmp(b)).expect("a tile")
        };
        let nominal = Shape { rows: self.nominal_rows, ..*self };
        let every = SPLITS.map(|splits| best(&nominal, kinds, splits));
        let limit = CLOSE * every.iter().map(|(_, clocks)| *clocks).fold(f64::INFINITY, f64::min);
        let (fewest, _) = every.into_iter().find(|(_, clocks)| *clocks <= limit).expect("the best one");
        best(self, &[fewest.tile.hopper], fewest.splits).0
    }

    /// With as many parts as asked for, or fewer where some would be empty.
    fn with(&self, tile: Tile, splits: usize, stages: usize) -> Cut {
        let depth = self.depth.div_ceil(splits).next_multiple_of(GRAIN / self.dtype.bytes());
        Cut { tile, splits: self.depth.div_ceil(depth), stages, depth }
    }

    /// Stages that a tile's ring can have.
    fn rings(&self, tile: &Tile) -> Vec<usize> {
        match self.boxes {
            Some(lines) if tile.hopper => {
                let fits = |stages: &usize| ring_bytes(tile.columns, lines, *stages) <= SHARED as usize;
                RINGS.into_iter().filter(fits).collect()
            }
            Some(_) | None => vec![tile.stages],
        }
    }

    /// The tile's own, or fewer where that is too many for the lines of the right operand.
    fn stages(&self, tile: &Tile) -> usize {
        self.rings(tile).into_iter().filter(|stages| *stages <= tile.stages).max().unwrap_or(tile.stages)
    }

    /// Every cut that a kernel can compute, whatever [`Shape::hopper`] says: what there is to measure.
    pub fn legal(&self) -> Vec<Cut> {
        let mut cuts: Vec<Cut> = vec![];
        for &tile in [false, true].into_iter().flat_map(|kind| TABLE.tiles(kind, self.dtype)) {
            let rings = self.rings(&tile);
            for (splits, stages) in SPLITS.into_iter().flat_map(|n| rings.iter().map(move |stages| (n, *stages))) {
                let cut = self.with(tile, splits, stages);
                if self.check(&cut).is_ok() && !cuts.contains(&cut) {
                    cuts.push(cut);
                }
            }
        }
        cuts
    }

    /// Why no kernel can compute this cut.
    pub fn check(&self, cut: &Cut) -> Result<(), String> {
        let Cut { tile, splits, stages, depth } = *cut;
        let Shape { dtype, rows, columns, .. } = *self;
        let refuse = |why: String| {
            let kind = if tile.hopper { " for Hopper" } else { "" };
            let cut = format!("tile {}{kind}, {splits} splits, {stages} stages", tile.name);
            Err(format!("{cut}, of {rows}x{columns}x{} {dtype}: {why}", self.depth))
        };
        if tile.hopper && self.boxes.is_none() {
            return refuse("kernels/sm90_gemm.cu cannot make this product".into());
        }
        if !TABLE.tiles(tile.hopper, dtype).iter().any(|known| known.name == tile.name) {
            return refuse(format!("there is no such tile of {dtype}"));
        }
        if splits == 0 || *cut != self.with(tile, splits, stages) {
            return refuse(format!("parts of {depth} reduced elements leave one empty, or are no whole stages"));
        }
        let rings = self.rings(&tile);
        if !rings.contains(&stages) {
            return refuse(format!("its ring can have {rings:?} stages in a block's {SHARED} bytes of shared memory"));
        }
        Ok(())
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
    use super::super::kernels::constants::{GEMM_TILES, SM90_ROWS};
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

    /// A tile's name picks the kernel, and its sides are the kernel's.
    #[test]
    fn tiles_are_those_of_the_kernels() {
        for tile in TABLE.half.iter().chain(&TABLE.single) {
            assert!(GEMM_TILES.iter().any(|row| [row[0]; 2] == [tile.rows, tile.columns]), "{tile:?}");
            assert_eq!(tile.name, tile.rows.to_string());
        }
        for tile in TABLE.hopper {
            assert_eq!((tile.rows, tile.name.into()), (SM90_ROWS, tile.columns.to_string()));
        }
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
            let shape = shape(DType::F16, 2, size).on_hopper(Hopper::Auto, Lines::KMajor, true);
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
        assert!(!small.on_hopper(Hopper::Auto, Lines::KMajor, true).cut().tile.hopper);
        assert!(small.on_hopper(Hopper::Always, Lines::KMajor, true).cut().tile.hopper);
        let large = LEVELS[0][0];
        assert!(!shape(DType::F16, 2, large).on_hopper(Hopper::Always, Lines::KMajor, false).cut().tile.hopper);
        assert!(!shape(DType::F32, 2, large).on_hopper(Hopper::Always, Lines::KMajor, true).cut().tile.hopper);
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

    #[test]
    fn what_is_legal_can_be_forced_and_nothing_else() {
        for (dtype, size) in shapes() {
            let shape = shape(dtype, 2, size).on_hopper(Hopper::Auto, Lines::MNMajor, size[2].is_multiple_of(64));
            let legal = shape.legal();
            assert!(legal.contains(&shape.cut()), "{dtype} {size:?}");
            for &cut in &legal {
                let forced = Shape { hopper: Hopper::Forced(cut), ..shape };
                assert_eq!((forced.cut(), forced.workspace() > 0), (cut, cut.splits > 1));
            }
        }
    }

    #[test]
    fn rings_are_as_deep_as_fits() {
        let mut table = TABLE;
        table.hopper.iter_mut().for_each(|tile| tile.stages = 6);
        for (lines, size) in [Lines::MNMajor, Lines::KMajor]
            .into_iter()
            .flat_map(|lines| LEVELS.concat().into_iter().map(move |size| (lines, size)))
        {
            let shape = shape(DType::F16, 2, size).on_hopper(Hopper::Always, lines, true);
            let cut = shape.cut_by(&table);
            assert_eq!(shape.check(&cut), Ok(()), "{size:?}");
            assert_eq!(cut.stages, if cut.tile.columns == 160 && lines == Lines::MNMajor { 5 } else { 6 });
        }
    }

    #[test]
    fn what_is_not_legal_says_why() {
        let large = shape(DType::BF16, 2, LEVELS[3][0]).on_hopper(Hopper::Auto, Lines::MNMajor, true);
        let single = shape(DType::F32, 2, LEVELS[3][0]).on_hopper(Hopper::Auto, Lines::MNMajor, true);
        let cut = large.cut();
        assert!(cut.tile.hopper && large.check(&cut).is_ok());
        let tile160 = TABLE.hopper[0];
        for (shape, cut, why) in [
            (Shape { boxes: None, ..large }, cut, "cannot make this product"),
            (single, cut, "cannot make this product"),
            (single, single.with(TABLE.half[0], 2, 3), "no such tile of f32"),
            (large, Cut { splits: 0, ..cut }, "leave one empty"),
            (large, Cut { depth: 11520, splits: 2, ..cut }, "leave one empty"),
            (large, Cut { depth: 5761, splits: 2, ..cut }, "no whole stages"),
            (large, Cut { stages: 1, ..cut }, "stages in a block"),
            (large, large.with(TABLE.half[0], 2, 4), "can have [3] stages"),
            (large, large.with(tile160, 2, 6), "can have [3, 4, 5] stages in a block's 232448 bytes"),
        ] {
            let message = shape.check(&cut).unwrap_err();
            assert!(message.contains(why), "{message}");
        }
    }
}
