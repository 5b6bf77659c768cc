// What the device can do, for floors and plans: how fast it reads, how fast mma.sync multiplies;
// and events to time anything else with.
#include "ops/cuda/common.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

// 16-byte loads, several in flight a thread; the sum keeps them from being left out.
__global__ void __launch_bounds__(512)
    read_kernel(const uint4* from, std::int64_t count, unsigned* sink) {
  constexpr int kInFlight = 8;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  unsigned sum = 0;
  for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
    uint4 values[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) values[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
  }
  for (; i < count; i += step) sum ^= from[i].x;
  if (sum == 0x12345678u) *sink = sum;
}

__global__ void __launch_bounds__(256) mma_kernel(int rounds, float* sink) {
  constexpr int kChains = 8;
  float sums[kChains][4] = {};
  const unsigned a = 0x3f803f80u + threadIdx.x;  // finite, and not a constant
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%5,%5}, "
          "{%4,%5}, {%0,%1,%2,%3};\n"
          : "+f"(sums[c][0]), "+f"(sums[c][1]), "+f"(sums[c][2]), "+f"(sums[c][3])
          : "r"(a), "r"(a ^ 0x00010001u));
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
  if (sum == 12345.0f) *sink = sum;
}

}  // namespace

bool read_all(Device* device, const std::byte* from, std::size_t bytes, std::byte* sink) {
  read_kernel<<<static_cast<unsigned>(device->multiprocessors * 4), 512, 0, device->stream>>>(
      reinterpret_cast<const uint4*>(from), static_cast<std::int64_t>(bytes / sizeof(uint4)),
      reinterpret_cast<unsigned*>(sink));
  DSFP4_LAUNCHED("read_kernel");
  return true;
}

bool multiply_loop(Device* device, int rounds, std::byte* sink, double* flops) {
  const int blocks = device->multiprocessors * 4;
  mma_kernel<<<static_cast<unsigned>(blocks), 256, 0, device->stream>>>(
      rounds, reinterpret_cast<float*>(sink));
  DSFP4_LAUNCHED("mma_kernel");
  *flops = double(blocks) * 8 /* warps */ * rounds * 8 /* chains */ * 2.0 * 16 * 8 * 16;
  return true;
}

bool mark(Device* device, int slot) {
  if (slot < 0 || slot >= kMarks) {
    return fail(cudaErrorInvalidValue, "mark: no such slot", __FILE__, __LINE__);
  }
  if (device->marks[slot] == nullptr) DSFP4_TRY(cudaEventCreate(&device->marks[slot]));
  DSFP4_TRY(cudaEventRecord(device->marks[slot], device->stream));
  return true;
}

bool elapsed(Device* device, int from, int to, float* milliseconds) {
  DSFP4_TRY(cudaEventSynchronize(device->marks[to]));
  DSFP4_TRY(cudaEventElapsedTime(milliseconds, device->marks[from], device->marks[to]));
  return true;
}

}  // namespace dsfp4::ops::cuda
