// Prefill with tiles (tiles.h): tokens are gathered into groups of 16 first, then each piece of
// work multiplies a run of rows with all tokens of a matrix or of an expert.
#include <algorithm>

#include "base/checked.h"
#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

// Rows of a piece: two tiles or a multiple of that.
std::int64_t tile_rows(const Tiles& tiles, std::int64_t rows, std::int64_t matrices, int threads) {
  constexpr std::int64_t kStep = 32;
  const std::int64_t even = ceil_div(rows * matrices, std::int64_t{6} * threads);
  return std::min(std::max<std::int64_t>(ceil_div(even, kStep), 1) * kStep, tiles.most_rows);
}

}  // namespace

bool CpuBackend::tiles_fit(std::span<const ExpertTask> tasks) const {
  return std::ranges::all_of(tasks, [&](const ExpertTask& task) {
    const Matmul& gate = matmul_of(task.expert->gate_proj.format, Phase::kPrefill);
    const Matmul& up = matmul_of(task.expert->up_proj.format, Phase::kPrefill);
    const Matmul& down = matmul_of(task.expert->down_proj.format, Phase::kPrefill);
    return gate.packing == up.packing && &gate != isa_.exact && &down != isa_.exact;
  });
}

void CpuBackend::linear_in_tiles(const format::WeightView& weight, const Packed& x,
                                 std::int64_t tokens, Matrix y) {
  const Tiles& tiles = *isa_.tiles;
  const std::size_t bytes = tiles.group_bytes(weight.cols);
  const std::int64_t groups = ceil_div(tokens, kTileTokens);
  std::byte* memory = groups_memory_.get(static_cast<std::size_t>(groups) * bytes);
  pool_.parallel_for(groups, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
      const std::int64_t first = g * kTileTokens;
      tiles.group(x.row(first), x.stride, nullptr, std::min(kTileTokens, tokens - first),
                  weight.cols, memory + static_cast<std::size_t>(g) * bytes);
    }
  });
  const std::int64_t rows = tile_rows(tiles, weight.rows, 1, pool_.size());
  thread_memory_.reserve(multiply_bytes_);
  pool_.parallel_for(ceil_div(weight.rows, rows), 1, [&](std::int64_t from, std::int64_t to) {
    const ThreadScratch::Block block = thread_memory_.take();
    for (std::int64_t piece = from; piece < to; ++piece) {
      const std::int64_t begin = piece * rows;
      tiles.multiply({.weight = &weight,
                      .row_begin = begin,
                      .row_end = std::min(begin + rows, weight.rows),
                      .x = memory,
                      .x_stride = bytes,
                      .y = y.data + begin,
                      .y_stride = y.stride,
                      .tokens = tokens},
                     block.data());
    }
  });
}

void CpuBackend::experts_in_tiles(std::span<const ExpertTask> tasks, Matrix hidden, Matrix out) {
  const std::size_t bytes = isa_.tiles->group_bytes(std::max(hidden.cols, out.cols));
  const std::int64_t room = groups_at_once(bytes);
  for (std::size_t first = 0; first < tasks.size();) {
    first_group_.assign(1, 0);
    std::size_t last = first;
    do {
      const auto pairs = static_cast<std::int64_t>(tasks[last].pairs.size());
      first_group_.push_back(first_group_.back() + ceil_div(pairs, kTileTokens));
      ++last;
    } while (last < tasks.size() && first_group_.back() < room);
    group_tasks(tasks.subspan(first, last - first), first, hidden, out);
    first = last;
  }
}

void CpuBackend::make_groups(std::span<const ExpertTask> tasks, std::int64_t cols,
                             std::size_t bytes, std::byte* memory, const Source& source_of) {
  pool_.parallel_for(first_group_.back(), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
      const auto after = std::ranges::upper_bound(first_group_, g);
      const auto at = static_cast<std::size_t>(after - first_group_.begin() - 1);
      const std::int64_t first = (g - first_group_[at]) * kTileTokens;
      const auto pairs = static_cast<std::int64_t>(tasks[at].pairs.size());
      const auto [x, index] = source_of(at);
      isa_.tiles->group(x.data, x.stride, index + first, std::min(kTileTokens, pairs - first), cols,
                        memory + static_cast<std::size_t>(g) * bytes);
    }
  });
}

