// FP4 in the decode phase with AVX-512 BF16: NVFP4 (0.5625 bytes a weight), MXFP4 (0.53), any
// number of tokens. (Prefill: matmul_bf16_avx512bf16.cpp. The sums of the two run in another order,
// so the phase chooses between them, never a size.)
//
// A chunk is 64 bytes, 128 columns. Word w of it holds the codes of columns 4w .. 4w + 3, so the
// words shifted right by 0, 4, 8, 12 bits are four sets of indices into a table of the 16 values of
// E2M1: it stands twice in its register of 32 words, and the bits above an index do not matter.
// Activations are packed to match: vector i of a chunk holds columns 4w + i. Four vdpbf16ps add the
// unscaled products from zero, which leaves the sum of columns 8l .. 8l + 7 in lane l, and one FMA
// with each lane's block scale adds them to the accumulator of (row, token). A scale that is NaN
// makes its row NaN; that is looked up once for a row, beside the loop.
//
// Up to 4 tokens: 2 rows at a time are decoded in registers, and the next 2 are prefetched. One
// token and 128 NVFP4 weights take 16 vector instructions (MXFP4: 15): 8 cycles on a core with two
// ports for them, 9 bytes a cycle. Another token adds 5 instructions. More tokens: matmul_blocked.h
// with tiles of 2 rows x 6 tokens.
#include "ops/cpu/bf16_avx512bf16.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kChunkCols = 128;
constexpr std::int64_t kChunkBytes = kChunkCols / 2;
constexpr std::size_t kPackedChunk = kChunkCols * 2;  // bytes of activations
constexpr int kRows = 2;

inline std::int64_t chunks_of(std::int64_t cols) { return (cols + kChunkCols - 1) / kChunkCols; }

// ---- activations -------------------------------------------------------------------------------

std::size_t packed_chunk_bytes(std::int64_t cols) {
  return static_cast<std::size_t>(chunks_of(cols)) * kPackedChunk;
}

// 32 columns at a time, so that a piece of work on an expert need not be longer: 8 words of each
// vector of their chunk.
void pack_chunks(const float* x, std::int64_t cols, std::int64_t begin, std::int64_t end, bool,
                 std::byte* out) {
  const std::int64_t padded = end == cols ? chunks_of(cols) * kChunkCols : end;
  // Words 0, 4, 8, .. 28, then 1, 5, ..
  const __m512i order =
      _mm512_setr_epi32(0x00040000, 0x000c0008, 0x00140010, 0x001c0018, 0x00050001, 0x000d0009,
                        0x00150011, 0x001d0019, 0x00060002, 0x000e000a, 0x00160012, 0x001e001a,
                        0x00070003, 0x000f000b, 0x00170013, 0x001f001b);
  for (std::int64_t c = begin; c < padded; c += kStep) {
    float tail[kStep] = {};
    const float* from = x + c;
    if (end - c < kStep) {
      if (c < end) std::memcpy(tail, from, static_cast<std::size_t>(end - c) * sizeof(float));
      from = tail;
    }
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    __m512i words;
    std::memcpy(&words, &both, sizeof(words));
    alignas(64) std::byte ordered[64];
    _mm512_store_si512(ordered, _mm512_permutexvar_epi16(order, words));
    std::byte* to = out + c / kChunkCols * static_cast<std::int64_t>(kPackedChunk) +
                    c % kChunkCols / kStep * 16;
    for (std::int64_t i = 0; i < 4; ++i) std::memcpy(to + 64 * i, ordered + 16 * i, 16);
  }
}

// ---- weights -----------------------------------------------------------------------------------

inline __mmask64 first_bytes(std::int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count & 63)) - 1;
}

struct Nvfp4Scales {
  using Bytes = std::uint64_t;  // of a chunk
  static constexpr std::int64_t kCols = 16;

  // Each code into the two lanes of its block, its sign on top; then the bits of a float that is
  // 2^120 times too small, subnormals included.
  static __m512 decode(Bytes codes) {
    const __m512i order =
        _mm512_setr_epi32(0x00ffffff, 0x00ffffff, 0x01ffffff, 0x01ffffff, 0x02ffffff, 0x02ffffff,
                          0x03ffffff, 0x03ffffff, 0x04ffffff, 0x04ffffff, 0x05ffffff, 0x05ffffff,
                          0x06ffffff, 0x06ffffff, 0x07ffffff, 0x07ffffff);
    const __m512i all = _mm512_set1_epi64(static_cast<long long>(codes));
    const __m512i spread = _mm512_srai_epi32(_mm512_shuffle_epi8(all, order), 4);
    const __m512i bits = _mm512_and_si512(spread, _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
    return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  }
  static __mmask64 nan(__m512i codes) {
    const __m512i magnitude = _mm512_set1_epi8(0x7f);
    return _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude);
  }
};

