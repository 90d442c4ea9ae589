//! kernels/conformance.cu and sm90_conformance.cu on the device and on the emulation, each held against the PTX ISA's words in
//! plain loops.
//!
//! Data movement, conversions, shuffles, divisions and sums in a fixed order must have the same bits; a NaN need only be a NaN. The
//! tensor cores add 17 terms in an order and to a width of their own: each may lose one unit of 2^-23 of the sum of magnitudes, and
//! small integers are exact. ex2.approx is documented to 2 units of the last place.

use crate::device::Device;
use crate::section::{Item, Row, Run};
use crate::sm90;
use bytemuck::{Pod, Zeroable, cast_slice};
use half::{bf16, f16};
use rarebit::Result;
use rarebit::exec::cuda::{Address, Divisor, Driver, Launch, TensorMap};
use rarebit::program::DType;

/// Matches `ConformanceParams` in kernels/conformance.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Params {
    a: Address,
    b: Address,
    c: Address,
    out: Address,
    count: i64,
}
const _: () = assert!(size_of::<Params>() == 40);

/// Matches what is behind the tensor maps of `Sm90ConformanceParams` in kernels/sm90_conformance.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Sm90ConformanceParams {
    params: Params,
    unused: [i64; 11],
}
const _: () = assert!(size_of::<Sm90ConformanceParams>() + 2 * TensorMap::BYTES == 384);

/// A launch and what must come of it.
pub struct Trial {
    pub kernel: String,
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    pub operands: [Vec<u8>; 3],
    /// Of the first two operands, for kernels that take such; where they lie is filled in.
    pub maps: Vec<TensorMap>,
    pub count: usize,
    pub expected: Expected,
}

pub enum Expected {
    /// These bits.
    Words(Vec<u32>),
    /// The same where a NaN may be any: as f32, or as two 16-bit floats whose NaNs are above these bits (sign aside).
    Floats(Vec<f32>),
    Pairs(Vec<u32>, u16),
    /// Within so many units, one unit given for each value; infinities and NaN as they are.
    Near {
        values: Vec<f64>,
        units: Vec<f64>,
        allowed: f64,
        unit: &'static str,
    },
}

impl Expected {
    fn len(&self) -> usize {
        match self {
            Expected::Words(words) | Expected::Pairs(words, _) => words.len(),
            Expected::Floats(values) => values.len(),
            Expected::Near { values, .. } => values.len(),
        }
    }

    fn allowed(&self) -> f64 {
        if let Expected::Near { allowed, .. } = self { *allowed } else { 0.0 }
    }

    /// The largest error of some words, and the first that is too far off. Of exact values the error is how many differ.
    fn judge(&self, found: &[u32]) -> (f64, Option<String>) {
        let differ = |same: &dyn Fn(usize) -> bool, show: &dyn Fn(usize) -> String| {
            let wrong: Vec<usize> = (0..self.len()).filter(|i| !same(*i)).collect();
            let first = wrong.first().map(|i| format!("word {i} is {:#010x}, not {}", found[*i], show(*i)));
            (wrong.len() as f64, first)
        };
        match self {
            Expected::Words(words) => differ(&|i| found[i] == words[i], &|i| format!("{:#010x}", words[i])),
            Expected::Floats(values) => {
                let same = |i: usize| {
                    let value = f32::from_bits(found[i]);
                    found[i] == values[i].to_bits() || value.is_nan() && values[i].is_nan()
                };
                differ(&same, &|i| format!("{:#010x}", values[i].to_bits()))
            }
            Expected::Pairs(words, infinity) => {
                let half = |a: u32, b: u32| {
                    let nan = |x: u32| x & 0x7fff > u32::from(*infinity);
                    a == b || nan(a) && nan(b)
                };
                let same =
                    |i: usize| half(found[i] & 0xffff, words[i] & 0xffff) && half(found[i] >> 16, words[i] >> 16);
                differ(&same, &|i| format!("{:#010x}", words[i]))
            }
            Expected::Near { values, units, allowed, unit } => {
                let mut worst = (0.0, None);
                for (i, (value, size)) in values.iter().zip(units).enumerate() {
                    let got = f64::from(f32::from_bits(found[i]));
                    let error = match (got.is_nan(), value.is_nan()) {
                        (true, true) => 0.0,
                        (false, false) if got == *value => 0.0,
                        (false, false) if got.is_finite() && value.is_finite() => (got - value).abs() / size,
                        _ => f64::INFINITY,
                    };
                    if error > worst.0 {
                        let what = format!("word {i} is {got:e}, not {value:e}: {error:.1} {unit}");
                        worst = (error, (error > *allowed).then_some(what));
                    }
                }
                worst
            }
        }
    }
}

