#include "ops/cpu/cpu_backend.h"

#include <array>

namespace dsfp4::ops {
namespace cpu {

using format::WeightView;

float* thread_scratch(int slot, std::int64_t count) {
  thread_local std::array<std::vector<float>, 3> buffers;
  std::vector<float>& buffer = buffers.at(static_cast<std::size_t>(slot));
  if (buffer.size() < static_cast<std::size_t>(count)) {
    buffer.resize(static_cast<std::size_t>(count));
  }
  return buffer.data();
}

ConstMatrix CpuBackend::rounded(ConstMatrix x, std::vector<float>& buffer) {
  buffer.resize(static_cast<std::size_t>(x.rows * x.cols));
  pool_.parallel_for(x.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      kernels_.round_to_bf16(x.row(t), buffer.data() + t * x.cols, x.cols);
    }
  });
  return {buffer.data(), x.rows, x.cols, x.cols};
}

void CpuBackend::linear(const WeightView& weight, ConstMatrix x, Matrix y, Inputs inputs) {
  const ConstMatrix in = inputs == Inputs::kBf16 ? rounded(x, inputs_) : x;
  const float scale = global_scale(weight);
  pool_.parallel_for(weight.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    float* row = thread_scratch(0, weight.cols);
    for (std::int64_t r = begin; r < end; ++r) {
      kernels_.decode_row(weight, r, row);
      kernels_.dot_tokens(row, weight.cols, in.data, in.stride, in.rows, scale, y.data + r,
                          y.stride);
    }
  });
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(int threads) {
  return std::make_unique<cpu::CpuBackend>(threads, cpu::select_kernels());
}

}  // namespace dsfp4::ops
