// Norms, activations and sums: a few operations a value, so that one thread is enough for a token
// and many tokens are bound by memory. Values are split over threads in pieces of some ten
// thousand.
#include <algorithm>
#include <cmath>

#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kPieceValues = 8192;  // some microseconds, several times what a thread costs

// body(row, first, count) for parts of [rows, cols].
template <typename Body>
void for_parts(ThreadPool& pool, std::int64_t rows, std::int64_t cols, const Body& body) {
  if (rows == 0 || cols == 0) return;
  const std::int64_t parts = (cols - 1) / kPieceValues + 1;
  const std::int64_t width = std::min(cols, kPieceValues);
  pool.parallel_for(rows * parts, std::max<std::int64_t>(1, kPieceValues / width),
                    [&](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t i = begin; i < end; ++i) {
                        const std::int64_t first = i % parts * kPieceValues;
                        body(i / parts, first, std::min(kPieceValues, cols - first));
                      }
                    });
}

}  // namespace

void CpuBackend::rms_norm(ops::ConstMatrix x, DeviceSpan<const float> weight, float eps,
                          ops::Matrix y) {
  pool_.parallel_for(x.rows, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float squares = 0.0f;
      const float* from = unwrap(x.row(t));
      layer_.dot(from, x.cols, from, 0, 1, 1.0f, &squares, 1);
      const float scale = 1.0f / std::sqrt(squares / static_cast<float>(x.cols) + eps);
      layer_.scale_by(from, scale, unwrap(weight.data), unwrap(y.row(t)), x.cols);
    }
  });
}

void CpuBackend::silu_mul(ops::Matrix gate, ops::ConstMatrix up) {
  for_parts(pool_, gate.rows, gate.cols, [&](std::int64_t t, std::int64_t at, std::int64_t n) {
    layer_.silu_mul(unwrap(gate.row(t)) + at, unwrap(up.row(t)) + at, n);
  });
}

void CpuBackend::add(ops::ConstMatrix x, ops::Matrix y) {
  for_parts(pool_, y.rows, y.cols, [&](std::int64_t t, std::int64_t at, std::int64_t n) {
    layer_.add(unwrap(x.row(t)) + at, unwrap(y.row(t)) + at, n);
  });
}

void CpuBackend::combine(ops::ConstMatrix pairs, DeviceSpan<const float> weights,
                         std::int64_t top_k, ops::Matrix y) {
  const std::span<const float> mixing = unwrap(weights);
  for_parts(pool_, y.rows, y.cols, [&](std::int64_t t, std::int64_t at, std::int64_t n) {
    for (std::int64_t k = 0; k < top_k; ++k) {
      layer_.add_scaled(mixing[static_cast<std::size_t>(t * top_k + k)],
                        unwrap(pairs.row(t * top_k + k)) + at, unwrap(y.row(t)) + at, n);
    }
  });
}

}  // namespace dsfp4::ops::cpu
