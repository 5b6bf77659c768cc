// Prefill: blocked causal attention. A task is a head of a sequence. It packs the head's part of
// kv_b_proj once, then walks the cached latents a block of kKvBlockTokens at a time: the block is
// expanded to keys and values once and meets every query that sees it, in tiles. For s cached
// tokens and r queries a head takes s (nope + v) kv_lora_rank multiply-adds to expand and at most
// s r (nope + rope + v) to attend. It moves the latents (s (kv_lora_rank + rope) cached values,
// from L2 or L3: all heads read the same) and its rows of the weight. Scratch of a thread: the
// packed weight, the packed queries and their sums, about
// (nope + v) kv_lora_rank + r (nope + rope + v) floats.
#include <algorithm>

#include "ops/cpu/attention_parts.h"
#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kTileQueries = 64;
constexpr std::int64_t kPackedRows = 16;  // rows of the weight decoded at a time

/// One head of one sequence.
class PrefillTask {
 public:
  PrefillTask(const Kernels& kernels, const LayerKernels& layer, const MlaShape& shape,
              const SequenceRows& sequence, const ThreadScratch::Block& block)
      : kernels_(kernels),
        layer_(layer),
        shape_(shape),
        sequence_(sequence),
        tiles_(tiles_of(sequence.rows)),
        value_pad_(value_pad(layer, shape)),
        kv_stride_(kv_stride(layer, shape)) {
    TaskScratch scratch(block);
    w_uk_ = scratch.take(packed_floats(layer, shape.kv_lora_rank, shape.qk_nope_head_dim));
    w_uv_ = scratch.take(packed_floats(layer, shape.kv_lora_rank, shape.v_head_dim));
    rows_ = scratch.take(kPackedRows * shape.kv_lora_rank);
    latents_ = scratch.take(kKvBlockTokens * shape.cache_width());
    kv_ = scratch.take(kKvBlockTokens * kv_stride_);
    queries_ = scratch.take(tiles_ * packed_tile());
    out_ = scratch.take(tiles_ * kTileQueries * value_pad_);
    maximum_ = scratch.take(tiles_ * kTileQueries);
    sum_ = scratch.take(tiles_ * kTileQueries);
    attend_ = scratch.take((kKvBlockTokens + 1) * kTileQueries);
  }

  /// Bytes that the constructor takes.
  static std::size_t bytes(const LayerKernels& layer, const MlaShape& shape, std::int64_t rows) {
    const std::int64_t lora = shape.kv_lora_rank;
    const std::int64_t tile = packed_floats(layer, shape.qk_head_dim(), kTileQueries);
    return TaskScratch::bytes(
        packed_floats(layer, lora, shape.qk_nope_head_dim) +
            packed_floats(layer, lora, shape.v_head_dim) + kPackedRows * lora +
            kKvBlockTokens * (shape.cache_width() + kv_stride(layer, shape) + kTileQueries) +
            kTileQueries + tiles_of(rows) * (tile + kTileQueries * (value_pad(layer, shape) + 2)),
        10);
  }

  void run(const format::WeightView& kv_b_proj, std::int64_t head, ConstMatrix q, Matrix out) {
    const std::int64_t expanded = shape_.qk_nope_head_dim + shape_.v_head_dim;
    pack_weight(kv_b_proj, head * expanded, shape_.qk_nope_head_dim, w_uk_);
    pack_weight(kv_b_proj, head * expanded + shape_.qk_nope_head_dim, shape_.v_head_dim, w_uv_);
    for (std::int64_t i = 0; i < tiles_; ++i) {
      const QueryTile tile = tile_at(i);
      pack_columns(layer_, q.row(sequence_.first_row + i * kTileQueries) + head * width(), q.stride,
                   tile.queries, width(), 1.0f, 0, queries_ + i * packed_tile());
      clear(tile);
    }
    for (std::int64_t first = 0; first < sequence_.length(); first += kKvBlockTokens) {
      attend_block(first, std::min(kKvBlockTokens, sequence_.length() - first));
    }
    for (std::int64_t r = 0; r < sequence_.rows; ++r) {
      layer_.scale(out_ + r * value_pad_, 1.0f / sum_[r],
                   out.row(sequence_.first_row + r) + head * shape_.v_head_dim, shape_.v_head_dim);
    }
  }

