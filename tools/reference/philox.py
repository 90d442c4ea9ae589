"""The engine's noise (src/exec/philox.rs) in numpy: the same bits, from uint32 words and separately rounded float32 operations.

Element i of draw d under a seed: word i of `philox(counter = [block low, block high, d low, d high], key = [seed low, seed high])` over
the blocks of four, through Box & Muller's transform, whose logarithm, sine and cosine are the polynomials of Cephes.
"""

import numpy as np

U32, U64, F32 = np.uint32, np.uint64, np.float32
LN = [0.070376836, -0.1151461, 0.116769984, -0.12420141, 0.14249323, -0.16668057, 0.20000714, -0.24999994, 0.3333333]
SIN = [-1.9515296e-4, 8.332161e-3, -1.6666655e-1]
COS = [2.4433157e-5, -1.3887316e-3, 4.1666646e-2]
ROOT_HALF, HALF_PI = F32(0.70710677), F32(1.5707964)


def halves(v):
    return v & 0xFFFFFFFF, v >> 32


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four words, as arrays over the blocks; counters and keys are arrays or integers."""
    a, b, c, d = (np.asarray(v, U64) for v in counter)
    for step in range(10):
        k0, k1 = (U64((k + step * weyl) & 0xFFFFFFFF) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85)))
        (low_a, high_a), (low_c, high_c) = halves(a * U64(0xD2511F53)), halves(c * U64(0xCD9E8D57))
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return [v.astype(U32) for v in (a, b, c, d)]


def horner(x, coefficients):
    y = np.full_like(x, F32(coefficients[0]))
    for c in coefficients[1:]:
        y = y * x + F32(c)
    return y


def ln(u):
    """Of numbers in (0, 1]: u = 2^e m with m in [sqrt 1/2, sqrt 2)."""
    bits = u.view(U32)
    m = (bits & U32(0x007FFFFF) | U32(0x3F000000)).view(F32)
    small = m < ROOT_HALF
    e = ((bits >> U32(23)).astype(np.int32) - 126 - small).astype(F32)
    x = np.where(small, m + m, m) - F32(1)
    z = x * x
    y = horner(x, LN) * x * z + e * F32(-2.1219444e-4) - z * F32(0.5)
    return x + y + e * F32(0.6933594)


def box_muller(a, b):
    u = ((a >> U32(8)) + U32(1)).astype(F32) * F32(2**-24)
    r = np.sqrt(F32(-2) * ln(u))
    t = (((b >> U32(7)) & U32(0x7FFFFF)).astype(np.int32) - (1 << 22)).astype(F32) * (HALF_PI * F32(2**-23))
    z = t * t
    x, y = r * (horner(z, COS) * z * z - z * F32(0.5) + F32(1)), r * (horner(z, SIN) * z * t + t)
    q = b >> U32(30)
    return np.choose(q, [x, -y, -x, y]), np.choose(q, [y, x, -y, -x])


def normal(seed, draw, shape):
    count = int(np.prod(shape))
    blocks = np.arange((count + 3) // 4, dtype=U64)
    w = philox([*halves(blocks), *halves(draw)], halves(seed))
    values = np.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], axis=1)
    assert values.dtype == F32
    return values.reshape(-1)[:count].reshape(shape)


def check():
    """Known answers of Random123 (`kat_vectors`, philox4x32 10), and that the transform is one."""
    ones, pi = 0xFFFFFFFF, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    answers = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, words in answers:
        assert [int(w) for w in philox(counter, key)] == words
    (a, b), values = (w.astype(np.float64) for w in philox([np.arange(9999), 0, 0, 0], [7, 0])[:2]), normal(7, 0, (9999, 4))
    r = np.sqrt(-2 * np.log((a // 256 + 1) / 2**24))
    angle = 2 * np.pi * (b // 2**30 + (b // 128 % 2**23) / 2**23 - 0.5) / 4
    assert np.abs(values[:, 0] - r * np.cos(angle)).max() < 1e-6 and np.abs(values[:, 1] - r * np.sin(angle)).max() < 1e-6