impl Trial {
    fn new(
        kernel: impl Into<String>,
        threads: usize,
        operands: [Vec<u8>; 3],
        count: usize,
        expected: Expected,
    ) -> Trial {
        Trial { kernel: kernel.into(), threads, shared: 0, operands, maps: vec![], count, expected }
    }

    fn run(&self, driver: &mut dyn Driver) -> Result<Vec<u32>> {
        // Words behind the last one, which must stay as they were.
        const BEHIND: usize = 64;
        let mut held = vec![];
        let mut addresses = [Address::NULL; 3];
        for (address, bytes) in addresses.iter_mut().zip(&self.operands).filter(|(_, bytes)| !bytes.is_empty()) {
            *address = driver.allocate(bytes.len())?;
            driver.write(*address, bytes)?;
            held.push(*address);
        }
        let mut words = vec![0u32; self.expected.len() + BEHIND];
        let out = driver.allocate(4 * words.len())?;
        held.push(out);
        driver.fill(out, 0xff, 4 * words.len())?;
        let [a, b, c] = addresses;
        let params = Params { a, b, c, out, count: self.count as i64 };
        let (name, threads, shared) = (self.name(), self.threads, self.shared);
        let mut launch = if self.maps.is_empty() {
            Launch::new(name, [1, 1, 1], threads, shared, params)
        } else {
            let place = |(map, address): (&TensorMap, Address)| TensorMap { address, ..map.clone() };
            let maps = self.maps.iter().zip(addresses).map(place).collect();
            Launch::new(name, [1, 1, 1], threads, shared, Sm90ConformanceParams { params, unused: [0; 11] })
                .with_maps(maps)
        };
        launch.encode_maps(driver)?;
        let function = driver.function(&launch.kernel, launch.shared)?;
        driver.launch(function, &launch)?;
        driver.synchronize()?;
        driver.read(out, bytemuck::cast_slice_mut(&mut words))?;
        held.into_iter().try_for_each(|address| driver.release(address))?;
        let behind = words.split_off(self.expected.len());
        match behind.iter().position(|word| *word != u32::MAX) {
            None => Ok(words),
            Some(at) => Err(rarebit::Error::Device(format!("{} writes {at} words behind its output", launch.kernel))),
        }
    }

    fn name(&self) -> String {
        format!("conformance_{}", self.kernel)
    }

    fn rows(&self, name: String, dtype: &str, device: &Device) -> Result<Vec<Row>> {
        let found = self.run(&mut device.lease())?;
        let (mut error, mut wrong) = self.expected.judge(&found);
        if device.is_gpu {
            let emulated = self.run(&mut device.emulated()?)?;
            let (other, what) = self.expected.judge(&emulated);
            error = error.max(other);
            wrong = wrong.or(what.map(|what| format!("the emulation: {what}")));
        }
        let what = wrong.unwrap_or_else(|| match &self.expected {
            Expected::Near { unit, .. } => unit.to_string(),
            Expected::Words(_) | Expected::Floats(_) | Expected::Pairs(..) => "words that differ".into(),
        });
        Ok(vec![Row::new(name, dtype, error, self.expected.allowed(), what)])
    }
}

/// SplitMix64.
pub struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn word(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    pub fn below(&mut self, n: u32) -> u32 {
        self.word() % n
    }

    /// In [-1, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn words(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.word()).collect()
    }
}

pub fn bytes<T: Pod>(values: &[T]) -> Vec<u8> {
    cast_slice(values).to_vec()
}

fn cp_async(random: &mut Random) -> Trial {
    let (first, second) = (random.words(4 * 128), random.words(4 * 128));
    let sizes: Vec<u32> =
        (0..128).map(|t| if t < 17 { t } else { [0, 16, random.below(17)][t as usize % 3] }).collect();
    let line = |thread: usize| {
        let copied = &cast_slice::<u32, u8>(&first)[16 * thread..][..sizes[thread] as usize];
        let mut line = [0u8; 16];
        line[..copied.len()].copy_from_slice(copied);
        line
    };
    let mut expected: Vec<u8> = (0..128).rev().flat_map(line).collect();
    expected.extend((0..128).rev().flat_map(|t| &cast_slice::<u32, u8>(&second)[16 * t..][..16]));
    let words = expected.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect();
    let operands = [bytes(&first), bytes(&sizes), bytes(&second)];
    Trial::new("cp_async", 128, operands, 0, Expected::Words(words))
}

