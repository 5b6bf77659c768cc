// Products of BF16 tiles with AMX: NVFP4 (0.5625 bytes a weight), MXFP4 (0.53), FP8 (1), BF16 (2).
// Up to 128 rows of weights are decoded, 512 columns at a time, into tiles of 16 rows x 32 columns
// in the second-level cache (128 KiB), and meet up to 512 tokens there; sums rest in scratch
// between chunks (256 KiB). A tile of weights is the first operand as it is; a group of 16 tokens
// is the second: row p of its tile holds columns 2p and 2p + 1 of every token.
//
// In registers: 2 x 2 tiles of sums, 2 tiles of weights, 2 of activations: 4 loads for 4 products.
// FP8: the sums of 128 columns start from zero and are added to those in scratch, times the
// multiplier of the row's tile.
#include "ops/cpu/bf16_avx512bf16.h"
#include "ops/cpu/tiles.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kRows = 16;  // of a tile
constexpr std::int64_t kMostRows = 128;
constexpr std::int64_t kMostTokens = 512;
constexpr std::int64_t kChunk = 512;  // columns
constexpr std::int64_t kChunkSteps = kChunk / kStep;
constexpr std::size_t kTileBytes = 1024;

struct TileScratch {
  alignas(64) std::uint16_t weights[kMostRows / kRows][kChunkSteps][kRows][kStep];
  // [row of a tile][token], for each tile of rows and group of tokens.
  alignas(64) float sums[kMostRows / kRows][kMostTokens / kTileTokens][kRows][kTileTokens];
  alignas(64) float part[4][kRows][kTileTokens];
  float scales[kMostRows][kChunk / format::kFp8Tile];
};

std::size_t group_bytes(std::int64_t cols) {
  return static_cast<std::size_t>(steps_of(cols)) * kTileBytes;
}

void group_tokens(const std::byte* x, std::size_t x_stride, const std::int32_t* index,
                  std::int64_t tokens, std::int64_t cols, std::byte* out) {
  const std::int64_t pairs = steps_of(cols) * (kStep / 2);
  std::memset(out, 0, group_bytes(cols));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::byte* row = x + static_cast<std::size_t>(index != nullptr ? index[t] : t) * x_stride;
    for (std::int64_t p = 0; p < pairs; ++p) {
      std::memcpy(out + (p * kTileTokens + t) * 4, row + p * 4, 4);
    }
  }
}

// ---- weights to tiles --------------------------------------------------------------------------

// 32 columns of a row from column c on; zeros past the last.
template <WeightFormat format>
struct Decoder {
  Decoder(const WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) +
             row * w.cols * (format == WeightFormat::kBF16 ? 2 : 1)),
        cols(w.cols) {}
  __m512i at(std::int64_t c) const {
    const bool whole = cols - c >= kStep;
    if constexpr (format == WeightFormat::kBF16) {
      return whole ? load_512(data + 2 * c) : bf16_tail(data + 2 * c, cols - c);
    } else {
      return whole ? e4m3_to_bf16(load_256(data + c)) : e4m3_tail(data + c, cols - c);
    }
  }
  const std::uint8_t* data;
  std::int64_t cols;
};

template <class Format>
struct Fp4Decoder : Fp4Row<Format> {
  Fp4Decoder(const WeightView& w, std::int64_t row) : Fp4Row<Format>(w, row), cols(w.cols) {}
  __m512i at(std::int64_t c) const {
    return cols - c >= kStep ? this->whole(c / kStep) : this->half(c / kStep);
  }
  std::int64_t cols;
};
template <>
struct Decoder<WeightFormat::kNvfp4> : Fp4Decoder<Nvfp4> {
  using Fp4Decoder::Fp4Decoder;
};
template <>
struct Decoder<WeightFormat::kMxfp4> : Fp4Decoder<Mxfp4> {
  using Fp4Decoder::Fp4Decoder;
};

