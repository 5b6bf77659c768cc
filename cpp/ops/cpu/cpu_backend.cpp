#include "ops/cpu/cpu_backend.h"

#include <algorithm>
#include <array>

#include "base/checked.h"

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

std::byte* multiply_scratch(std::size_t bytes) {
  thread_local Scratch memory;
  return memory.get(bytes);
}

std::int64_t rows_per_piece(std::int64_t rows, std::size_t row_bytes, std::int64_t step,
                            std::int64_t matrices, int threads) {
  constexpr std::size_t kPieceBytes = 256 * 1024;
  constexpr std::int64_t kMostRows = 256;
  constexpr std::int64_t kPiecesPerThread = 8;
  const auto fitting = static_cast<std::int64_t>(kPieceBytes / std::max<std::size_t>(row_bytes, 1));
  const std::int64_t even = ceil_div(rows * matrices, kPiecesPerThread * threads);
  const std::int64_t wanted = std::min({fitting, even, kMostRows});
  return std::max<std::int64_t>(ceil_div(wanted, step), 1) * step;
}

CpuBackend::Packed CpuBackend::pack(const Matmul& matmul, ConstMatrix x, Inputs inputs) {
  constexpr std::int64_t kGrain = 8;  // fewer tokens than this are not worth a hand-off
  const auto at = static_cast<std::size_t>(matmul.packing);
  const std::size_t stride = matmul.packed_bytes(x.cols);
  const Packed packed{x_memory_.at(at).get(static_cast<std::size_t>(x.rows) * stride), stride};
  const bool round = inputs == Inputs::kBf16;
  pool_.parallel_for(x.rows, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      matmul.pack(x.row(t), x.cols, round, packed.row(t));
    }
  });
  x_.at(at) = packed;
  return packed;
}

void CpuBackend::begin_step(Phase phase) {
  phase_ = phase;
  tiles_ = phase == Phase::kPrefill ? isa_.tiles : nullptr;
}

void CpuBackend::linear(const WeightView& weight, ConstMatrix x, Matrix y, Inputs inputs) {
  const Matmul& matmul = isa_.matmul(weight.format, inputs, phase_);
  const Packed packed = pack(matmul, x, inputs);
  if (tiles_ != nullptr && &matmul != isa_.exact) {
    return linear_in_tiles(weight, packed, x.rows, y);
  }
  const std::int64_t rows =
      rows_per_piece(weight.rows, data_bytes(weight.format, 1, weight.cols), 16, 1, pool_.size());
  pool_.parallel_for(weight.rows, rows, [&](std::int64_t begin, std::int64_t end) {
    const Product product = {.weight = &weight,
                             .row_begin = begin,
                             .row_end = end,
                             .x = packed.data,
                             .x_stride = packed.stride,
                             .y = y.data + begin,
                             .y_stride = y.stride,
                             .tokens = x.rows};
    matmul.multiply(product, multiply_scratch(matmul.scratch_bytes));
  });
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(int threads) {
  return std::make_unique<cpu::CpuBackend>(threads, cpu::select_isa());
}

}  // namespace dsfp4::ops
