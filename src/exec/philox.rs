//! Our own generator: Philox counters turned into normal numbers by operations that every device rounds alike.

/// Low and high half.
pub fn halves(v: u64) -> [u32; 2] {
    [v as u32, (v >> 32) as u32]
}

/// Philox4x32-10 (Salmon et al. 2011): four random words for a 128-bit counter and a 64-bit key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let [low_0, high_0] = halves(u64::from(counter[0]) * 0xD251_1F53);
        let [low_2, high_2] = halves(u64::from(counter[2]) * 0xCD9E_8D57);
        counter = [high_2 ^ counter[1] ^ key[0], low_2, high_0 ^ counter[3] ^ key[1], low_0];
    }
    counter
}

/// Element `i` of draw `d` under `seed` is a pure function of the three.
///
/// Words `w = philox(counter = [i/4 low, i/4 high, d low, d high], key = [seed low, seed high])`; elements `4j, 4j+1` are
/// [`box_muller`]`(w[0], w[1])`, elements `4j+2, 4j+3` are `box_muller(w[2], w[3])`.
pub fn normal(key: [u32; 2], draw: u64, out: &mut [f32]) {
    for (block, out) in out.chunks_mut(4).enumerate() {
        out.copy_from_slice(&normals(key, halves(draw), block as u64)[..out.len()]);
    }
}

/// Elements `4 block .. 4 block + 4` of a draw, given in halves.
pub fn normals(key: [u32; 2], [draw_low, draw_high]: [u32; 2], block: u64) -> [f32; 4] {
    let [low, high] = halves(block);
    let w = philox([low, high, draw_low, draw_high], key);
    let ([a, b], [c, d]) = (box_muller(w[0], w[1]), box_muller(w[2], w[3]));
    [a, b, c, d]
}

/// Two standard normals from two random words (Box & Muller 1958), by exactly rounded f32 operations only.
///
/// - `u = ((a >> 8) + 1) · 2⁻²⁴` in (0, 1] and `r = sqrt(-2 · ln u)`;
/// - the top two bits of `b` are the quadrant `q`, the next 23 an angle in it: `t = (((b >> 7) & 0x7fffff) - 2²²) · (π/2 · 2⁻²³)`
///   in [-π/4, π/4), so no range reduction is needed;
/// - the pair `(r cos t, r sin t)` turned by `q` quarter turns.
///
/// Conversions, +, -, · and sqrt round to nearest even in f32, no product is fused into a sum, nothing calls a math library:
/// any IEEE 754 device that does the same (CUDA: `__fmul_rn`, `__fadd_rn`, `__fsub_rn`, `__fsqrt_rn`) gets the same bits.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    const ANGLE: f32 = std::f32::consts::FRAC_PI_2 / (1 << 23) as f32;
    let u = ((a >> 8) + 1) as f32 * (1.0 / (1 << 24) as f32);
    let r = (-2.0 * ln(u)).sqrt();
    let t = (((b >> 7) & 0x7f_ffff) as i32 - (1 << 22)) as f32 * ANGLE;
    let (x, y) = (r * cos(t), r * sin(t));
    match b >> 30 {
        0 => [x, y],
        1 => [-y, x],
        2 => [-x, -y],
        _ => [y, -x],
    }
}

/// Coefficients of Cephes `logf` (Moshier 1989), highest power first.
pub const LN: [f32; 9] = [
    0.070_376_836,
    -0.115_146_1,
    0.116_769_984,
    -0.124_201_41,
    0.142_493_23,
    -0.166_680_57,
    0.200_007_14,
    -0.249_999_94,
    0.333_333_3,
];

/// Natural logarithm of a normal positive number in (0, 1], about 1 ulp.
fn ln(u: f32) -> f32 {
    let bits = u.to_bits();
    let mut exponent = (bits >> 23) as i32 - 126;
    let mut m = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000);
    if m < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1;
        m += m;
    }
    let (x, e) = (m - 1.0, exponent as f32);
    let z = x * x;
    let y = LN[1..].iter().fold(LN[0], |y, p| y * x + p);
    let y = y * x * z + e * -2.121_944_4e-4 - z * 0.5;
    x + y + e * 0.693_359_4
}

/// Sine on [-π/4, π/4]; polynomial of Cephes `sinf`.
fn sin(t: f32) -> f32 {
    let z = t * t;
    ((-1.951_529_6e-4 * z + 8.332_161e-3) * z + -1.666_665_5e-1) * z * t + t
}

/// Cosine on [-π/4, π/4]; polynomial of Cephes `cosf`.
fn cos(t: f32) -> f32 {
    let z = t * t;
    ((2.443_315_7e-5 * z + -1.388_731_6e-3) * z + 4.166_664_6e-2) * z * z - z * 0.5 + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors of Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn box_muller_agrees_with_the_math_library() {
        for i in 0..100_000u32 {
            let w = philox([i, 0, 0, 0], [7, 0]);
            let [x, y] = box_muller(w[0], w[1]);
            let r = (-2.0 * (f64::from((w[0] >> 8) + 1) / 16_777_216.0).ln()).sqrt();
            let turn = (f64::from(w[1] >> 30) + f64::from((w[1] >> 7) & 0x7f_ffff) / 8_388_608.0 - 0.5) / 4.0;
            let angle = std::f64::consts::TAU * turn;
            let error = (f64::from(x) - r * angle.cos()).abs().max((f64::from(y) - r * angle.sin()).abs());
            assert!(error < 1e-6, "words {w:?}: error {error}");
        }
    }

    #[test]
    fn extremes_are_finite() {
        for a in [0, 1, 255, 256, u32::MAX] {
            for b in [0, 1 << 29, 1 << 30, u32::MAX] {
                assert!(box_muller(a, b).into_iter().all(|v| v.is_finite() && v.abs() < 5.8));
            }
        }
    }
}
