// Decode: absorbed latent attention. A task is a fixed piece of one row's context and some of its
// heads. It reads the piece's cached rows once for all of its heads, a block of kKvBlockTokens at a
// time, and takes scores and sums as small matrix products: for h heads and s cached tokens
// s h (2 kv_lora_rank + rope) multiply-adds on s (kv_lora_rank + rope) cached values. At R1's 128
// heads those are 242 multiply-adds a value, so that arithmetic, not the cache's bytes, is the
// floor. A piece leaves maximum, sum and unscaled result of each head; they are joined in the order
// of the pieces. Where pieces end depends on the length of the context alone, and heads do not
// meet, so neither threads nor company change a sum.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/cpu/attention_parts.h"
#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kPieceTokens = 512;
constexpr std::int64_t kMostPieces = 64;  // so that partial results stay small
constexpr std::int64_t kPartialFloats = std::int64_t{1} << 23;  // 32 MiB of them at a time
constexpr std::int64_t kWeightRows = 32;  // rows of the weight decoded at a time

/// One token's query and its place among the partial results.
struct Row {
  const SequenceRows* sequence;
  std::int64_t row;      // of the batch
  std::int64_t visible;  // tokens of context
  std::int64_t piece;    // tokens of a piece
  std::int64_t pieces;
  std::int64_t first_partial;
};

Row make_row(const SequenceRows& sequence, std::int64_t r) {
  const std::int64_t visible = sequence.position + r + 1;
  const std::int64_t piece =
      std::max(kPieceTokens, padded((visible + kMostPieces - 1) / kMostPieces, kKvBlockTokens));
  return {&sequence, sequence.first_row + r, visible, piece, (visible + piece - 1) / piece, 0};
}

/// Rows whose partial results fit together, and the work on them.
class Wave {
 public:
  Wave(const LayerKernels& layer, const MlaShape& shape, ConstMatrix q_abs, ConstMatrix q,
       Scratch& partials, ThreadScratch& thread_memory)
      : layer_(layer),
        shape_(shape),
        q_abs_(q_abs),
        q_(q),
        out_stride_(padded(shape.kv_lora_rank, layer.lanes)),
        partials_(partials),
        thread_memory_(thread_memory) {}

  bool fits(const Row& row) const {
    return rows_.empty() ||
           (pieces_ + row.pieces) * shape_.heads * (out_stride_ + 2) <= kPartialFloats;
  }
  void add(Row row) {
    row.first_partial = pieces_;
    for (std::int64_t i = 0; i < row.pieces; ++i) {
      tasks_.push_back({static_cast<std::int64_t>(rows_.size()), i});
    }
    pieces_ += row.pieces;
    rows_.push_back(row);
  }

