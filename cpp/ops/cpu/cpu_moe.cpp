// The chosen experts of one layer in two passes over the thread team: first gate, up and SiLU,
// then, with those results packed, the down-projections. A piece of work is a run of rows of one
// expert, so every thread reads long contiguous stretches; the pieces of all experts are one range,
// so nobody waits between experts. Bytes moved: the weights of each expert that was chosen, once
// for up to 96 tokens.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/checked.h"
#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kAddedColumns = 128;  // of a piece: long enough runs, enough pieces

std::size_t row_bytes(const WeightView& weight) {
  return format::data_bytes(weight.format, 1, weight.cols);
}

}  // namespace

void CpuBackend::list_tokens(std::span<const ExpertTask> tasks, std::int64_t top_k) {
  tokens_.clear();
  first_token_.clear();
  for (const ExpertTask& task : tasks) {
    first_token_.push_back(tokens_.size());
    for (const std::int32_t pair : task.pairs) {
      tokens_.push_back(static_cast<std::int32_t>(pair / top_k));
    }
  }
}

void CpuBackend::prepare(std::span<const ExpertTask> tasks, ConstMatrix x, Matrix hidden,
                         Phase phase) {
  std::array<bool, kPackings> packed{};
  std::size_t stride = 0;
  for (const ExpertTask& task : tasks) {
    for (const WeightView* weight : {&task.expert->gate_proj, &task.expert->up_proj}) {
      const Matmul& matmul = matmul_of(weight->format, phase);
      bool& done = packed.at(static_cast<std::size_t>(matmul.packing));
      if (!done) pack(matmul, x, Inputs::kBf16);
      done = true;
    }
    const Matmul& down = matmul_of(task.expert->down_proj.format, phase);
    stride = std::max(stride, down.packed_bytes(hidden.cols));
  }
  hidden_ = {hidden_memory_.get(static_cast<std::size_t>(hidden.rows) * stride), stride};
}

void CpuBackend::pack_hidden(std::span<const ExpertTask> tasks, std::size_t first_task,
                             ConstMatrix hidden, Phase phase) {
  const std::size_t first = first_token_[first_task];
  const std::size_t last = first_token_[first_task + tasks.size() - 1] + tasks.back().pairs.size();
  pool_.parallel_for(static_cast<std::int64_t>(last - first), 1, [&](auto begin, auto end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::size_t at = first + static_cast<std::size_t>(i);
      const auto after = std::upper_bound(first_token_.begin(), first_token_.end(), at);
      const auto task = static_cast<std::size_t>(after - first_token_.begin() - 1);
      const ExpertTask& of = tasks[task - first_task];
      const std::int32_t pair = of.pairs[at - first_token_[task]];
      matmul_of(of.expert->down_proj.format, phase)
          .pack(hidden.row(pair), hidden.cols, true, hidden_.row(pair));
    }
  });
}

void CpuBackend::gate_and_up(const ExpertTask& task, std::int64_t begin, std::int64_t end,
                             std::int64_t block, const Multiply& multiply, Matrix hidden,
                             std::byte* scratch) const {
  const raw::ExpertView expert = unwrap(*task.expert);
  const std::int64_t rows = end - begin;
  const auto tokens = static_cast<std::int64_t>(task.pairs.size());
  auto* gate = reinterpret_cast<float*>(scratch + ThreadScratch::padded(multiply_bytes_));
  float* up = gate + block * rows;
  const bool alike = expert.gate_proj.format == expert.up_proj.format;
  for (std::int64_t first = 0; first < tokens; first += block) {
    const std::int64_t count = std::min(block, tokens - first);
    multiply(expert.gate_proj, alike ? &expert.up_proj : nullptr, begin, end, first, count, gate,
             scratch);
    multiply(expert.up_proj, nullptr, begin, end, first, count, up, scratch);
    for (std::int64_t t = 0; t < count; ++t) {
      float* to = hidden.row(task.pairs[static_cast<std::size_t>(first + t)]);
      for (std::int64_t r = 0; r < rows; ++r) {
        const float g = gate[t * rows + r];
        to[begin + r] = g / (1.0f + std::exp(-g)) * up[t * rows + r];
      }
    }
  }
}

std::size_t CpuBackend::gate_and_up_bytes(std::int64_t rows, std::int64_t block) const {
  return ThreadScratch::padded(multiply_bytes_) +
         static_cast<std::size_t>(2 * block * rows) * sizeof(float);
}

void CpuBackend::experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ops::ConstMatrix x,
                         ops::Matrix between, ops::Matrix results, Phase phase) {
  if (tasks.empty()) return;
  list_tokens(tasks, top_k);
  compute_experts(tasks, unwrap(x), unwrap(between), unwrap(results), phase);
}