fn ldmatrix(random: &mut Random, transposed: bool) -> Trial {
    let words = random.words(4 * 32);
    let elements: &[u16] = cast_slice(&words);
    let rows: Vec<u32> = (0..32).map(|_| random.below(32)).collect();
    // Row r of matrix i is where lane 8 i + r says.
    let at = |i: usize, r: usize, c: usize| u32::from(elements[8 * rows[8 * i + r] as usize + c]);
    let mut expected = vec![];
    for lane in 0..32 {
        let (row, column) = (lane / 4, 2 * (lane % 4));
        for i in 0..4 {
            let [low, high] = match transposed {
                false => [at(i, row, column), at(i, row, column + 1)],
                true => [at(i, column, row), at(i, column + 1, row)],
            };
            expected.push(low | high << 16);
        }
    }
    let kernel = if transposed { "ldmatrix_trans" } else { "ldmatrix" };
    let operands = [bytes(&words), bytes(&rows), vec![]];
    Trial::new(kernel, 32, operands, 0, Expected::Words(expected))
}

/// A 16-bit type of the tensor cores.
#[derive(Clone, Copy)]
pub struct Half {
    pub name: &'static str,
    pub dtype: DType,
    pub to: fn(f32) -> u16,
    pub from: fn(u16) -> f32,
    infinity: u16,
}

pub const F16: Half = Half {
    name: "f16",
    dtype: DType::F16,
    to: |x| f16::from_f32(x).to_bits(),
    from: |bits| f16::from_bits(bits).to_f32(),
    infinity: 0x7c00,
};

pub const BF16: Half = Half {
    name: "bf16",
    dtype: DType::BF16,
    to: |x| bf16::from_f32(x).to_bits(),
    from: |bits| bf16::from_bits(bits).to_f32(),
    infinity: 0x7f80,
};

/// What the operands of a product are.
#[derive(Clone, Copy, PartialEq)]
pub enum Factors {
    Integers,
    Uniform,
    /// Of all magnitudes, subnormal ones too.
    Wide,
    /// With infinities and NaN among them.
    Special,
}

pub const FACTORS: [(Factors, &str); 4] = [
    (Factors::Integers, "integers"),
    (Factors::Uniform, "uniform"),
    (Factors::Wide, "wide"),
    (Factors::Special, "special"),
];

fn mma(random: &mut Random, half: Half, factors: Factors) -> Trial {
    let mut element = || -> u16 {
        let x = random.uniform();
        match factors {
            Factors::Integers => (half.to)((8.0 * x).round() as f32),
            Factors::Uniform => (half.to)(2.0 * x as f32),
            // Down to the subnormal numbers of f16; of bf16 those would vanish beside the others.
            Factors::Wide => (half.to)((x * f64::from(random.below(28)).exp2() * 2f64.powi(-24)) as f32),
            Factors::Special => match random.below(120) {
                0 => half.infinity,
                1 => half.infinity | 0x8000,
                2 => half.infinity + 1,
                3 => 0,
                _ => (half.to)(x as f32),
            },
        }
    };
    let a: Vec<u16> = (0..32 * 8).map(|_| element()).collect();
    let b: Vec<u16> = (0..32 * 4).map(|_| element()).collect();
    let c: Vec<f32> = (0..32 * 4)
        .map(|_| match factors {
            Factors::Integers => (100.0 * random.uniform()).round() as f32,
            Factors::Uniform | Factors::Wide | Factors::Special => (4.0 * random.uniform()) as f32,
        })
        .collect();
    // PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": element i of a lane of group g and number t in it.
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..8 {
            let row = if matches!(i, 0 | 1 | 4 | 5) { g } else { g + 8 };
            let column = if i < 4 { 2 * t + i % 2 } else { 2 * t + i % 2 + 8 };
            left[row][column] = f64::from((half.from)(a[8 * lane + i]));
        }
        for i in 0..4 {
            let row = if i < 2 { 2 * t + i % 2 } else { 2 * t + i % 2 + 8 };
            right[row][g] = f64::from((half.from)(b[4 * lane + i]));
        }
    }
    let (mut values, mut units) = (vec![], vec![]);
    for lane in 0..32 {
        for i in 0..4 {
            let (row, column) = (if i < 2 { lane / 4 } else { lane / 4 + 8 }, 2 * (lane % 4) + i % 2);
            let c = f64::from(c[4 * lane + i]);
            let products = (0..16).map(|k| left[row][k] * right[k][column]);
            values.push(products.clone().fold(c, |sum, x| sum + x));
            let magnitude = products.fold(c.abs(), |sum, x| sum + x.abs());
            units.push((magnitude * 2f64.powi(-23)).max(f64::MIN_POSITIVE));
        }
    }
    let allowed = if factors == Factors::Integers { 0.0 } else { 17.0 };
    let expected = Expected::Near { values, units, allowed, unit: "units of 2^-23 of the sum of magnitudes" };
    Trial::new(format!("mma_{}", half.name), 32, [bytes(&a), bytes(&b), bytes(&c)], 0, expected)
}