  void run(ThreadPool& pool, Matrix out) {
    if (pieces_ == 0) return;  // no rows
    const auto results = static_cast<std::size_t>(pieces_ * shape_.heads);
    sums_ = reinterpret_cast<float*>(
        partials_.get(results * static_cast<std::size_t>(out_stride_ + 2) * sizeof(float)));
    maxima_ = sums_ + results * static_cast<std::size_t>(out_stride_);
    totals_ = maxima_ + results;
    // Fewer heads a task only if there are not enough pieces for the threads.
    const std::int64_t wanted = (2 * pool.size() + pieces_ - 1) / pieces_;
    const std::int64_t most = padded(shape_.heads, layer_.lanes) / (2 * layer_.lanes);
    const std::int64_t groups =
        pool.size() == 1 ? 1 : std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(most, 1));
    const std::int64_t heads = padded((shape_.heads + groups - 1) / groups, layer_.lanes);
    const std::int64_t parts = (shape_.heads + heads - 1) / heads;
    thread_memory_.reserve(latent_task_bytes(layer_, shape_, heads));
    pool.parallel_for(pieces_ * parts, 1, [&](std::int64_t begin, std::int64_t end) {
      const ThreadScratch::Block block = thread_memory_.take();
      for (std::int64_t i = begin; i < end; ++i) {
        const auto [row, piece] = tasks_[static_cast<std::size_t>(i / parts)];
        const std::int64_t first = i % parts * heads;
        attend_piece(rows_[static_cast<std::size_t>(row)], piece, first,
                     std::min(heads, shape_.heads - first), block);
      }
    });
    const auto row_count = static_cast<std::int64_t>(rows_.size());
    pool.parallel_for(row_count * shape_.heads, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        join(rows_[static_cast<std::size_t>(i / shape_.heads)], i % shape_.heads, out);
      }
    });
    rows_.clear();
    tasks_.clear();
    pieces_ = 0;
  }

 private:
  struct Task {
    std::int64_t row, piece;
  };

  std::size_t partial(const Row& row, std::int64_t piece, std::int64_t head) const {
    return static_cast<std::size_t>((row.first_partial + piece) * shape_.heads + head);
  }

  void attend_piece(const Row& row, std::int64_t piece, std::int64_t first, std::int64_t heads,
                    const ThreadScratch::Block& block) {
    const std::int64_t lora = shape_.kv_lora_rank;
    const std::int64_t rope = shape_.qk_rope_head_dim;
    const std::int64_t width = shape_.cache_width();
    const std::int64_t lanes = padded(heads, layer_.lanes);
    const std::int64_t packed = packed_floats(layer_, width, heads);
    TaskScratch scratch(block);
    float* queries = scratch.take(packed);
    float* latents = scratch.take(kKvBlockTokens * width);
    float* attend_scratch = scratch.take((kKvBlockTokens + 1) * lanes);
    float* together = scratch.take(heads * width);  // [absorbed | q_pe] of each head
    float* maximum = scratch.take(lanes);
    float* sum = scratch.take(lanes);

    for (std::int64_t h = 0; h < heads; ++h) {
      float* to = together + h * width;
      std::copy_n(q_abs_.row(row.row) + (first + h) * lora, lora, to);
      std::copy_n(q_.row(row.row) + (first + h) * shape_.qk_head_dim() + shape_.qk_nope_head_dim,
                  rope, to + lora);
    }
    pack_columns(layer_, together, width, heads, width, 1.0f, 0, queries);
    const std::size_t result = partial(row, piece, first);
    const QueryTile tile{heads,      lanes, queries,
                         maximum,    sum,   &sums_[result * static_cast<std::size_t>(out_stride_)],
                         out_stride_};
    clear(tile);
    const std::int64_t end = std::min((piece + 1) * row.piece, row.visible);
    for (std::int64_t s = piece * row.piece; s < end; s += kKvBlockTokens) {
      const std::int64_t count = std::min(kKvBlockTokens, end - s);
      read_cache(layer_, row.sequence->kv, s, count, width, latents);
      attend(layer_, tile, {latents, width, width, latents, width, lora, count, nullptr},
             shape_.softmax_scale, attend_scratch);
    }
    std::copy_n(maximum, heads, &maxima_[result]);
    std::copy_n(sum, heads, &totals_[result]);
  }

  void join(const Row& row, std::int64_t head, Matrix out) {
    float largest = maxima_[partial(row, 0, head)];
    for (std::int64_t i = 1; i < row.pieces; ++i) {
      largest = std::max(largest, maxima_[partial(row, i, head)]);
    }
    float total = 0.0f;
    for (std::int64_t i = 0; i < row.pieces; ++i) {
      const std::size_t p = partial(row, i, head);
      total += totals_[p] * std::exp(maxima_[p] - largest);
    }
    float* to = out.row(row.row) + head * shape_.kv_lora_rank;
    for (std::int64_t i = 0; i < row.pieces; ++i) {
      const std::size_t p = partial(row, i, head);
      const float share = std::exp(maxima_[p] - largest) / total;
      const float* from = &sums_[p * static_cast<std::size_t>(out_stride_)];
      if (i == 0) {
        layer_.scale(from, share, to, shape_.kv_lora_rank);
      } else {
        layer_.add_scaled(share, from, to, shape_.kv_lora_rank);
      }
    }
  }

  const LayerKernels& layer_;
  const MlaShape& shape_;
  ConstMatrix q_abs_, q_;
  std::int64_t out_stride_;
  std::int64_t pieces_ = 0;
  std::vector<Row> rows_;
  std::vector<Task> tasks_;  // one a piece
  Scratch& partials_;
  ThreadScratch& thread_memory_;
  // In partials_, of each piece and head: [out_stride_], 1, 1.
  float* sums_ = nullptr;
  float* maxima_ = nullptr;
  float* totals_ = nullptr;
};

}  // namespace

std::size_t latent_task_bytes(const LayerKernels& layer, const MlaShape& shape,
                              std::int64_t heads) {
  const std::int64_t width = shape.cache_width();
  const std::int64_t lanes = padded(heads, layer.lanes);
  return TaskScratch::bytes(packed_floats(layer, width, heads) + kKvBlockTokens * width +
                                (kKvBlockTokens + 1) * lanes + heads * width + 2 * lanes,
                            6);
}

