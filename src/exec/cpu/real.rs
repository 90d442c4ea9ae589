//! The element types of the executor, f32 and f64, with the scalar functions its loops are made of.
//!
//! The functions are branch-free where speed matters (f32), so a plain loop over a slice inside `Simd::vectorize` becomes
//! vector code. `S` only tells whether the processor fuses multiply and add.

use crate::Result;
use crate::program::DType;
use crate::weights::Rows;
use bytemuck::Pod;
use pulp::Simd;
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Sub};

/// Longest K block of a product; also the length of the zero row convolution reads outside the image.
pub const LONGEST_BLOCK: usize = 512;

/// f32 or f64.
pub trait Float:
    Pod
    + Send
    + Sync
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAssign
{
    const DTYPE: DType;
    const ZERO: Self;
    const ONE: Self;
    const NAN: Self;
    const LOWEST: Self;
    const ZEROS: &'static [Self; LONGEST_BLOCK];

    /// One register of the instruction set.
    type Vector<S: Simd>: Pod + Send + Sync;
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    fn vector_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a b + c`.
    fn vector_fma<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;

    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    fn is_finite(self) -> bool;
    /// Same bits, NaNs included.
    fn same(self, other: Self) -> bool;
    /// `self b + c`.
    fn fma<S: Simd>(self, b: Self, c: Self) -> Self;
    /// e^self; NaN stays NaN. The f32 form saturates at e^±87.
    fn exp<S: Simd>(self) -> Self;
    /// `x Φ(x)` and its derivative `Φ(x) + x φ(x)`, which share their exponential.
    fn gelu_and_slope<S: Simd>(self) -> (Self, Self);
    /// The rows of a weight from `first` on, converted.
    fn fetch(rows: &Rows<'_>, first: usize, out: &mut [Self]) -> Result<()>;

    #[inline(always)]
    fn greater(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// The nearest number in `low ..= high`; NaN stays NaN.
    #[inline(always)]
    fn clip(self, low: Self, high: Self) -> Self {
        let x = if self < low { low } else { self };
        if x > high { high } else { x }
    }

    #[inline(always)]
    fn sigmoid<S: Simd>(self) -> Self {
        Self::ONE / (Self::ONE + (Self::ZERO - self).exp::<S>())
    }

    /// `σ(x)` and `σ(-x)`, neither as a difference from 1, which would be all rounding where it is small.
    #[inline(always)]
    fn sigmoids<S: Simd>(self) -> (Self, Self) {
        let left = self < Self::ZERO;
        let e = if left { self } else { Self::ZERO - self }.exp::<S>();
        let large = Self::ONE / (Self::ONE + e);
        let small = e * large;
        if left { (small, large) } else { (large, small) }
    }

    #[inline(always)]
    fn silu<S: Simd>(self) -> Self {
        self * self.sigmoid::<S>()
    }

    #[inline(always)]
    fn silu_slope<S: Simd>(self) -> Self {
        let (s, t) = self.sigmoids::<S>();
        s * self.fma::<S>(t, Self::ONE)
    }

    #[inline(always)]
    fn gelu<S: Simd>(self) -> Self {
        self.gelu_and_slope::<S>().0
    }

    #[inline(always)]
    fn gelu_slope<S: Simd>(self) -> Self {
        self.gelu_and_slope::<S>().1
    }

    #[inline(always)]
    fn quick_gelu<S: Simd>(self) -> Self {
        self * (self * Self::from_f64(QUICK)).sigmoid::<S>()
    }

    #[inline(always)]
    fn quick_gelu_slope<S: Simd>(self) -> Self {
        (self * Self::from_f64(QUICK)).silu_slope::<S>()
    }

    /// `½ (1 + tanh u)` is `σ(2u)`.
    #[inline(always)]
    fn gelu_tanh<S: Simd>(self) -> Self {
        let z = self * (self * self).fma::<S>(Self::from_f64(TANH[1]), Self::from_f64(TANH[0]));
        self * z.sigmoid::<S>()
    }

    #[inline(always)]
    fn gelu_tanh_slope<S: Simd>(self) -> Self {
        let square = self * self;
        let z = self * square.fma::<S>(Self::from_f64(TANH[1]), Self::from_f64(TANH[0]));
        let d_z = square.fma::<S>(Self::from_f64(3.0 * TANH[1]), Self::from_f64(TANH[0]));
        let (s, t) = z.sigmoids::<S>();
        s * (self * t).fma::<S>(d_z, Self::ONE)
    }
}

/// The slope of QuickGELU's sigmoid.
const QUICK: f64 = 1.702;
/// `2 √(2/π)` and `0.044715 · 2 √(2/π)`: the sigmoid of tanh-GELU is that of `TANH[0] x + TANH[1] x³`.
const TANH: [f64; 2] = [1.595_769_121_605_730_7, 0.044_715 * 1.595_769_121_605_730_7];
/// `1 / √(2π)`, the normal density at 0.
const DENSITY: f64 = 0.398_942_280_401_432_7;

impl Float for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NAN: f32 = f32::NAN;
    const LOWEST: f32 = f32::MIN;
    const ZEROS: &'static [f32; LONGEST_BLOCK] = &[0.0; LONGEST_BLOCK];
    type Vector<S: Simd> = S::f32s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: f32) -> S::f32s {
        simd.splat_f32s(value)
    }
    #[inline(always)]
    fn vector_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.add_f32s(a, b)
    }
    #[inline(always)]
    fn vector_fma<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    #[inline(always)]
    fn same(self, other: f32) -> bool {
        self.to_bits() == other.to_bits()
    }
    #[inline(always)]
    fn fma<S: Simd>(self, b: f32, c: f32) -> f32 {
        if S::IS_SCALAR { self * b + c } else { self.mul_add(b, c) }
    }

    /// 2^n e^r with n the nearest integer to x/ln 2 and a degree-6 polynomial for e^r, |r| ≤ ln 2 / 2 (Cephes `expf`).
    #[inline(always)]
    fn exp<S: Simd>(self) -> f32 {
        // Adding 1.5 2^23 rounds to an integer that then sits in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let x = if self < -87.3 { -87.3 } else { self };
        let x = if x > 88.3 { 88.3 } else { x };
        let t = x.fma::<S>(std::f32::consts::LOG2_E, ROUND);
        let n = t - ROUND;
        let r = n.fma::<S>(-0.693_359_4, x);
        let r = n.fma::<S>(2.121_944_4e-4, r);
        let p = r.fma::<S>(1.987_569_1e-4, 1.398_2e-3);
        let p = p.fma::<S>(r, 8.333_452e-3);
        let p = p.fma::<S>(r, 4.166_579_6e-2);
        let p = p.fma::<S>(r, 1.666_666_5e-1);
        let p = p.fma::<S>(r, 0.5);
        let p = p.fma::<S>(r * r, r) + 1.0;
        p * f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000))
    }

    /// `max(x, 0) - |x| e^(-x²/2) h(|x|)` with `h` = Φ(-|x|) e^(x²/2), a polynomial in t = 1 / (1 + 0.3 |x|) whose relative
    /// error is 1.3e-7: small tails stay accurate too.
    #[inline(always)]
    fn gelu_and_slope<S: Simd>(self) -> (f32, f32) {
        let a = self.abs();
        let t = 1.0 / a.fma::<S>(0.3, 1.0);
        let h = t.fma::<S>(0.035_932_04, -0.158_277_16);
        let h = h.fma::<S>(t, 0.208_208_43);
        let h = h.fma::<S>(t, -0.055_395_365);
        let h = h.fma::<S>(t, 0.129_469_92);
        let h = h.fma::<S>(t, 0.099_637_3);
        let h = h.fma::<S>(t, 0.120_798_39);
        let h = h.fma::<S>(t, 0.119_626_39);
        let (e, h) = (Float::exp::<S>(-0.5 * self * self), h * t);
        let positive = if self > 0.0 { self } else { 0.0 };
        // Φ(-|x|) - |x| φ(x), what the slope lacks of 1 on the right and is on the left.
        let tail = e * a.fma::<S>(-DENSITY as f32, h);
        (positive - a * e * h, if self > 0.0 { 1.0 - tail } else { tail })
    }

    fn fetch(rows: &Rows<'_>, first: usize, out: &mut [f32]) -> Result<()> {
        rows.read_f32(first, out)
    }
}

impl Float for f64 {
    const DTYPE: DType = DType::F64;
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NAN: f64 = f64::NAN;
    const LOWEST: f64 = f64::MIN;
    const ZEROS: &'static [f64; LONGEST_BLOCK] = &[0.0; LONGEST_BLOCK];
    type Vector<S: Simd> = S::f64s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: f64) -> S::f64s {
        simd.splat_f64s(value)
    }
    #[inline(always)]
    fn vector_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s) -> S::f64s {
        simd.add_f64s(a, b)
    }
    #[inline(always)]
    fn vector_fma<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_e_f64s(a, b, c)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    #[inline(always)]
    fn same(self, other: f64) -> bool {
        self.to_bits() == other.to_bits()
    }
    #[inline(always)]
    fn fma<S: Simd>(self, b: f64, c: f64) -> f64 {
        if S::IS_SCALAR { self * b + c } else { self.mul_add(b, c) }
    }
    #[inline(always)]
    fn exp<S: Simd>(self) -> f64 {
        self.exp()
    }
    /// Through erfc, so that the left tail keeps its relative accuracy.
    #[inline(always)]
    fn gelu_and_slope<S: Simd>(self) -> (f64, f64) {
        let twice = libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (0.5 * self * twice, 0.5 * twice + self * (-0.5 * self * self).exp() * DENSITY)
    }

    fn fetch(rows: &Rows<'_>, first: usize, out: &mut [f64]) -> Result<()> {
        rows.read_f64(first, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    /// The worst error of each function over a grid, relative where the value exceeds one (exp: everywhere).
    struct Worst;

    impl WithSimd for Worst {
        type Output = [f64; 9];

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> [f64; 9] {
            let mut worst = [0.0f64; 9];
            for i in -80_000..80_000 {
                let x = i as f32 * 1.0007e-3;
                let found = [
                    x.silu::<S>(),
                    x.gelu::<S>(),
                    x.quick_gelu::<S>(),
                    x.gelu_tanh::<S>(),
                    x.silu_slope::<S>(),
                    x.gelu_slope::<S>(),
                    x.quick_gelu_slope::<S>(),
                    x.gelu_tanh_slope::<S>(),
                ];
                let relative = Float::exp::<S>(x) as f64 / (x as f64).exp() - 1.0;
                worst[8] = worst[8].max(relative.abs());
                for ((worst, found), exact) in worst.iter_mut().zip(found).zip(exact(x as f64)) {
                    *worst = worst.max((found as f64 - exact).abs() / exact.abs().max(1.0));
                }
            }
            worst
        }
    }

    /// The activations, then their derivatives, from the textbook formulas.
    fn exact(x: f64) -> [f64; 8] {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let root = (2.0 / std::f64::consts::PI).sqrt();
        let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
        let normal = 0.5 * libm::erfc(-x / 2f64.sqrt());
        let (s, q) = (sigmoid(x), sigmoid(1.702 * x));
        [
            x * s,
            x * normal,
            x * q,
            0.5 * x * (1.0 + tanh),
            s + x * s * (1.0 - s),
            normal + x * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt(),
            q + 1.702 * x * q * (1.0 - q),
            0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * 0.044715 * x * x),
        ]
    }

    #[test]
    fn f32_functions_are_accurate() {
        for worst in [Arch::new().dispatch(Worst), Worst.with_simd(pulp::Scalar::new())] {
            let (values, slopes) = (&worst[..4], &worst[4..8]);
            assert!(
                values.iter().all(|&error| error < 2e-7) && slopes.iter().all(|&error| error < 2.5e-7),
                "{worst:?}"
            );
            assert!(worst[1] < 1.5e-7 && worst[8] < 1.5e-7, "gelu {:e} exp {:e}", worst[1], worst[8]);
        }
        let up = |x: f32| Float::exp::<pulp::Scalar>(x);
        assert!(up(f32::NAN).is_nan() && up(-1e9) < 1e-37 && up(1e9) > 1e38);
    }

    #[test]
    fn f64_functions_are_exact() {
        type S = pulp::Scalar;
        for i in -30_000..30_000 {
            let x = i as f64 * 1.0007e-3;
            let found = [
                x.silu::<S>(),
                x.gelu::<S>(),
                x.quick_gelu::<S>(),
                x.gelu_tanh::<S>(),
                x.silu_slope::<S>(),
                x.gelu_slope::<S>(),
                x.quick_gelu_slope::<S>(),
                x.gelu_tanh_slope::<S>(),
            ];
            for (k, (found, exact)) in found.into_iter().zip(exact(x)).enumerate() {
                assert!((found - exact).abs() <= 1e-14 * exact.abs().max(1.0), "function {k} of {x}: {found} {exact}");
            }
        }
        assert!(f64::NAN.clip(0.0, 1.0).is_nan() && 2.0.clip(0.0, 1.0) == 1.0 && (-2f32).clip(-1.0, 1.0) == -1.0);
    }
}