fn exp2(random: &mut Random) -> Trial {
    let mut x: Vec<f32> = (0..4096).map(|_| (150.0 * random.uniform()) as f32).collect();
    x.extend((0..1024).map(|_| random.uniform() as f32));
    x.extend((-140..=130).map(|n| n as f32));
    x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN, f32::MAX, f32::from_bits(1), -1e-40]);
    // Subnormal results are 0 on the device; the emulation keeps them.
    let smallest = f64::from(f32::MIN_POSITIVE);
    let value = |x: &f32| match f64::from(*x).exp2() {
        y if y >= 128f64.exp2() => f64::INFINITY,
        y => y,
    };
    let unit = |y: &f64| {
        if *y < smallest { smallest } else { (y.log2().floor() - 23.0).exp2() }
    };
    let values: Vec<f64> = x.iter().map(value).collect();
    let units = values.iter().map(unit).collect();
    let expected = Expected::Near { values, units, allowed: 2.0, unit: "units of the last place" };
    Trial::new("exp2", 256, [bytes(&x), vec![], vec![]], x.len(), expected)
}

fn shuffle(random: &mut Random) -> Trial {
    let x = random.words(32);
    let by_flip = (0..32).flat_map(|flip| (0..32).map(move |lane| lane ^ flip));
    let from = by_flip.chain((0..32).flat_map(|from| [from; 32]));
    let expected = Expected::Words(from.map(|lane: usize| x[lane]).collect());
    Trial::new("shuffle", 32, [bytes(&x), vec![], vec![]], 0, expected)
}

/// A butterfly of a warp: with a commutative operation all lanes get the same.
fn butterfly(values: &[f32], f: fn(f32, f32) -> f32) -> f32 {
    let mut values = values.to_vec();
    for flip in [16, 8, 4, 2, 1] {
        values = (0..32).map(|lane| f(values[lane], values[lane ^ flip])).collect();
    }
    values[0]
}

fn sums(random: &mut Random) -> Trial {
    // No zeros: which of two zeros is larger is not said.
    let wide = |random: &mut Random| (random.uniform() * f64::from(random.below(40)).exp2()) as f32;
    let mut x: Vec<f32> = (0..256).map(|_| wide(random)).collect();
    x[random.below(256) as usize] = f32::from_bits(3);
    if random.below(2) == 0 {
        x[random.below(256) as usize] = f32::INFINITY;
    }
    let add: fn(f32, f32) -> f32 = |a, b| a + b;
    let reduce = |f: fn(f32, f32) -> f32, rest: f32| {
        let warps: Vec<f32> = x.chunks(32).map(|warp| butterfly(warp, f)).collect();
        let padded: Vec<f32> = (0..32).map(|i| warps.get(i).copied().unwrap_or(rest)).collect();
        let all = butterfly(&padded, f);
        let of_warps: Vec<f32> = (0..256).map(|t| warps[t / 32]).collect();
        (of_warps, vec![all; 256])
    };
    let ((warp_sum, block_sum), (warp_max, block_max)) = (reduce(add, 0.0), reduce(f32::max, f32::NEG_INFINITY));
    let expected = Expected::Floats([warp_sum, warp_max, block_sum, block_max].concat());
    Trial::new("sums", 256, [bytes(&x), vec![], vec![]], 0, expected)
}