struct Mxfp4Scales {
  using Bytes = std::uint32_t;
  static constexpr std::int64_t kCols = 32;

  // Each code into the four lanes of its block, as the exponent of a float; code 0 is 2^-127.
  static __m512 decode(Bytes codes) {
    const __m512i order =
        _mm512_setr_epi32(0x00ffffff, 0x00ffffff, 0x00ffffff, 0x00ffffff, 0x01ffffff, 0x01ffffff,
                          0x01ffffff, 0x01ffffff, 0x02ffffff, 0x02ffffff, 0x02ffffff, 0x02ffffff,
                          0x03ffffff, 0x03ffffff, 0x03ffffff, 0x03ffffff);
    const __m512i all = _mm512_set1_epi32(static_cast<int>(codes));
    const __m512i bits = _mm512_srli_epi32(_mm512_shuffle_epi8(all, order), 1);
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(0x00400000)));
  }
  static __mmask64 nan(__m512i codes) {
    return _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(-1));
  }
};

// 128 columns of a row.
struct Chunk {
  __m512i w[4];
  __m512 scale;
};

template <class Scales>
struct Row {
  using Bytes = typename Scales::Bytes;

  Row(const WeightView& weight, std::int64_t row)
      : cols(weight.cols),
        data(reinterpret_cast<const std::uint8_t*>(weight.data) + row * weight.cols / 2),
        scales(reinterpret_cast<const std::uint8_t*>(weight.scales) +
               row * weight.cols / Scales::kCols) {}

  static Chunk decode(__m512i codes, Bytes scale_codes) {
    const __m512i values = _mm512_setr_epi32(
        0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080, static_cast<int>(0xbf008000),
        static_cast<int>(0xbfc0bf80), static_cast<int>(0xc040c000), static_cast<int>(0xc0c0c080),
        0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080, static_cast<int>(0xbf008000),
        static_cast<int>(0xbfc0bf80), static_cast<int>(0xc040c000), static_cast<int>(0xc0c0c080));
    return {{_mm512_permutexvar_epi16(codes, values),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), values),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), values),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), values)},
            Scales::decode(scale_codes)};
  }
  Chunk whole(std::int64_t i) const {
    Bytes codes;
    std::memcpy(&codes, scales + sizeof(codes) * static_cast<std::size_t>(i), sizeof(codes));
    return decode(load_512(data + kChunkBytes * i), codes);
  }
  // The last one, if it is not whole: zeros past the last column.
  Chunk part(std::int64_t i) const {
    const std::int64_t left = cols - i * kChunkCols;
    Bytes codes = 0;
    std::memcpy(&codes, scales + sizeof(codes) * static_cast<std::size_t>(i),
                static_cast<std::size_t>(left / Scales::kCols));
    return decode(_mm512_maskz_loadu_epi8(first_bytes(left / 2), data + kChunkBytes * i), codes);
  }
  /// Whether a block of columns [begin, end) has the scale NaN.
  bool nan(std::int64_t begin, std::int64_t end) const {
    __mmask64 found = 0;
    for (std::int64_t b = begin / Scales::kCols; b < end / Scales::kCols; b += 64) {
      const __mmask64 mask = first_bytes(end / Scales::kCols - b);
      found |= Scales::nan(_mm512_maskz_loadu_epi8(mask, scales + b));
    }
    return found != 0;
  }
  // Chunk `i` of the row that lies kRows further on: the next to be computed.
  void prefetch_next(std::int64_t i) const {
    prefetch(data + kRows * cols / 2 + kChunkBytes * i);
    prefetch(scales + kRows * cols / Scales::kCols + static_cast<std::int64_t>(sizeof(Bytes)) * i);
  }

  std::int64_t cols;
  const std::uint8_t* data;
  const std::uint8_t* scales;
};

