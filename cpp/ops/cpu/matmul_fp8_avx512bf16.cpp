// Products of FP8 weights with AVX-512 BF16: E4M3 (1 byte a weight) becomes BF16 exactly; the 4
// vdpbf16ps of 128 columns start from zero, and their sum is multiplied with the FP32 multiplier of
// the tile and added to the accumulator of (row, token). Up to 4 tokens: 2 rows at a time are
// decoded in registers. More: matmul_blocked.h with tiles of 2 rows x 6 tokens, which hold 12 sums
// of 128 columns and 12 accumulators.
#include "ops/cpu/bf16_avx512bf16.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr int kRows = 2;
constexpr std::int64_t kTile = format::kFp8Tile;

struct Row {
  Row(const WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + row * w.cols), cols(w.cols) {}

  // 32 columns, the first of them column `c`; zeros past the last.
  __m512i at(std::int64_t c) const {
    if (cols - c >= kStep) return e4m3_to_bf16(load_256(data + c));
    return e4m3_tail(data + c, cols - c);
  }

  // A tile's columns, from column `c` on, of the row that lies kRows further on.
  void prefetch_next(std::int64_t c) const {
    prefetch(data + kRows * cols + c);
    prefetch(data + kRows * cols + c + 64);
  }

  const std::uint8_t* data;
  std::int64_t cols;
};

template <int count>
void multiply_direct(const Product& p) {
  const WeightView& weight = *p.weight;
  const std::int64_t cols = weight.cols;
  const std::byte* x[count];
  for (int t = 0; t < count; ++t) x[t] = x_row(p, t);
  for (std::int64_t row = p.row_begin; row < p.row_end; row += kRows) {
    const std::int64_t other = lesser(row + 1, p.row_end - 1);
    const Row rows[kRows] = {{weight, row}, {weight, other}};
    __m512 sum[kRows][count];
    for (int t = 0; t < count; ++t) sum[0][t] = sum[1][t] = _mm512_setzero_ps();
    for (std::int64_t tile = 0; tile * kTile < cols; ++tile) {
      const std::int64_t end = lesser((tile + 1) * kTile, cols);
      __m512 part[kRows][count];
      for (int t = 0; t < count; ++t) part[0][t] = part[1][t] = _mm512_setzero_ps();
      for (std::int64_t c = tile * kTile; c < end; c += kStep) {
        for (int r = 0; r < kRows; ++r) {
          const __m512bh w = as_bf16(rows[r].at(c));
          for (int t = 0; t < count; ++t) {
            part[r][t] = _mm512_dpbf16_ps(part[r][t], w, as_bf16(load_512(x[t] + 2 * c)));
          }
        }
      }
      for (const Row& r : rows) r.prefetch_next(tile * kTile);
      const __m512 scales[kRows] = {_mm512_set1_ps(fp8_scale(weight, row, tile)),
                                    _mm512_set1_ps(fp8_scale(weight, other, tile))};
      for (int t = 0; t < count; ++t) {
        for (int r = 0; r < kRows; ++r) {
          sum[r][t] = _mm512_fmadd_ps(part[r][t], scales[r], sum[r][t]);
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      float* y = y_row(p, t) + (row - p.row_begin);
      y[0] = total_of(sum[0][t]);
      if (other != row) y[1] = total_of(sum[1][t]);
    }
  }
}

struct Blocked {
  using Sum = __m512;
  static constexpr int kRows = cpu::kRows;
  static constexpr int kTokens = 6;
  static constexpr std::int64_t kChunk = 1024;
  static constexpr int kGroups = 1;
  struct Weights {
    alignas(64) std::uint16_t value[kRows][kChunk];
    float scale[kRows][kChunk / kTile];
  };

  static void decode(const WeightView& w, std::int64_t row, int index, std::int64_t begin,
                     std::int64_t end, Weights& weights) {
    const Row from(w, row);
    for (std::int64_t c = begin; c < end; c += kStep) {
      _mm512_store_si512(weights.value[index] + (c - begin), from.at(c));
    }
    for (std::int64_t c = begin; c < end; c += kTile) {
      from.prefetch_next(c);
      weights.scale[index][(c - begin) / kTile] = fp8_scale(w, row, c / kTile);
    }
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
    for (std::int64_t c = 0; c < end - begin; c += kTile) {
      Sum part[count][kRows];
      for (int t = 0; t < count; ++t) part[t][0] = part[t][1] = _mm512_setzero_ps();
      const std::int64_t stop = lesser(c + kTile, end - begin);
      for (std::int64_t i = c; i < stop; i += kStep) {
        const __m512bh weights[kRows] = {as_bf16(load_512(w.value[0] + i)),
                                         as_bf16(load_512(w.value[1] + i))};
        for (int t = 0; t < count; ++t) {
          const __m512bh values = as_bf16(load_512(x[t] + 2 * i));
          for (int r = 0; r < kRows; ++r) {
            part[t][r] = _mm512_dpbf16_ps(part[t][r], weights[r], values);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512 scale = _mm512_set1_ps(w.scale[r][c / kTile]);
        for (int t = 0; t < count; ++t) {
          sum[t][r] = _mm512_fmadd_ps(part[t][r], scale, sum[t][r]);
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t * kRows + r] = sum[t][r];
    }
  }

  static float total(const Sum& sum) { return total_of(sum); }
};

void multiply(const Product& p, std::byte* scratch) {
  const bool few = for_few<4>(p.tokens, [&](auto count) { multiply_direct<count>(p); });
  if (!few) multiply_blocked<Blocked>(p, scratch);
}

}  // namespace

const Matmul kMatmulFp8Avx512Bf16 = {
    "fp8_bf16_avx512bf16", 3,       sizeof(BlockedScratch<Blocked>), packed_bf16_bytes,
    pack_bf16<false>,      multiply};

}  // namespace dsfp4::ops::cpu