// Rows past the last are that row once more; their results are not written.
template <WeightFormat format>
void decode_chunk(const Product& p, std::int64_t rows, std::int64_t begin, std::int64_t end,
                  TileScratch& scratch) {
  const WeightView& w = *p.weight;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t row = lesser(p.row_begin + r, p.row_end - 1);
    const Decoder<format> from(w, row);
    for (std::int64_t c = begin; c < end; c += kStep) {
      _mm512_store_si512(scratch.weights[r / kRows][(c - begin) / kStep][r % kRows], from.at(c));
    }
    if constexpr (format == WeightFormat::kFp8Block) {
      for (std::int64_t c = begin; c < end; c += format::kFp8Tile) {
        scratch.scales[r][(c - begin) / format::kFp8Tile] = fp8_scale(w, row, c / format::kFp8Tile);
      }
    }
  }
}

// GCC does not know that _tile_loadd reads memory: what was written before must be there.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// ---- tiles -------------------------------------------------------------------------------------

// Tiles 0 .. 3: sums of (rows 0, group 0), (0, 1), (1, 0), (1, 1); 4, 5: weights; 6, 7: tokens.
// With one group 1, 3 and 7 are idle.
inline void load_sums(const float* a0, const float* a1, const float* b0, const float* b1,
                      bool both) {
  _tile_loadd(0, a0, 64);
  _tile_loadd(2, b0, 64);
  if (both) {
    _tile_loadd(1, a1, 64);
    _tile_loadd(3, b1, 64);
  }
}

