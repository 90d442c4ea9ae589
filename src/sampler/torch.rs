//! The generators behind `torch.randn` on the CPU and on CUDA, so that seeds of other tools give the same noise here.

use crate::exec::philox::{LN, halves, philox};

/// `torch.randn(n, generator=torch.Generator("cpu").manual_seed(seed))` in f32, bit for bit as x86-64 builds of torch give it on
/// processors with AVX2 (`ATen/native/cpu/DistributionTemplates.h`, `ATen/core/DistributionsHelper.h`; torch 1.x to 2.13).
pub struct TorchCpu {
    engine: Mt19937,
    /// Second half of a scalar Box–Muller pair, kept across draws.
    spare: Option<f64>,
}

impl TorchCpu {
    pub fn new(seed: u64) -> TorchCpu {
        // torch's engine takes the low half of the seed only.
        TorchCpu { engine: Mt19937::new(seed as u32), spare: None }
    }

    /// Fills `out`, the way torch does for a tensor of this many elements: the same seed gives other numbers for another length.
    pub fn normal(&mut self, out: &mut [f32]) {
        if out.len() < 16 {
            out.iter_mut().for_each(|v| *v = self.scalar() as f32);
            return;
        }
        out.iter_mut().for_each(|v| *v = self.uniform());
        out.as_chunks_mut::<16>().0.iter_mut().for_each(sixteen);
        // torch draws the last 16 anew where the length is no multiple of 16, over some that are done already.
        if !out.len().is_multiple_of(16)
            && let Some(last) = out.last_chunk_mut::<16>()
        {
            last.iter_mut().for_each(|v| *v = self.uniform());
            sixteen(last);
        }
    }

    /// 24 bits in [0, 1).
    fn uniform(&mut self) -> f32 {
        (self.engine.next() & 0xff_ffff) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// 53 bits in [0, 1).
    fn uniform_f64(&mut self) -> f64 {
        let (high, low) = (self.engine.next(), self.engine.next());
        let bits = u64::from(high) << 32 | u64::from(low);
        (bits & ((1 << 53) - 1)) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Short tensors: Box–Muller in f64, one number at a time.
    fn scalar(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let (r, theta) = ((-2.0 * (-u2).ln_1p()).sqrt(), std::f64::consts::TAU * u1);
        self.spare = Some(r * theta.sin());
        r * theta.cos()
    }
}

/// Box–Muller over eight pairs `(u[j], u[j + 8])` of uniforms, in place.
fn sixteen(u: &mut [f32; 16]) {
    for j in 0..8 {
        let r = (-2.0 * ln(1.0 - u[j])).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * u[j + 8]);
        // torch adds the mean, 0, which turns -0 into 0.
        (u[j], u[j + 8]) = (r * cos + 0.0, r * sin + 0.0);
    }
}

/// `log256_ps` of avx_mathfun (Cephes `logf`), with the products fused into sums that the compiler of torch's wheels fuses.
fn ln(u: f32) -> f32 {
    let bits = u.max(f32::MIN_POSITIVE).to_bits();
    let mut e = ((bits >> 23) as i32 - 126) as f32;
    let m = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000);
    let mut x = m - 1.0;
    if m < std::f32::consts::FRAC_1_SQRT_2 {
        e -= 1.0;
        x += m;
    }
    let z = x * x;
    let y = LN[1..].iter().fold(LN[0], |y: f32, &p| y.mul_add(x, p)) * x;
    let y = y.mul_add(z, e * -2.121_944_4e-4);
    let y = z.mul_add(-0.5, y);
    e.mul_add(0.693_359_4, x + y)
}

/// `sincos256_ps` of avx_mathfun (Cephes `sinf`, `cosf`) for angles ≥ 0, fused like [`ln`].
fn sin_cos(angle: f32) -> (f32, f32) {
    let octant = ((angle * (4.0 / std::f32::consts::PI)) as i32 + 1) & !1;
    let y = octant as f32;
    let x = y.mul_add(-0.785_156_25, angle);
    let x = y.mul_add(-2.418_756_5e-4, x);
    let x = y.mul_add(-3.774_895e-8, x);
    let z = x * x;
    let c = 2.443_315_7e-5f32.mul_add(z, -1.388_731_6e-3).mul_add(z, 4.166_664_6e-2) * z;
    let c = c.mul_add(z, -(z * 0.5)) + 1.0;
    let s = (-1.951_529_6e-4f32).mul_add(z, 8.332_161e-3).mul_add(z, -1.666_665_5e-1) * z;
    let s = s.mul_add(x, x);
    match octant & 6 {
        0 => (s, c),
        2 => (c, -s),
        4 => (-s, -c),
        _ => (-c, s),
    }
}

/// Mersenne Twister (Matsumoto & Nishimura 1998).
struct Mt19937 {
    state: [u32; 624],
    next: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Mt19937 {
        let mut state = [seed; 624];
        for i in 1..624 {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, next: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.next == 624 {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..624 {
            let mixed = self.state[i] & 0x8000_0000 | self.state[(i + 1) % 624] & 0x7fff_ffff;
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + 397) % 624] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }
}

/// `torch.randn` with a CUDA generator, for draws that fit one wave of threads (2048 per multiprocessor: 270,336 elements on an
/// H100 or H200, enough for every latent up to 2048 x 2048 pixels). Past one wave torch's own numbers depend on the card.
///
/// Element `i` of draw `d` is the first normal of `curand_normal4` on subsequence `i` at offset `4 d`
/// (`ATen/native/cuda/DistributionTemplates.h`). Logarithm and sine are computed in f64 and rounded; the card uses its fast
/// approximations, so numbers agree to about 1e-6, not to the bit.
pub struct TorchCuda {
    key: [u32; 2],
    draw: u64,
}

impl TorchCuda {
    pub fn new(seed: u64) -> TorchCuda {
        TorchCuda { key: halves(seed), draw: 0 }
    }

    pub fn normal(&mut self, out: &mut [f32]) {
        let [low, high] = halves(self.draw);
        for (i, out) in out.iter_mut().enumerate() {
            let [index_low, index_high] = halves(i as u64);
            let w = philox([low, high, index_low, index_high], self.key);
            *out = curand_normal(w[0], w[1]);
        }
        self.draw += 1;
    }
}

/// First of `_curand_box_muller`: `sin` comes before `cos`.
fn curand_normal(a: u32, b: u32) -> f32 {
    const INV: f32 = 1.0 / (1u64 << 32) as f32;
    const INV_2PI: f32 = std::f32::consts::TAU / (1u64 << 32) as f32;
    let u = (a as f32).mul_add(INV, INV / 2.0);
    let v = (b as f32).mul_add(INV_2PI, INV_2PI / 2.0);
    ((-2.0 * f64::from(u).ln()).sqrt() * f64::from(v).sin()) as f32
}
