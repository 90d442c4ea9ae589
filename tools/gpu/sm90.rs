//! Trials of kernels/sm90_conformance.cu: where boxes lie in shared memory, and products of a warpgroup in plain loops.

use crate::conformance::{Expected, FACTORS, Factors, Half, Random, Trial, bytes};
use rarebit::exec::cuda::{Address, TensorMap};

/// Bytes and elements of a line of a box.
const LINE_BYTES: usize = TensorMap::LINE_BYTES;
const LINE: usize = TensorMap::LINE;

/// A tensor's extents and strides, a box of it, and where that begins.
struct Boxed {
    extents: [usize; 4],
    strides: [usize; 3],
    window: [usize; 4],
    at: [i32; 4],
}

/// Whole, over each end of each dimension, wider than the tensor, beside it. Then tensors whose strides do not ascend, as those of the
/// weights of a GEGLU in `Sm90Gemm::right_map`: eights of lines by turns from a first and a second half of so many lines.
const BOXES: [Boxed; 8] = {
    const fn dense(extents: [usize; 4], window: [usize; 4], at: [i32; 4]) -> Boxed {
        Boxed { extents, strides: dense_strides(extents), window, at }
    }
    const fn halves([line, half]: [usize; 2], window: [usize; 4], at: [i32; 4]) -> Boxed {
        Boxed { extents: [line, 8, 2, half / 8], strides: [line, half * line, 8 * line], window, at }
    }
    [
        dense([64, 8, 1, 1], [64, 8, 1, 1], [0; 4]),
        dense([160, 9, 7, 3], [64, 4, 4, 2], [64, 2, 1, 1]),
        dense([160, 9, 7, 3], [64, 8, 4, 2], [128, -1, -1, 2]),
        dense([160, 9, 7, 3], [64, 4, 8, 1], [0, 7, 5, 0]),
        dense([40, 3, 130, 2], [64, 1, 128, 1], [0, 2, 64, 1]),
        dense([64, 20, 2, 2], [64, 16, 1, 1], [0, 32, 0, 0]),
        halves([128, 160], [64, 8, 2, 8], [64, 0, 0, 8]),
        // Beyond the lines' end, and beyond the last eight of each half.
        halves([72, 88], [64, 8, 2, 10], [64, 0, 0, 5]),
    ]
};

pub const BOX_COUNT: usize = BOXES.len();

const fn dense_strides([x, y, z, _]: [usize; 4]) -> [usize; 3] {
    [x, x * y, x * y * z]
}

/// A dense tensor.
fn dense(half: Half, extents: [usize; 4], window: [usize; 4]) -> TensorMap {
    TensorMap { dtype: half.dtype, address: Address::NULL, extents, strides: dense_strides(extents), window }
}

/// CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B: the 16-byte chunk `c` of line `l` lies at chunk `c xor l mod 8`.
pub fn boxes(random: &mut Random, half: Half, number: usize) -> Trial {
    let Boxed { extents, strides, window, at } = BOXES[number];
    let count = extents.iter().product::<usize>();
    let tensor: Vec<u16> = random.words(count).into_iter().map(|word| word as u16).collect();
    let element = |place: [i64; 4]| {
        let inside = place.iter().zip(extents).all(|(i, n)| (0..n as i64).contains(i));
        let index = (1..4).fold(place[0], |index, i| index + place[i] * strides[i - 1] as i64);
        if inside { tensor[index as usize] } else { 0 }
    };
    let elements: usize = window.iter().product();
    let mut lying = vec![0u16; elements];
    for i in 0..elements {
        let (line, column) = (i / LINE, i % LINE);
        let within = [column, line % window[1], line / window[1] % window[2], line / window[1] / window[2]];
        let place = std::array::from_fn(|d| i64::from(at[d]) + within[d] as i64);
        lying[line * LINE + ((column / 8) ^ (line % 8)) * 8 + column % 8] = element(place);
    }
    let words = lying.chunks_exact(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect::<Vec<_>>();
    Trial {
        kernel: "sm90_boxes".into(),
        threads: 128,
        shared: elements * 2,
        operands: [bytes(&tensor), vec![], bytes(&at)],
        maps: vec![TensorMap { strides, ..dense(half, extents, window) }; 2],
        count: words.len(),
        expected: Expected::Words(words),
    }
}

/// Which product: the left operand from registers or boxes, lines of the right one across the reduced dimension or along it, columns.
/// Lines across it are boxes of 64 columns, and 40, 80 and 160 columns end within one.
#[derive(Clone, Copy)]
pub struct Product {
    pub registers: bool,
    pub across: bool,
    pub columns: usize,
}

pub const PRODUCTS: [Product; 12] = {
    const fn product(registers: bool, across: bool, columns: usize) -> Product {
        Product { registers, across, columns }
    }
    [
        product(false, false, 64),
        product(false, false, 128),
        product(false, false, 160),
        product(false, true, 40),
        product(false, true, 80),
        product(false, true, 128),
        product(false, true, 160),
        product(true, true, 40),
        product(true, true, 64),
        product(true, true, 80),
        product(true, true, 128),
        product(true, true, 160),
    ]
};

impl Product {
    pub fn name(self) -> String {
        let from = if self.registers { "registers" } else { "boxes" };
        format!("wgmma_{from}_{}_{}", if self.across { 'a' } else { 'r' }, self.columns)
    }

    /// Finite operands of each sort.
    pub fn factors() -> impl Iterator<Item = (Factors, &'static str)> {
        FACTORS.into_iter().filter(|(factors, _)| matches!(factors, Factors::Integers | Factors::Uniform))
    }

    pub fn trial(self, random: &mut Random, half: Half, factors: Factors) -> Trial {
        let n = self.columns;
        let integers = factors == Factors::Integers;
        let mut uniform = |scale: f64| match integers {
            true => (scale * random.uniform()).round() as f32,
            false => (scale * random.uniform()) as f32,
        };
        let mut matrix = |count: usize| (0..count).map(|_| (half.to)(uniform(4.0))).collect::<Vec<u16>>();
        let (a, b) = (matrix(64 * LINE), matrix(n * LINE));
        let c: Vec<f32> = (0..128 * n / 2).map(|_| uniform(50.0)).collect();
        let left = |row: usize, k: usize| f64::from((half.from)(a[row * LINE + k]));
        let right = |k: usize, column: usize| {
            f64::from((half.from)(if self.across { b[k * n + column] } else { b[column * LINE + k] }))
        };
        let (mut values, mut units) = (vec![], vec![]);
        for (index, c) in c.iter().enumerate() {
            let (row, column) = accumulator(index / (n / 2), index % (n / 2));
            let products = (0..LINE).map(|k| left(row, k) * right(k, column));
            let c = f64::from(*c);
            values.push(products.clone().fold(c, |sum, x| sum + x));
            let magnitude = products.fold(c.abs(), |sum, x| sum + x.abs());
            units.push(magnitude * 2f64.powi(-23));
        }
        // Four products of sixteen terms and a sum each.
        let allowed = if integers { 0.0 } else { 4.0 * 17.0 };
        let expected = Expected::Near { values, units, allowed, unit: "units of 2^-23 of the sum of magnitudes" };
        let boxes = if self.across { n.div_ceil(LINE) * LINE } else { n };
        let of_b = if self.across { ([n, LINE, 1, 1], [LINE, LINE, 1, 1]) } else { ([LINE, n, 1, 1], [LINE, n, 1, 1]) };
        Trial {
            kernel: format!("sm90_{}_{}", self.name(), half.name),
            threads: 128,
            shared: (64 + boxes) * LINE_BYTES,
            operands: [if self.registers { fragments(&a) } else { bytes(&a) }, bytes(&b), bytes(&c)],
            maps: vec![dense(half, [LINE, 64, 1, 1], [LINE, 64, 1, 1]), dense(half, of_b.0, of_b.1)],
            count: 0,
            expected,
        }
    }
}

/// PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16", accumulator: row and column of register `i` of a thread.
fn accumulator(thread: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (16 * warp + lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
}

/// The same page, left operand in registers: at each step of 16 four registers of a thread, two elements each.
fn fragments(a: &[u16]) -> Vec<u8> {
    let mut elements = vec![];
    for step in 0..LINE / 16 {
        for thread in 0..128 {
            let (warp, lane) = (thread / 32, thread % 32);
            for i in 0..8 {
                let row = 16 * warp + lane / 4 + if matches!(i, 0 | 1 | 4 | 5) { 0 } else { 8 };
                let column = 2 * (lane % 4) + i % 2 + if i < 4 { 0 } else { 8 };
                elements.push(a[row * LINE + 16 * step + column]);
            }
        }
    }
    bytes(&elements)
}
