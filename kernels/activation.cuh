// Activations and their derivatives, in f32.
#pragma once
#include "common.cuh"

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// Phi(x) + x phi(x).
DEVICE float gelu_derivative(float x) {
  return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
}

// 1/2 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as GPT-2 has it.
DEVICE float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }

DEVICE float gelu_tanh_derivative(float x) {
  float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
}

DEVICE float activate(float x, int activation) {
  switch (activation) {
    case SILU:
      return x * sigmoid(x);
    case GELU:
      return gelu(x);
    case QUICK_GELU:
      return x * sigmoid(1.702f * x);
    case GELU_TANH:
      return gelu_tanh(x);
    default:
      return x;
  }
}

DEVICE float activate_derivative(float x, int activation) {
  switch (activation) {
    case SILU: {
      float s = sigmoid(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case GELU:
      return gelu_derivative(x);
    case QUICK_GELU: {
      float s = sigmoid(1.702f * x);
      return s * (1.0f + 1.702f * x * (1.0f - s));
    }
    case GELU_TANH:
      return gelu_tanh_derivative(x);
    default:
      return 1.0f;
  }
}
