// The chosen experts of one layer: gate and up of all tasks first, then down, so that two passes
// over the thread team serve a whole layer.
#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kRowsPerPiece = 16;

}  // namespace

void CpuBackend::experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
                         Matrix hidden, Matrix out) {
  if (tasks.empty()) return;
  const ConstMatrix in = rounded(x, inputs_);
  const auto task_count = static_cast<std::int64_t>(tasks.size());

  const std::int64_t gate_pieces = ceil_div(hidden.cols, kRowsPerPiece);
  pool_.parallel_for(task_count * gate_pieces, 1, [&](std::int64_t begin, std::int64_t end) {
    float* gate_row = thread_scratch(0, x.cols);
    float* up_row = thread_scratch(1, x.cols);
    for (std::int64_t piece = begin; piece < end; ++piece) {
      const ExpertTask& task = tasks[static_cast<std::size_t>(piece / gate_pieces)];
      const ExpertView& expert = *task.expert;
      const std::int64_t first = piece % gate_pieces * kRowsPerPiece;
      const std::int64_t last = std::min(first + kRowsPerPiece, hidden.cols);
      for (std::int64_t r = first; r < last; ++r) {
        kernels_.decode_row(expert.gate_proj, r, gate_row);
        kernels_.decode_row(expert.up_proj, r, up_row);
        for (const std::int32_t pair : task.pairs) {
          const float* token = in.row(pair / top_k);
          float gate = 0.0f;
          float up = 0.0f;
          kernels_.dot_tokens(gate_row, in.cols, token, 0, 1, global_scale(expert.gate_proj), &gate,
                              1);
          kernels_.dot_tokens(up_row, in.cols, token, 0, 1, global_scale(expert.up_proj), &up, 1);
          float value = gate / (1.0f + std::exp(-gate)) * up;
          kernels_.round_to_bf16(&value, &value, 1);
          hidden.row(pair)[r] = value;
        }
      }
    }
  });

  const std::int64_t down_pieces = ceil_div(out.cols, kRowsPerPiece);
  pool_.parallel_for(task_count * down_pieces, 1, [&](std::int64_t begin, std::int64_t end) {
    float* down_row = thread_scratch(0, hidden.cols);
    for (std::int64_t piece = begin; piece < end; ++piece) {
      const ExpertTask& task = tasks[static_cast<std::size_t>(piece / down_pieces)];
      const format::WeightView& down = task.expert->down_proj;
      const std::int64_t first = piece % down_pieces * kRowsPerPiece;
      const std::int64_t last = std::min(first + kRowsPerPiece, out.cols);
      for (std::int64_t r = first; r < last; ++r) {
        kernels_.decode_row(down, r, down_row);
        for (const std::int32_t pair : task.pairs) {
          kernels_.dot_tokens(down_row, hidden.cols, hidden.row(pair), 0, 1, global_scale(down),
                              out.row(pair) + r, 1);
        }
      }
    }
  });
}

}  // namespace dsfp4::ops::cpu
