#include "ops/cpu/cpu_backend.h"

#include <algorithm>

#include "base/checked.h"

namespace dsfp4::ops {
namespace cpu {

std::int64_t rows_per_piece(std::int64_t rows, std::size_t row_bytes, std::int64_t step,
                            std::int64_t matrices, int threads) {
  constexpr std::size_t kPieceBytes = 256 * 1024;
  constexpr std::int64_t kPiecesPerThread = 8;
  const auto fitting = static_cast<std::int64_t>(kPieceBytes / std::max<std::size_t>(row_bytes, 1));
  const std::int64_t even = ceil_div(rows * matrices, kPiecesPerThread * threads);
  const std::int64_t wanted = std::min({fitting, even, kMostPieceRows});
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

void CpuBackend::linear(const WeightView& given, ops::ConstMatrix x, ops::Matrix out, Phase phase,
                        Inputs inputs) {
  const format::WeightView weight = unwrap(given);
  const Matrix y = unwrap(out);
  const Matmul& matmul = isa_.matmul(weight.format, inputs, phase);
  const Packed packed = pack(matmul, unwrap(x), inputs);
  if (phase == Phase::kPrefill && isa_.tiles != nullptr && &matmul != isa_.exact) {
    return linear_in_tiles(weight, packed, x.rows, y);
  }
  const std::int64_t rows =
      rows_per_piece(weight.rows, data_bytes(weight.format, 1, weight.cols), 16, 1, pool_.size());
  thread_memory_.reserve(multiply_bytes_);
  pool_.parallel_for(weight.rows, rows, [&](std::int64_t begin, std::int64_t end) {
    const ThreadScratch::Block block = thread_memory_.take();
    const Product product = {.weight = &weight,
                             .row_begin = begin,
                             .row_end = end,
                             .x = packed.data,
                             .x_stride = packed.stride,
                             .y = y.data + begin,
                             .y_stride = y.stride,
                             .tokens = x.rows};
    matmul.multiply(product, block.data());
  });
}

}  // namespace cpu

std::unique_ptr<Ops> make_cpu_ops(int threads) {
  return std::make_unique<cpu::CpuBackend>(threads, cpu::select_isa());
}

}  // namespace dsfp4::ops
