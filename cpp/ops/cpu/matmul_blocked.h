// The blocked product of many tokens, shared by the arithmetics; included by one file for each
// instruction set. Internal linkage only, and no inline function from elsewhere: one that is
// compiled here could be linked into code that runs on older CPUs.
//
// A block of rows is decoded chunk by chunk of columns into scratch in the first-level cache and
// meets every token of a block there, so a weight is decoded once for kTokenBlock tokens. Between
// chunks the accumulators rest in scratch, lanes and all: bitwise as if they had stayed in
// registers.
#include <type_traits>

#include "ops/cpu/matmul.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kRowBlock = 32;
constexpr std::int64_t kTokenBlock = 96;

inline std::int64_t lesser(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline const std::byte* x_row(const Product& p, std::int64_t t) {
  return p.x + static_cast<std::size_t>(p.x_index != nullptr ? p.x_index[t] : t) * p.x_stride;
}

inline float* y_row(const Product& p, std::int64_t t) {
  return p.y + (p.y_index != nullptr ? p.y_index[t] : t) * p.y_stride;
}

// Asks for a line that is read soon; one past the memory does no harm. The processor's own
// prefetching alone leaves up to half of the bandwidth unused.
[[maybe_unused]] inline void prefetch(const void* address) { __builtin_prefetch(address); }

// Calls with the number of tokens as a constant; false if that is not 1 to `most`.
template <int most, class Call>
inline bool for_few(std::int64_t tokens, const Call& call) {
  if constexpr (most == 0) {
    return false;
  } else {
    if (tokens != most) return for_few<most - 1>(tokens, call);
    call(std::integral_constant<int, most>());
    return true;
  }
}

inline float scale_of_all(const format::WeightView& w) {
  return w.format == format::WeightFormat::kNvfp4 ? w.global_scale : 1.0f;
}

// K is one arithmetic:
//   Sum                     an accumulator: a vector of floats
//   kRows, kTokens          the tile in registers
//   kChunk                  columns of a chunk
//   kGroups                 so many times kRows decoded rows of a chunk fit into half of the
//                           first-level cache; tokens come from the second level once for all
//   Weights                 kRows decoded rows of a chunk
//   decode(weight, row, index, begin, end, Weights&)  row -> place `index` of kRows
//   tile<count>(Weights&, begin, end, x[count], Sum* [count][kRows])   adds to the sums
//   total(Sum)              its lanes, added up
template <class K, int count>
void tiles(const Product& p, const typename K::Weights& w, std::int64_t t, std::int64_t begin,
           std::int64_t end, typename K::Sum* sums) {
  const std::byte* x[count];
  for (int i = 0; i < count; ++i) x[i] = x_row(p, t + i);
  K::template tile<count>(w, begin, end, x, sums);
}

template <class K>
struct BlockedScratch {
  typename K::Weights weights[K::kGroups];
  typename K::Sum sums[kRowBlock / K::kRows][kTokenBlock][K::kRows];
};

template <class K>
void multiply_chunk(const Product& p, std::int64_t row, std::int64_t rows, std::int64_t token,
                    std::int64_t tokens, std::int64_t begin, std::int64_t end,
                    BlockedScratch<K>& scratch) {
  constexpr std::int64_t kDecoded = K::kRows * K::kGroups;
  static_assert(kRowBlock % kDecoded == 0);
  for (std::int64_t r = 0; r < rows; r += kDecoded) {
    const std::int64_t groups = (lesser(kDecoded, rows - r) + K::kRows - 1) / K::kRows;
    for (int i = 0; i < groups * K::kRows; ++i) {  // past the last row: that one, never written
      K::decode(*p.weight, row + lesser(r + i, rows - 1), i % K::kRows, begin, end,
                scratch.weights[i / K::kRows]);
    }
    for (std::int64_t t = 0; t < tokens; t += K::kTokens) {
      for (std::int64_t g = 0; g < groups; ++g) {
        for_few<K::kTokens>(lesser(K::kTokens, tokens - t), [&](auto count) {
          tiles<K, count>(p, scratch.weights[g], token + t, begin, end,
                          scratch.sums[r / K::kRows + g][t]);
        });
      }
    }
  }
}

template <class K>
void multiply_blocked(const Product& p, std::byte* memory) {
  auto& scratch = *reinterpret_cast<BlockedScratch<K>*>(memory);
  const std::int64_t cols = p.weight->cols;
  const float scale = scale_of_all(*p.weight);
  for (std::int64_t token = 0; token < p.tokens; token += kTokenBlock) {
    const std::int64_t tokens = lesser(kTokenBlock, p.tokens - token);
    for (std::int64_t row = p.row_begin; row < p.row_end; row += kRowBlock) {
      const std::int64_t rows = lesser(kRowBlock, p.row_end - row);
      for (std::int64_t r = 0; r < rows; r += K::kRows) {
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (auto& sum : scratch.sums[r / K::kRows][t]) sum = typename K::Sum{};
        }
      }
      for (std::int64_t c = 0; c < cols; c += K::kChunk) {
        multiply_chunk<K>(p, row, rows, token, tokens, c, lesser(c + K::kChunk, cols), scratch);
      }
      for (std::int64_t t = 0; t < tokens; ++t) {
        float* y = y_row(p, token + t) + (row - p.row_begin);
        for (std::int64_t r = 0; r < rows; ++r) {
          y[r] = K::total(scratch.sums[r / K::kRows][t][r % K::kRows]) * scale;
        }
      }
    }
  }
}

}  // namespace
}  // namespace dsfp4::ops::cpu
