#include "ops/host_ops.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dsfp4/error.h"
#include "format/block.h"
#include "ops/routing.h"

namespace dsfp4::ops {
namespace {

constexpr std::int64_t kRowsPerPiece = 4;  // some thousand values each: more than a thread costs

void store_latents(const KvView& kv, const float* from, std::int64_t count, std::byte* to) {
  switch (kv.format) {
    case KvFormat::kF32:
      std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case KvFormat::kBf16:
      std::transform(from, from + count, reinterpret_cast<std::uint16_t*>(to),
                     format::float_to_bf16);
      return;
    case KvFormat::kFp8:
      std::transform(from, from + count, reinterpret_cast<std::uint8_t*>(to),
                     [&](float v) { return format::float_to_e4m3(v / kv.scale); });
      return;
  }
}

void rotate(float* v, const float* angle, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 2) {
    const float a = v[i];
    const float b = v[i + 1];
    v[i] = a * angle[i] - b * angle[i + 1];
    v[i + 1] = b * angle[i] + a * angle[i + 1];
  }
}

}  // namespace

void HostBackend::embed(const WeightView& table, std::span<const std::int32_t> ids, Matrix out) {
  for (std::size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] < 0 || ids[t] >= table.rows) {
      throw ParameterError("ids", "token id " + std::to_string(ids[t]) + " at position " +
                                      std::to_string(t) + " is outside the vocabulary of " +
                                      std::to_string(table.rows));
    }
  }
  const format::WeightView rows = unwrap(table);
  pool_.parallel_for(out.rows, kRowsPerPiece, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      format::decode_row(rows, ids[static_cast<std::size_t>(t)],
                         {unwrap(out.row(t)), static_cast<std::size_t>(out.cols)});
    }
  });
}

void HostBackend::zero(Matrix y) {
  pool_.parallel_for(y.rows, kRowsPerPiece, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) std::fill_n(unwrap(y.row(t)), y.cols, 0.0f);
  });
}

void HostBackend::add(ConstMatrix x, Matrix y) {
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const float* from = unwrap(x.row(t));
    float* to = unwrap(y.row(t));
    for (std::int64_t i = 0; i < x.cols; ++i) to[i] += from[i];
  }
}

void HostBackend::rope(Matrix x, std::int64_t heads, std::int64_t head_stride,
                       ConstMatrix cos_sin) {
  pool_.parallel_for(x.rows, kRowsPerPiece, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        rotate(unwrap(x.row(t)) + h * head_stride, unwrap(cos_sin.row(t)), cos_sin.cols);
      }
    }
  });
}

void HostBackend::kv_append(std::span<const SequenceRows> batch, ConstMatrix x) {
  for (const SequenceRows& sequence : batch) {
    const std::size_t row_bytes =
        static_cast<std::size_t>(x.cols) * kv_value_bytes(sequence.kv.format);
    pool_.parallel_for(sequence.rows, 4 * kRowsPerPiece, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const float* from = unwrap(x.row(sequence.first_row + r));
        store_latents(sequence.kv, from, x.cols,
                      kv_row(sequence.kv, sequence.position + r, row_bytes));
      }
    });
  }
}

void HostBackend::route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
                        std::span<const std::int32_t> forced, Routing out) {
  check_router(spec, static_cast<std::size_t>(logits.cols), bias.size);
  const auto k = static_cast<std::size_t>(spec.top_k);
  check_forced(spec, forced);
  pool_.parallel_for(logits.rows, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const auto at = static_cast<std::size_t>(t) * k;
      route_token(spec, {unwrap(logits.row(t)), static_cast<std::size_t>(logits.cols)},
                  unwrap(bias), forced.empty() ? forced : forced.subspan(at, k),
                  unwrap(out.experts.subspan(at, k)), unwrap(out.used.subspan(at, k)),
                  unwrap(out.weights.subspan(at, k)));
    }
  });
}

void HostBackend::combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
                          Matrix y) {
  const std::span<const float> mixing = unwrap(weights);
  pool_.parallel_for(y.rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* to = unwrap(y.row(t));
      for (std::int64_t k = 0; k < top_k; ++k) {
        const float weight = mixing[static_cast<std::size_t>(t * top_k + k)];
        const float* from = unwrap(pairs.row(t * top_k + k));
        for (std::int64_t i = 0; i < y.cols; ++i) to[i] += weight * from[i];
      }
    }
  });
}

}  // namespace dsfp4::ops
