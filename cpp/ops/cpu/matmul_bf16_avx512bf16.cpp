// Products of BF16 pairs with AVX-512 BF16: NVFP4 (0.5625 bytes a weight), MXFP4 (0.53), BF16 (2).
// Weights become BF16 exactly, activations by rounding, and vdpbf16ps adds 32 products to the 16
// lanes of the accumulator of (row, token). Up to 4 tokens: 4 rows at a time are decoded in
// registers next to the multiply. More: matmul_blocked.h with tiles of 4 rows x 6 tokens, 24
// accumulators.
#include "ops/cpu/bf16_avx512bf16.h"

namespace dsfp4::ops::cpu {
namespace {

struct Bf16Row {
  Bf16Row(const WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + row * w.cols * 2), cols(w.cols) {}

  __m512i whole(std::int64_t step) const { return load_512(data + 64 * step); }
  __m512i part(std::int64_t step) const { return bf16_tail(data + 64 * step, cols - kStep * step); }

  // Rows are long: so many bytes ahead in the same one, most of the time.
  void prefetch_ahead(std::int64_t step) const { prefetch(data + 64 * step + 2048); }

  const std::uint8_t* data;
  std::int64_t cols;
};

template <class Format>
struct Fp4RowWithTail : Fp4Row<Format> {
  using Fp4Row<Format>::Fp4Row;
  __m512i part(std::int64_t step) const { return this->half(step); }
  void prefetch_ahead(std::int64_t) const {}  // prefill computes longer on a byte than it is read
};

// Few tokens.
template <class Row, int count>
void multiply_direct(const Product& p) {
  constexpr int kRows = 4;
  const std::int64_t cols = p.weight->cols;
  const std::int64_t whole = cols / kStep;
  const float scale = scale_of_all(*p.weight);
  const std::byte* x[count];
  for (int t = 0; t < count; ++t) x[t] = x_row(p, t);
  for (std::int64_t row = p.row_begin; row < p.row_end; row += kRows) {
    const std::int64_t last = p.row_end - 1;  // past it: that row once more, never written
    const Row rows[kRows] = {{*p.weight, row},
                             {*p.weight, lesser(row + 1, last)},
                             {*p.weight, lesser(row + 2, last)},
                             {*p.weight, lesser(row + 3, last)}};
    __m512 sum[kRows][count];
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < count; ++t) sum[r][t] = _mm512_setzero_ps();
    }
    for (std::int64_t i = 0; i < whole; ++i) {
      for (int r = 0; r < kRows; ++r) {
        const __m512bh w = as_bf16(rows[r].whole(i));
        rows[r].prefetch_ahead(i);
        for (int t = 0; t < count; ++t) {
          sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w, as_bf16(load_512(x[t] + 64 * i)));
        }
      }
    }
    if (whole * kStep < cols) {
      for (int r = 0; r < kRows; ++r) {
        const __m512bh w = as_bf16(rows[r].part(whole));
        for (int t = 0; t < count; ++t) {
          sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w, as_bf16(load_512(x[t] + 64 * whole)));
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      float* y = y_row(p, t) + (row - p.row_begin);
      for (int r = 0; r < kRows && row + r <= last; ++r) y[r] = total_of(sum[r][t]) * scale;
    }
  }
}

template <class Row>
struct Blocked {
  using Sum = __m512;
  static constexpr int kRows = 4;
  static constexpr int kTokens = 6;
  static constexpr std::int64_t kChunk = 1024;
  static constexpr int kGroups = 1;
  struct Weights {
    alignas(64) std::uint16_t value[kRows][kChunk];
  };

  static void decode(const WeightView& w, std::int64_t row, int index, std::int64_t begin,
                     std::int64_t end, Weights& weights) {
    const Row from(w, row);
    std::uint16_t* to = weights.value[index];
    const std::int64_t first = begin / kStep;
    const std::int64_t whole = end / kStep - first;
    for (std::int64_t i = 0; i < whole; ++i) {
      _mm512_store_si512(to + kStep * i, from.whole(first + i));
    }
    if (end % kStep != 0) _mm512_store_si512(to + kStep * whole, from.part(first + whole));
  }

  template <int count>
  static void tile(const Weights& w, std::int64_t begin, std::int64_t end,
                   const std::byte* const* rows, Sum* sums) {
    const std::byte* x[count];
    Sum sum[count][kRows];
    for (int t = 0; t < count; ++t) {
      x[t] = rows[t] + begin * 2;
      for (int r = 0; r < kRows; ++r) sum[t][r] = sums[t * kRows + r];
    }
    const std::int64_t steps = steps_of(end - begin);
    for (std::int64_t i = 0; i < steps; ++i) {
      __m512bh weights[kRows];
      for (int r = 0; r < kRows; ++r) weights[r] = as_bf16(load_512(w.value[r] + kStep * i));
      for (int t = 0; t < count; ++t) {
        const __m512bh values = as_bf16(load_512(x[t] + 64 * i));
        for (int r = 0; r < kRows; ++r) {
          sum[t][r] = _mm512_dpbf16_ps(sum[t][r], weights[r], values);
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t * kRows + r] = sum[t][r];
    }
  }

  static float total(const Sum& sum) { return total_of(sum); }
};

template <class Row>
void multiply(const Product& p, std::byte* scratch) {
  const bool few = for_few<4>(p.tokens, [&](auto count) { multiply_direct<Row, count>(p); });
  if (!few) multiply_blocked<Blocked<Row>>(p, scratch);
}

void multiply_fp4(const Product& p, std::byte* scratch) {
  if (p.weight->format == WeightFormat::kNvfp4) {
    multiply<Fp4RowWithTail<Nvfp4>>(p, scratch);
  } else {
    multiply<Fp4RowWithTail<Mxfp4>>(p, scratch);
  }
}

constexpr std::size_t kScratchBytes = sizeof(BlockedScratch<Blocked<Bf16Row>>);

}  // namespace

const Matmul kMatmulFp4Avx512Bf16 = {
    "fp4_bf16_avx512bf16", 2, kScratchBytes, packed_bf16_bytes, pack_bf16<true>, multiply_fp4};
const Matmul kMatmulBf16Avx512Bf16 = {
    "bf16_avx512bf16", 3, kScratchBytes, packed_bf16_bytes, pack_bf16<false>, multiply<Bf16Row>};

}  // namespace dsfp4::ops::cpu
