// What prefill and decode share: one block of keys and values against a tile of queries, with an
// online softmax. The keys of a block are rows of A, the queries lie side by side as the panels of
// B, so that scores come out with a query in each SIMD lane and a softmax needs no sum across
// lanes. Blocks begin at multiples of kKvBlockTokens of the sequence: what a query gets depends on
// its own position alone, not on the borders of a chunk.
#pragma once

#include <cstdint>

#include "ops/cpu/kernels.h"
#include "ops/cpu/layer_kernels.h"
#include "ops/cpu/scratch.h"
#include "ops/host_ops.h"

namespace dsfp4::ops::cpu {

inline std::int64_t padded(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Hands out a thread's block as the arrays of one task. Contents are left over from before.
class TaskScratch {
 public:
  /// Bytes for `floats` in `arrays` arrays.
  static std::size_t bytes(std::int64_t floats, std::int64_t arrays);

  explicit TaskScratch(const ThreadScratch::Block& block)
      : next_(reinterpret_cast<float*>(block.data())) {}
  /// The next array, on a cache line of its own.
  float* take(std::int64_t floats);

 private:
  float* next_;
};

/// Bytes that the ops of attention take of a thread's block, for `rows` tokens of a sequence, and
/// for all heads in decode.
std::size_t prefill_task_bytes(const LayerKernels& layer, const MlaShape& shape, std::int64_t rows);
std::size_t latent_task_bytes(const LayerKernels& layer, const MlaShape& shape, std::int64_t heads);
std::size_t absorb_task_bytes(const LayerKernels& layer, const MlaShape& shape, std::int64_t rows);
/// Partial results of one row that looks at up to `context` tokens.
std::size_t latent_partial_bytes(const LayerKernels& layer, const MlaShape& shape,
                                 std::int64_t context);

/// Floats of a packed matrix [k, n].
inline std::int64_t packed_floats(const LayerKernels& kernels, std::int64_t k, std::int64_t n) {
  return padded(n, kernels.panel) * k;
}
/// Writes `count` consecutive rows of B^T, `row_stride` floats apart, as columns first, first + 1,
/// ... of the packed matrix `to` [k, n], times `scale`.
void pack_columns(const LayerKernels& kernels, const float* rows, std::int64_t row_stride,
                  std::int64_t count, std::int64_t k, float scale, std::int64_t first, float* to);

/// Queries side by side, with what they have gathered so far.
struct QueryTile {
  std::int64_t queries;     // real ones
  std::int64_t lanes;       // queries, padded to registers
  const float* packed;      // [width, lanes], packed
  float* maximum;           // [lanes]
  float* sum;               // [lanes]
  float* out;               // [queries, out_stride]: sums of values, not yet divided by `sum`
  std::int64_t out_stride;  // value width, padded to registers, or more
};
/// Sets maximum, sum and out to those of no keys.
void clear(const QueryTile& tile);

struct KeyBlock {
  const float* keys;
  std::int64_t key_stride, width;
  const float* values;  // readable up to value_width, padded to registers
  std::int64_t value_stride, value_width;
  std::int64_t count;           // at most kKvBlockTokens
  const std::int32_t* visible;  // keys that each query of the tile sees; null: all
};
/// `scratch`: (kKvBlockTokens + 1) * tile.lanes floats.
void attend(const LayerKernels& kernels, const QueryTile& tile, const KeyBlock& block, float scale,
            float* scratch);

/// Tokens first .. first + count of a sequence's cache as FP32 rows; count <= kKvBlockTokens and
/// all of them in one block of the cache.
void read_cache(const LayerKernels& kernels, const KvView& kv, std::int64_t first,
                std::int64_t count, std::int64_t width, float* to);

/// One row of a weight as FP32, but for the factor global_scale().
void decode_weight_row(const Kernels& kernels, const LayerKernels& layer,
                       const format::WeightView& weight, std::int64_t row, float* to);

}  // namespace dsfp4::ops::cpu