/// Numbers where rounding goes wrong: any bits, halfway between neighbours and just beside, at the ends of the range.
fn narrow(random: &mut Random, half: Half) -> Trial {
    let mut x: Vec<f32> = random.words(1 << 14).into_iter().map(f32::from_bits).collect();
    for _ in 0..1 << 13 {
        let bits = (random.word() as u16) & 0x7fff;
        if bits >= half.infinity - 1 {
            continue;
        }
        // Exact: a 16-bit float has 11 bits at most.
        let middle = ((half.from)(bits) + (half.from)(bits + 1)) / 2.0;
        let middle = if random.below(2) == 0 { middle } else { -middle };
        x.extend([middle, middle.next_up(), middle.next_down(), (half.from)(bits)]);
    }
    let largest = (half.from)(half.infinity - 1);
    let smallest = (half.from)(1);
    for limit in [largest, smallest, smallest / 2.0, f32::MAX, f32::MIN_POSITIVE] {
        x.extend([limit, limit.next_up(), limit.next_down(), -limit, (-limit).next_up(), (-limit).next_down()]);
    }
    // Halfway to what would be the next number after the largest.
    let next = largest + (largest - (half.from)(half.infinity - 2)) / 2.0;
    x.extend([next, next.next_down(), 0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN]);
    if x.len() % 2 == 1 {
        x.push(1.0);
    }
    let words: Vec<u32> =
        x.chunks_exact(2).map(|pair| u32::from((half.to)(pair[0])) | u32::from((half.to)(pair[1])) << 16).collect();
    let (count, expected) = (words.len(), Expected::Pairs(words, half.infinity));
    Trial::new(format!("narrow_{}", half.name), 256, [bytes(&x), vec![], vec![]], count, expected)
}

/// Every number there is.
fn widen(half: Half) -> Trial {
    let x: Vec<u16> = (0..=u16::MAX).collect();
    let expected = Expected::Floats(x.iter().map(|x| (half.from)(*x)).collect());
    Trial::new(format!("widen_{}", half.name), 256, [bytes(&x), vec![], vec![]], x.len(), expected)
}

fn divide(random: &mut Random) -> Trial {
    let (mut n, mut by, mut quotients) = (vec![], vec![], vec![]);
    for i in 0..4096u32 {
        let divisor = match i % 4 {
            0 => 1 + i / 4,
            1 => 1 << (i % 31),
            _ => 1 + random.below((1 << 31) - 1) % (1 << (1 + random.below(30))),
        };
        let limit = (1u32 << 31) - 1;
        let multiple = random.below(1 + limit / divisor) * divisor;
        let x = [multiple, multiple.saturating_sub(1), limit, random.below(limit)][i as usize / 4 % 4];
        n.push(x);
        by.push(Divisor::new(divisor as usize));
        quotients.push(x / divisor);
    }
    let operands = [bytes(&n), bytes(&by), vec![]];
    Trial::new("divide", 256, operands, n.len(), Expected::Words(quotients))
}

type Simple = fn(&mut Random) -> Trial;
type Make = Box<dyn Fn(&mut Random) -> Trial + Send + Sync>;

pub fn items(subset: bool) -> Vec<Item> {
    let seeds = if subset { 1 } else { 8 };
    let makes: [(&str, &str, Simple); 9] = [
        ("cp_async", "u32", cp_async),
        ("ldmatrix", "u16", |random| ldmatrix(random, false)),
        ("ldmatrix_trans", "u16", |random| ldmatrix(random, true)),
        ("exp2", "f32", exp2),
        ("shuffle", "u32", shuffle),
        ("sums", "f32", sums),
        ("narrow", "f16", |random| narrow(random, F16)),
        ("narrow", "bf16", |random| narrow(random, BF16)),
        ("divide", "u32", divide),
    ];
    let mut items = vec![];
    let mut item = |name: String, dtype: &'static str, seed: u64, make: Make| {
        items.push(Item::new(name.clone(), dtype, move || {
            let (trial, name) = (make(&mut Random(seed)), name.clone());
            let (kernel, hopper) = (trial.name(), !trial.maps.is_empty());
            let run = Run::new(name.clone(), move |device| trial.rows(name, dtype, device));
            Ok(vec![run.about(vec![kernel]).for_hopper(hopper)])
        }));
    };
    for seed in 0..seeds {
        for (name, dtype, make) in makes {
            item(format!("{name}, seed {seed}"), dtype, seed, Box::new(make));
        }
        for half in [F16, BF16] {
            for number in 0..sm90::BOX_COUNT {
                let make = move |random: &mut Random| sm90::boxes(random, half, number);
                item(format!("box {number}, seed {seed}"), half.name, seed, Box::new(make));
            }
            for product in sm90::PRODUCTS {
                for (factors, words) in sm90::Product::factors() {
                    let make = move |random: &mut Random| product.trial(random, half, factors);
                    item(format!("{} of {words}, seed {seed}", product.name()), half.name, seed, Box::new(make));
                }
            }
            for (factors, words) in FACTORS {
                let make = move |random: &mut Random| mma(random, half, factors);
                item(format!("mma of {words}, seed {seed}"), half.name, seed, Box::new(make));
            }
        }
    }
    for half in [F16, BF16] {
        item("widen, every number".into(), half.name, 0, Box::new(move |_| widen(half)));
    }
    items
}