std::size_t absorb_task_bytes(const LayerKernels& layer, const MlaShape& shape, std::int64_t rows) {
  return TaskScratch::bytes((kWeightRows + rows) * padded(shape.kv_lora_rank, layer.lanes), 2);
}

std::size_t latent_partial_bytes(const LayerKernels& layer, const MlaShape& shape,
                                 std::int64_t context) {
  const std::int64_t pieces = std::min((context + kPieceTokens - 1) / kPieceTokens, kMostPieces);
  return static_cast<std::size_t>(pieces * shape.heads *
                                  (padded(shape.kv_lora_rank, layer.lanes) + 2)) *
         sizeof(float);
}

void CpuBackend::latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                  ops::ConstMatrix q_abs, ops::ConstMatrix q,
                                  ops::Matrix attended) {
  const Matrix out = unwrap(attended);
  Wave wave(layer_, shape, unwrap(q_abs), unwrap(q), partials_, thread_memory_);
  bool any = false;
  for (const SequenceRows& sequence : batch) {
    for (std::int64_t r = 0; r < sequence.rows; ++r) {
      const Row row = make_row(sequence, r);
      if (!wave.fits(row)) wave.run(pool_, out);
      wave.add(row);
      any = true;
    }
  }
  if (any) wave.run(pool_, out);
}

// The head's rows of W_UK are decoded kWeightRows at a time and stay in L2 for the product.
void CpuBackend::absorb_query(const MlaShape& shape, const WeightView& kv_b_proj,
                              ops::ConstMatrix query, ops::Matrix absorbed) {
  const format::WeightView weight = unwrap(kv_b_proj);
  const ConstMatrix q = unwrap(query);
  const Matrix q_abs = unwrap(absorbed);
  const std::int64_t expanded = shape.qk_nope_head_dim + shape.v_head_dim;
  const std::int64_t lora = shape.kv_lora_rank;
  const std::int64_t stride = padded(lora, layer_.lanes);
  const float scale = global_scale(weight);
  thread_memory_.reserve(absorb_task_bytes(layer_, shape, q.rows));
  pool_.parallel_for(shape.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    const ThreadScratch::Block block = thread_memory_.take();
    TaskScratch scratch(block);
    float* rows = scratch.take(kWeightRows * stride);
    float* sums = scratch.take(q.rows * stride);
    for (std::int64_t h = begin; h < end; ++h) {
      std::fill_n(sums, q.rows * stride, 0.0f);
      for (std::int64_t i = 0; i < shape.qk_nope_head_dim; i += kWeightRows) {
        const std::int64_t some = std::min(kWeightRows, shape.qk_nope_head_dim - i);
        for (std::int64_t r = 0; r < some; ++r) {
          decode_weight_row(kernels_, layer_, weight, h * expanded + i + r, rows + r * stride);
        }
        layer_.multiply_add({q.data + h * shape.qk_head_dim() + i, q.stride, 1, rows, stride,
                             layer_.panel, sums, stride, q.rows, lora, some});
      }
      for (std::int64_t t = 0; t < q.rows; ++t) {
        layer_.scale(sums + t * stride, scale, q_abs.row(t) + h * lora, lora);
      }
    }
  });
}

void CpuBackend::expand_value(const MlaShape& shape, const WeightView& kv_b_proj,
                              ops::ConstMatrix latents, ops::Matrix values) {
  const format::WeightView weight = unwrap(kv_b_proj);
  const ConstMatrix attended = unwrap(latents);
  const Matrix out = unwrap(values);
  const std::int64_t value = shape.v_head_dim;
  const std::int64_t expanded = shape.qk_nope_head_dim + value;
  const std::int64_t lora = shape.kv_lora_rank;
  thread_memory_.reserve(absorb_task_bytes(layer_, shape, 1));  // more than a row
  pool_.parallel_for(shape.heads * value, 64, [&](std::int64_t begin, std::int64_t end) {
    const ThreadScratch::Block block = thread_memory_.take();
    TaskScratch scratch(block);
    float* row = scratch.take(lora);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t head = i / value;
      decode_weight_row(kernels_, layer_, weight,
                        head * expanded + shape.qk_nope_head_dim + i % value, row);
      layer_.dot(row, lora, attended.data + head * lora, attended.stride, attended.rows,
                 global_scale(weight), out.data + i, out.stride);
    }
  });
}

}  // namespace dsfp4::ops::cpu