 private:
  std::int64_t width() const { return shape_.qk_head_dim(); }
  std::int64_t packed_tile() const { return packed_floats(layer_, width(), kTileQueries); }
  static std::int64_t tiles_of(std::int64_t rows) {
    return (rows + kTileQueries - 1) / kTileQueries;
  }
  static std::int64_t value_pad(const LayerKernels& layer, const MlaShape& shape) {
    return padded(shape.v_head_dim, layer.lanes);
  }
  // A row of a block: key, value, and room for the whole registers of either product.
  static std::int64_t kv_stride(const LayerKernels& layer, const MlaShape& shape) {
    return padded(shape.qk_head_dim() + value_pad(layer, shape), layer.lanes);
  }

  QueryTile tile_at(std::int64_t i) const {
    const std::int64_t first = i * kTileQueries;
    const std::int64_t queries = std::min(kTileQueries, sequence_.rows - first);
    return {queries,
            padded(queries, layer_.lanes),
            queries_ + i * packed_tile(),
            maximum_ + first,
            sum_ + first,
            out_ + first * value_pad_,
            value_pad_};
  }

  void pack_weight(const format::WeightView& weight, std::int64_t first, std::int64_t count,
                   float* to) {
    const std::int64_t lora = shape_.kv_lora_rank;
    for (std::int64_t i = 0; i < count; i += kPackedRows) {
      const std::int64_t some = std::min(kPackedRows, count - i);
      for (std::int64_t r = 0; r < some; ++r) {
        decode_weight_row(kernels_, layer_, weight, first + i + r, rows_ + r * lora);
      }
      pack_columns(layer_, rows_, lora, some, lora, global_scale(weight), i, to);
    }
  }

  // Keys and values of `count` tokens from token `first` on, into kv_: [nope | rope | v].
  void expand(std::int64_t first, std::int64_t count) {
    const std::int64_t lora = shape_.kv_lora_rank;
    const std::int64_t cached = shape_.cache_width();
    const std::int64_t nope = shape_.qk_nope_head_dim;
    read_cache(layer_, sequence_.kv, first, count, cached, latents_);
    layer_.multiply({latents_, cached, 1, w_uk_, layer_.panel, layer_.panel * lora, kv_, kv_stride_,
                     count, nope, lora});
    for (std::int64_t s = 0; s < count; ++s) {
      std::copy_n(latents_ + s * cached + lora, shape_.qk_rope_head_dim,
                  kv_ + s * kv_stride_ + nope);
    }
    layer_.multiply({latents_, cached, 1, w_uv_, layer_.panel, layer_.panel * lora, kv_ + width(),
                     kv_stride_, count, shape_.v_head_dim, lora});
  }

  void attend_block(std::int64_t first, std::int64_t count) {
    expand(first, count);
    for (std::int64_t i = 0; i < tiles_; ++i) {
      const QueryTile tile = tile_at(i);
      // Query r of the tile sees the keys up to its own position.
      const std::int64_t sees = sequence_.position + i * kTileQueries + 1 - first;
      if (sees + tile.queries <= 1) continue;
      std::int32_t visible[kTileQueries];
      for (std::int64_t r = 0; r < tile.lanes; ++r) {
        visible[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(sees + r, 0, count));
      }
      const bool all = sees >= count;
      attend(layer_, tile,
             {kv_, kv_stride_, width(), kv_ + width(), kv_stride_, shape_.v_head_dim, count,
              all ? nullptr : visible},
             shape_.softmax_scale, attend_);
    }
  }

  const Kernels& kernels_;
  const LayerKernels& layer_;
  const MlaShape& shape_;
  const SequenceRows& sequence_;
  std::int64_t tiles_, value_pad_, kv_stride_;
  float *w_uk_, *w_uv_, *rows_, *latents_, *kv_, *queries_, *out_, *maximum_, *sum_, *attend_;
};

}  // namespace

std::size_t prefill_task_bytes(const LayerKernels& layer, const MlaShape& shape,
                               std::int64_t rows) {
  return PrefillTask::bytes(layer, shape, rows);
}

void CpuBackend::prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                                   std::span<const SequenceRows> batch, ops::ConstMatrix q,
                                   ops::Matrix out) {
  const auto tasks = static_cast<std::int64_t>(batch.size()) * shape.heads;
  std::int64_t rows = 0;
  for (const SequenceRows& sequence : batch) rows = std::max(rows, sequence.rows);
  thread_memory_.reserve(prefill_task_bytes(layer_, shape, rows));
  pool_.parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    const ThreadScratch::Block block = thread_memory_.take();
    for (std::int64_t i = begin; i < end; ++i) {
      PrefillTask task(kernels_, layer_, shape, batch[static_cast<std::size_t>(i / shape.heads)],
                       block);
      task.run(unwrap(kv_b_proj), i % shape.heads, unwrap(q), unwrap(out));
    }
  });
}

}  // namespace dsfp4::ops::cpu
