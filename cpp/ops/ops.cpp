#include "ops/ops.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace dsfp4::ops {

std::size_t kv_value_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return 4;
    case KvFormat::kBf16:
      return 2;
    case KvFormat::kFp8:
      return 1;
  }
  return 0;
}

std::int64_t added_pairs(std::int64_t rows, std::int64_t top_k) {
  constexpr std::int64_t kLeast = 1024;  // that a call's beginning and end cost little
  constexpr std::int64_t kMost = 4096;   // that a GPU is as fast as it can be
  return std::min(rows * top_k, std::clamp(rows, kLeast, kMost));
}

void Ops::add_experts(std::span<const ExpertTask> tasks, DeviceSpan<const float> weights,
                      std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                      Phase phase) {
  const auto room = static_cast<std::size_t>(std::min(hidden.rows, out.rows));
  std::vector<ExpertTask> some;
  std::size_t pairs = 0;
  const auto add_some = [&] {
    if (!some.empty()) {
      add_fitting_experts(some, weights, top_k, x, hidden, out, y, phase);
    }
    some.clear();
    pairs = 0;
  };
  for (const ExpertTask& task : tasks) {
    std::span<const std::int32_t> left = task.pairs;
    if (!left.empty() && room == 0) throw std::logic_error("add_experts() without scratch");
    if (pairs + left.size() > room) add_some();
    while (!left.empty()) {
      const std::size_t count = std::min(left.size(), room);
      some.push_back({task.expert, left.first(count)});
      pairs += count;
      left = left.subspan(count);
      if (!left.empty()) add_some();
    }
  }
  add_some();
}

void Ops::routed_experts(std::span<const ExpertView> /*experts*/, const Routing& /*routing*/,
                         std::int64_t /*top_k*/, ConstMatrix /*x*/, Matrix /*hidden*/,
                         Matrix /*routed*/, Matrix /*y*/, const ExpertView* /*shared*/) {
  throw std::logic_error("routed_experts() of a backend that has none");
}

}  // namespace dsfp4::ops