// Threads split columns: each adds to every token in the tasks' order.
void CpuBackend::add_fitting_experts(std::span<const ExpertTask> tasks,
                                     DeviceSpan<const float> weights, std::int64_t top_k,
                                     ops::ConstMatrix x, ops::Matrix between, ops::Matrix results,
                                     ops::Matrix sums, Phase phase) {
  std::size_t pairs = 0;
  for (const ExpertTask& task : tasks) pairs += task.pairs.size();
  const Matrix out = unwrap(results);
  const Matrix y = unwrap(sums);
  list_tokens(tasks, top_k);
  places_.resize(pairs);
  std::iota(places_.begin(), places_.end(), 0);
  placed_.clear();
  placed_.reserve(tasks.size());
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    const auto rows = std::span(places_).subspan(first_token_[t], tasks[t].pairs.size());
    placed_.push_back({tasks[t].expert, rows});
  }
  compute_experts(placed_, unwrap(x), unwrap(between), out, phase);

  const std::span<const float> mixing = unwrap(weights);
  pool_.parallel_for(ceil_div(y.cols, kAddedColumns), 1, [&](std::int64_t from, std::int64_t to) {
    const std::int64_t at = from * kAddedColumns;
    const std::int64_t count = std::min(to * kAddedColumns, y.cols) - at;
    std::int64_t row = 0;
    for (const ExpertTask& task : tasks) {
      for (const std::int32_t pair : task.pairs) {
        layer_.add_scaled(mixing[static_cast<std::size_t>(pair)], out.row(row++) + at,
                          y.row(pair / top_k) + at, count);
      }
    }
  });
}

void CpuBackend::compute_experts(std::span<const ExpertTask> tasks, ConstMatrix x, Matrix hidden,
                                 Matrix out, Phase phase) {
  prepare(tasks, x, hidden, phase);
  if (phase == Phase::kPrefill && isa_.tiles != nullptr && tiles_fit(tasks)) {
    return experts_in_tiles(tasks, hidden, out);
  }

  const auto task_count = static_cast<std::int64_t>(tasks.size());
  const std::int64_t rows = rows_per_piece(hidden.cols, row_bytes(tasks.front().expert->gate_proj),
                                           16, task_count, pool_.size());
  const std::int64_t pieces = ceil_div(hidden.cols, rows);
  thread_memory_.reserve(gate_and_up_bytes(rows, kExpertTokens));
  pool_.parallel_for(task_count * pieces, 1, [&](std::int64_t from, std::int64_t to) {
    const ThreadScratch::Block block = thread_memory_.take();
    for (std::int64_t piece = from; piece < to; ++piece) {
      const auto at = static_cast<std::size_t>(piece / pieces);
      const auto multiply = [&](const format::WeightView& weight, const format::WeightView* next,
                                std::int64_t begin, std::int64_t end, std::int64_t first,
                                std::int64_t count, float* y, std::byte* scratch) {
        const Matmul& matmul = matmul_of(weight.format, phase);
        const Packed& packed = x_.at(static_cast<std::size_t>(matmul.packing));
        matmul.multiply({.weight = &weight,
                         .row_begin = begin,
                         .row_end = end,
                         .x = packed.data,
                         .x_stride = packed.stride,
                         .x_index = tokens_.data() + first_token_[at] + first,
                         .y = y,
                         .y_stride = end - begin,
                         .tokens = count,
                         .next = next},
                        scratch);
      };
      const std::int64_t begin = piece % pieces * rows;
      gate_and_up(tasks[at], begin, std::min(begin + rows, hidden.cols), kExpertTokens, multiply,
                  hidden, block.data());
    }
  });
  pack_hidden(tasks, 0, hidden, phase);

  const std::int64_t down_rows = rows_per_piece(
      out.cols, row_bytes(tasks.front().expert->down_proj), 16, task_count, pool_.size());
  const std::int64_t down_pieces = ceil_div(out.cols, down_rows);
  pool_.parallel_for(task_count * down_pieces, 1, [&](std::int64_t from, std::int64_t to) {
    const ThreadScratch::Block block = thread_memory_.take();
    for (std::int64_t piece = from; piece < to; ++piece) {
      const ExpertTask& task = tasks[static_cast<std::size_t>(piece / down_pieces)];
      const format::WeightView down = unwrap(task.expert->down_proj);
      const Matmul& matmul = matmul_of(down.format, phase);
      const std::int64_t begin = piece % down_pieces * down_rows;
      matmul.multiply({.weight = &down,
                       .row_begin = begin,
                       .row_end = std::min(begin + down_rows, out.cols),
                       .x = hidden_.data,
                       .x_stride = hidden_.stride,
                       .x_index = task.pairs.data(),
                       .y = out.data + begin,
                       .y_stride = out.stride,
                       .y_index = task.pairs.data(),
                       .tokens = static_cast<std::int64_t>(task.pairs.size())},
                      block.data());
    }
  });
}

}  // namespace dsfp4::ops::cpu
