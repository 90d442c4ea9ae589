// Elementary functions. Logarithm, sine and cosine are polynomials of Cephes (Moshier 1989), about 1 ulp, by exactly rounded
// f32 operations only, nothing fused: the same bits as src/exec/philox.rs on every device.
#pragma once
#include "common.cuh"

// Bounds that let NaN through.
DEVICE float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

DEVICE float horner(float y, float x, float next) { return __fadd_rn(__fmul_rn(y, x), next); }

// Natural logarithm of a normal number in (0, 1].
DEVICE float exact_log(float u) {
  uint32_t bits = __float_as_uint(u);
  int exponent = (int)(bits >> 23) - 126;
  float m = __uint_as_float((bits & 0x007fffffu) | 0x3f000000u);
  if (m < 0.70710678f) {
    exponent--;
    m = __fadd_rn(m, m);
  }
  float x = __fadd_rn(m, -1.0f), e = (float)exponent, z = __fmul_rn(x, x), y = 0.070376836f;
  y = horner(y, x, -0.1151461f);
  y = horner(y, x, 0.116769984f);
  y = horner(y, x, -0.12420141f);
  y = horner(y, x, 0.14249323f);
  y = horner(y, x, -0.16668057f);
  y = horner(y, x, 0.20000714f);
  y = horner(y, x, -0.24999994f);
  y = horner(y, x, 0.3333333f);
  y = __fadd_rn(__fmul_rn(__fmul_rn(y, x), z), __fmul_rn(e, -2.1219444e-4f));
  y = __fadd_rn(y, -__fmul_rn(z, 0.5f));
  return __fadd_rn(__fadd_rn(x, y), __fmul_rn(e, 0.6933594f));
}

// Sine on [-pi/4, pi/4].
DEVICE float exact_sin(float t) {
  float z = __fmul_rn(t, t), y = horner(horner(-1.9515296e-4f, z, 8.332161e-3f), z, -1.6666655e-1f);
  return horner(__fmul_rn(y, z), t, t);
}

// Cosine on [-pi/4, pi/4].
DEVICE float exact_cos(float t) {
  float z = __fmul_rn(t, t), y = horner(horner(2.4433157e-5f, z, -1.3887316e-3f), z, 4.1666646e-2f);
  y = __fadd_rn(__fmul_rn(__fmul_rn(y, z), z), -__fmul_rn(z, 0.5f));
  return __fadd_rn(y, 1.0f);
}

// (cos, sin) of an angle plus q quarter turns, given its own.
DEVICE void turn(float& x, float& y, uint32_t quarters) {
  if (quarters & 1) {
    float was = x;
    x = -y, y = was;
  }
  if (quarters & 2) x = -x, y = -y;
}