void CpuBackend::group_tasks(std::span<const ExpertTask> tasks, std::size_t first_task,
                             Matrix hidden, Matrix out) {
  const Tiles& tiles = *isa_.tiles;
  const auto task_count = static_cast<std::int64_t>(tasks.size());
  const auto groups = static_cast<std::size_t>(first_group_.back());
  const std::size_t x_bytes = tiles.group_bytes(tasks.front().expert->gate_proj.cols);
  const std::size_t hidden_bytes = tiles.group_bytes(hidden.cols);
  std::byte* memory = groups_memory_.get(groups * (x_bytes + hidden_bytes));
  std::byte* hidden_groups = memory + groups * x_bytes;
  const auto group_of = [&](std::byte* base, std::size_t bytes, std::size_t task,
                            std::int64_t token) {
    return base + static_cast<std::size_t>(first_group_[task] + token / kTileTokens) * bytes;
  };

  make_groups(tasks, tasks.front().expert->gate_proj.cols, x_bytes, memory, [&](std::size_t at) {
    const Matmul& gate = matmul_of(tasks[at].expert->gate_proj.format, Phase::kPrefill);
    return std::pair(
        x_.at(static_cast<std::size_t>(gate.packing)),
        static_cast<const std::int32_t*>(tokens_.data() + first_token_[first_task + at]));
  });
  const std::int64_t rows = tile_rows(tiles, hidden.cols, task_count, pool_.size());
  const std::int64_t pieces = ceil_div(hidden.cols, rows);
  thread_memory_.reserve(gate_and_up_bytes(rows, kTileExpertTokens));
  pool_.parallel_for(task_count * pieces, 1, [&](std::int64_t from, std::int64_t to) {
    const ThreadScratch::Block block = thread_memory_.take();
    for (std::int64_t piece = from; piece < to; ++piece) {
      const auto at = static_cast<std::size_t>(piece / pieces);
      const auto multiply = [&](const format::WeightView& weight, const format::WeightView*,
                                std::int64_t begin, std::int64_t end, std::int64_t first,
                                std::int64_t count, float* y, std::byte* scratch) {
        tiles.multiply({.weight = &weight,
                        .row_begin = begin,
                        .row_end = end,
                        .x = group_of(memory, x_bytes, at, first),
                        .x_stride = x_bytes,
                        .y = y,
                        .y_stride = end - begin,
                        .tokens = count},
                       scratch);
      };
      const std::int64_t begin = piece % pieces * rows;
      gate_and_up(tasks[at], begin, std::min(begin + rows, hidden.cols), kTileExpertTokens,
                  multiply, hidden, block.data());
    }
  });

  pack_hidden(tasks, first_task, hidden, Phase::kPrefill);
  make_groups(tasks, hidden.cols, hidden_bytes, hidden_groups,
              [&](std::size_t at) { return std::pair(hidden_, tasks[at].pairs.data()); });
  const std::int64_t down_rows = tile_rows(tiles, out.cols, task_count, pool_.size());
  const std::int64_t down_pieces = ceil_div(out.cols, down_rows);
  pool_.parallel_for(task_count * down_pieces, 1, [&](std::int64_t from, std::int64_t to) {
    const ThreadScratch::Block block = thread_memory_.take();
    for (std::int64_t piece = from; piece < to; ++piece) {
      const auto at = static_cast<std::size_t>(piece / down_pieces);
      const std::int64_t begin = piece % down_pieces * down_rows;
      const format::WeightView down = unwrap(tasks[at].expert->down_proj);
      tiles.multiply({.weight = &down,
                      .row_begin = begin,
                      .row_end = std::min(begin + down_rows, out.cols),
                      .x = group_of(hidden_groups, hidden_bytes, at, 0),
                      .x_stride = hidden_bytes,
                      .y = out.data + begin,
                      .y_stride = out.stride,
                      .y_index = tasks[at].pairs.data(),
                      .tokens = static_cast<std::int64_t>(tasks[at].pairs.size())},
                     block.data());
    }
  });
}

}  // namespace dsfp4::ops::cpu