inline void store_sums(float* a0, float* a1, float* b0, float* b1, bool both) {
  _tile_stored(0, a0, 64);
  _tile_stored(2, b0, 64);
  if (both) {
    _tile_stored(1, a1, 64);
    _tile_stored(3, b1, 64);
  }
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// `steps` steps of 32 columns; rows and tokens are tiles one after the other.
inline void multiply_steps(const std::uint16_t* rows0, const std::uint16_t* rows1,
                           const std::byte* tokens0, const std::byte* tokens1, std::int64_t steps,
                           bool both) {
  constexpr std::int64_t kTile = kRows * kStep;
  if (both) {
    for (std::int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, rows0 + kTile * s, 64);
      _tile_loadd(6, tokens0 + kTileBytes * static_cast<std::size_t>(s), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, rows1 + kTile * s, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, tokens1 + kTileBytes * static_cast<std::size_t>(s), 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else {
    for (std::int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, rows0 + kTile * s, 64);
      _tile_loadd(6, tokens0 + kTileBytes * static_cast<std::size_t>(s), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, rows1 + kTile * s, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
}

// sums[16][16] += part * the multiplier of the row's tile.
inline void add_scaled(float (*sums)[kTileTokens], float (*part)[kTileTokens],
                       const float (*scales)[kChunk / format::kFp8Tile], std::int64_t tile) {
  for (std::int64_t r = 0; r < kRows; ++r) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(part[r]), _mm512_set1_ps(scales[r][tile]),
                                       _mm512_loadu_ps(sums[r]));
    _mm512_storeu_ps(sums[r], sum);
  }
}

// Two tiles of rows with one or two groups of tokens, over one chunk.
template <WeightFormat format>
void multiply_block(TileScratch& s, std::int64_t row_tile, std::int64_t group, bool both,
                    const std::byte* x0, const std::byte* x1, std::int64_t steps) {
  auto* a0 = s.sums[row_tile][group];
  auto* a1 = s.sums[row_tile][group + (both ? 1 : 0)];
  auto* b0 = s.sums[row_tile + 1][group];
  auto* b1 = s.sums[row_tile + 1][group + (both ? 1 : 0)];
  const std::uint16_t* rows0 = s.weights[row_tile][0][0];
  const std::uint16_t* rows1 = s.weights[row_tile + 1][0][0];
  finish_stores();
  if constexpr (format != WeightFormat::kFp8Block) {
    load_sums(a0[0], a1[0], b0[0], b1[0], both);
    multiply_steps(rows0, rows1, x0, x1, steps, both);
    store_sums(a0[0], a1[0], b0[0], b1[0], both);
  } else {
    constexpr std::int64_t kSteps = format::kFp8Tile / kStep;
    for (std::int64_t tile = 0; tile * kSteps < steps; ++tile) {
      const std::int64_t first = tile * kSteps;
      const std::int64_t at = first * kRows * kStep;
      const auto bytes = static_cast<std::size_t>(first) * kTileBytes;
      zero_sums();
      multiply_steps(rows0 + at, rows1 + at, x0 + bytes, x1 + bytes, lesser(kSteps, steps - first),
                     both);
      store_sums(s.part[0][0], s.part[1][0], s.part[2][0], s.part[3][0], both);
      const auto* scales0 = s.scales + row_tile * kRows;
      const auto* scales1 = s.scales + (row_tile + 1) * kRows;
      add_scaled(a0, s.part[0], scales0, tile);
      add_scaled(b0, s.part[2], scales1, tile);
      if (both) {
        add_scaled(a1, s.part[1], scales0, tile);
        add_scaled(b1, s.part[3], scales1, tile);
      }
    }
  }
}

void write_results(const Product& p, std::int64_t token, std::int64_t tokens,
                   const TileScratch& scratch) {
  const float scale = scale_of_all(*p.weight);
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* y = y_row(p, token + t);
    for (std::int64_t r = 0; r < p.row_end - p.row_begin; ++r) {
      y[r] = scratch.sums[r / kRows][t / kTileTokens][r % kRows][t % kTileTokens] * scale;
    }
  }
}

template <WeightFormat format>
void multiply_format(const Product& p, TileScratch& scratch) {
  const std::int64_t cols = p.weight->cols;
  // Tiles of rows in pairs.
  const std::int64_t rows = (p.row_end - p.row_begin + 2 * kRows - 1) / (2 * kRows) * 2 * kRows;
  for (std::int64_t token = 0; token < p.tokens; token += kMostTokens) {
    const std::int64_t tokens = lesser(kMostTokens, p.tokens - token);
    const std::int64_t groups = (tokens + kTileTokens - 1) / kTileTokens;
    for (std::int64_t r = 0; r < rows / kRows; ++r) {
      std::memset(scratch.sums[r], 0, static_cast<std::size_t>(groups) * kTileBytes);
    }
    for (std::int64_t c = 0; c < cols; c += kChunk) {
      const std::int64_t end = lesser(c + kChunk, cols);
      const std::int64_t steps = steps_of(end - c);
      decode_chunk<format>(p, rows, c, end, scratch);
      for (std::int64_t g = 0; g < groups; g += 2) {
        const bool both = g + 1 < groups;
        const std::byte* x0 = p.x + static_cast<std::size_t>(token / kTileTokens + g) * p.x_stride +
                              static_cast<std::size_t>(c / kStep) * kTileBytes;
        const std::byte* x1 = both ? x0 + p.x_stride : x0;
        for (std::int64_t r = 0; r < rows / kRows; r += 2) {
          multiply_block<format>(scratch, r, g, both, x0, x1, steps);
        }
      }
    }
    write_results(p, token, tokens, scratch);
  }
}

// Eight tiles of 16 rows of 64 bytes.
struct TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
// Not on the stack: GCC thinks that _tile_loadconfig reads 8 bytes and would store no more.
constexpr TileConfig kConfig;

void multiply(const Product& p, std::byte* memory) {
  if (p.row_begin == p.row_end || p.tokens == 0) return;
  auto& scratch = *reinterpret_cast<TileScratch*>(memory);
  _tile_loadconfig(&kConfig);
  switch (p.weight->format) {
    case WeightFormat::kNvfp4:
      multiply_format<WeightFormat::kNvfp4>(p, scratch);
      break;
    case WeightFormat::kMxfp4:
      multiply_format<WeightFormat::kMxfp4>(p, scratch);
      break;
    case WeightFormat::kFp8Block:
      multiply_format<WeightFormat::kFp8Block>(p, scratch);
      break;
    default:
      multiply_format<WeightFormat::kBF16>(p, scratch);
      break;
  }
  _tile_release();
}

}  // namespace

const Tiles kTilesAmx = {"bf16_amx",  sizeof(TileScratch), kMostRows,
                         group_bytes, group_tokens,        multiply};

}  // namespace dsfp4::ops::cpu