// Adds a chunk of kRows rows times `count` tokens; x[t] + offset: its packed activations.
template <int count>
inline void add_chunk(const Chunk* chunks, const std::byte* const* x, std::int64_t offset,
                      __m512 (*sum)[kRows]) {
  for (int t = 0; t < count; ++t) {
    __m512bh values[4];
    for (std::int64_t i = 0; i < 4; ++i) values[i] = as_bf16(load_512(x[t] + offset + 64 * i));
    for (int r = 0; r < kRows; ++r) {
      __m512 part = _mm512_setzero_ps();
      for (int i = 0; i < 4; ++i) {
        part = _mm512_dpbf16_ps(part, as_bf16(chunks[r].w[i]), values[i]);
      }
      sum[t][r] = _mm512_fmadd_ps(part, chunks[r].scale, sum[t][r]);
    }
  }
}

// ---- few tokens --------------------------------------------------------------------------------

template <class Scales, int count>
void multiply_direct(const Product& p) {
  const std::int64_t cols = p.weight->cols;
  const std::int64_t whole = cols / kChunkCols;
  const float scale = scale_of_all(*p.weight);
  const std::byte* x[count];
  for (int t = 0; t < count; ++t) x[t] = x_row(p, t);
  for (std::int64_t row = p.row_begin; row < p.row_end; row += kRows) {
    // Past the last row: that row once more, never written.
    const Row<Scales> rows[kRows] = {{*p.weight, row}, {*p.weight, lesser(row + 1, p.row_end - 1)}};
    __m512 sum[count][kRows];
    for (int t = 0; t < count; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < whole; ++i) {
      const Chunk chunks[kRows] = {rows[0].whole(i), rows[1].whole(i)};
      rows[0].prefetch_next(i);
      rows[1].prefetch_next(i);
      add_chunk<count>(chunks, x, static_cast<std::int64_t>(kPackedChunk) * i, sum);
    }
    if (whole * kChunkCols < cols) {
      const Chunk chunks[kRows] = {rows[0].part(whole), rows[1].part(whole)};
      add_chunk<count>(chunks, x, static_cast<std::int64_t>(kPackedChunk) * whole, sum);
    }
    for (int r = 0; r < kRows && row + r < p.row_end; ++r) {
      const bool nan = rows[r].nan(0, cols);
      for (int t = 0; t < count; ++t) {
        y_row(p, t)[row + r - p.row_begin] = nan ? __builtin_nanf("") : total_of(sum[t][r]) * scale;
      }
    }
  }
}

// ---- more --------------------------------------------------------------------------------------

template <class Scales>
struct Blocked {
  using Sum = __m512;
  static constexpr int kRows = cpu::kRows;
  static constexpr int kTokens = 6;
  static constexpr std::int64_t kChunk = 1024;
  static constexpr int kGroups = 1;
  struct Weights {
    Chunk chunk[kChunk / kChunkCols][kRows];
  };

  static void decode(const WeightView& w, std::int64_t row, int index, std::int64_t begin,
                     std::int64_t end, Weights& weights) {
    const Row<Scales> from(w, row);
    const std::int64_t first = begin / kChunkCols;
    const std::int64_t last = end / kChunkCols;
    for (std::int64_t i = first; i < last; ++i) {
      weights.chunk[i - first][index] = from.whole(i);
      from.prefetch_next(i);
    }
    if (last * kChunkCols < end) weights.chunk[last - first][index] = from.part(last);
    if (!from.nan(begin, end)) return;
    for (auto& chunk : weights.chunk) chunk[index].scale = _mm512_set1_ps(__builtin_nanf(""));
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
    const std::int64_t chunks = chunks_of(end - begin);
    for (std::int64_t i = 0; i < chunks; ++i) {
      add_chunk<count>(w.chunk[i], x, static_cast<std::int64_t>(kPackedChunk) * i, sum);
    }
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t * kRows + r] = sum[t][r];
    }
  }

  static float total(const Sum& sum) { return total_of(sum); }
};

template <class Scales>
void multiply(const Product& p, std::byte* scratch) {
  const bool few = for_few<4>(p.tokens, [&](auto count) { multiply_direct<Scales, count>(p); });
  if (!few) multiply_blocked<Blocked<Scales>>(p, scratch);
}

void multiply_fp4(const Product& p, std::byte* scratch) {
  if (p.weight->format == WeightFormat::kNvfp4) return multiply<Nvfp4Scales>(p, scratch);
  multiply<Mxfp4Scales>(p, scratch);
}

}  // namespace

const Matmul kMatmulFp4DecodeAvx512Bf16 = {
    "fp4_decode_avx512bf16", 4,           kChunkCols,  sizeof(BlockedScratch<Blocked<Nvfp4Scales>>),
    packed_chunk_bytes,      pack_chunks, multiply_fp4};

}  // namespace dsfp4::ops::cpu
