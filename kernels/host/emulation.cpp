// Every kernel compiled for the host, and the three functions by which src/exec/cuda/emulated.rs calls them.
#include <algorithm>

#include "ptx.h"

#include "../attention_backward.cu"
#include "../attention_forward.cu"
#include "../conformance.cu"
#include "../conv2d.cu"
#include "../elementwise.cu"
#include "../embedding.cu"
#include "../gemm.cu"
#include "../group_norm.cu"
#include "../layer_norm.cu"
#include "../reduce.cu"
#include "../resample.cu"
#include "../rowwise.cu"
#include "../sm90_attention.cu"
#include "../sm90_conformance.cu"
#include "../sm90_gemm.cu"
#include "../split_k_reduce.cu"
#include "../update.cu"

// The number of kernels.
extern "C" uint32_t rarebit_emulated_count() { return (uint32_t)emulated::kernels().size(); }

// The name of kernel `index` and the size of its parameters.
extern "C" const char* rarebit_emulated_kernel(uint32_t index, uint32_t* params_bytes) {
  const emulated::Kernel& kernel = emulated::kernels()[index];
  *params_bytes = kernel.params_bytes;
  return kernel.name;
}

// Runs kernel `index` and returns 0, or writes what went wrong to `message` and returns 1.
extern "C" int rarebit_emulated_launch(uint32_t index, const uint32_t* grid, uint32_t threads, uint32_t dynamic_shared,
                                       const void* params, const emulated::Settings* settings, char* message,
                                       size_t message_bytes) {
  const emulated::Kernel& kernel = emulated::kernels()[index];
  std::string fault =
      emulated::launch({&kernel, {grid[0], grid[1], grid[2]}, threads, dynamic_shared, params, *settings});
  if (fault.empty()) return 0;
  size_t length = std::min(fault.size(), message_bytes - 1);
  memcpy(message, fault.data(), length);
  message[length] = 0;
  return 1;
}
