#include "emulated/operands.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "format/weight.h"

namespace dsfp4::ops::testing {

Batch keep(std::span<const SequenceRows> batch) {
  Batch kept;
  for (const SequenceRows& sequence : batch) {
    const auto blocks = sequence.kv.blocks;
    kept.push_back({sequence, {blocks.begin(), blocks.end()}});
    kept.back().rows.kv.blocks = {};
  }
  return kept;
}

bool same_places(const Batch& a, const Batch& b) {
  return std::ranges::equal(a, b, [](const KeptRows& one, const KeptRows& other) {
    return one.rows.first_row == other.rows.first_row && one.rows.rows == other.rows.rows &&
           one.rows.position == other.rows.position && one.blocks == other.blocks;
  });
}

std::vector<KeptTask> keep(std::span<const ExpertTask> tasks) {
  std::vector<KeptTask> kept;
  for (const ExpertTask& task : tasks) {
    kept.push_back({*task.expert, {task.pairs.begin(), task.pairs.end()}});
  }
  return kept;
}

WeightView Operands::operator()(const WeightView& weight) const {
  WeightView here = weight;
  const std::size_t data = format::data_bytes(weight.format, weight.rows, weight.cols);
  const std::size_t scales = format::scale_bytes(weight.format, weight.rows, weight.cols);
  here.data = at(weight.data, static_cast<std::int64_t>(data));
  here.scales = at(weight.scales, static_cast<std::int64_t>(scales));
  return here;
}

ExpertView Operands::operator()(const ExpertView& expert) const {
  return {(*this)(expert.gate_proj), (*this)(expert.up_proj), (*this)(expert.down_proj)};
}

Routing Operands::operator()(const Routing& routing) const {
  return {(*this)(routing.experts), (*this)(routing.used), (*this)(routing.weights),
          (*this)(routing.logits)};
}

std::span<const std::int32_t> Operands::ids(const std::vector<std::int32_t>& kept) const {
  return segment_ != nullptr ? segment_->ids : kept;
}

std::span<const SequenceRows> Operands::batch(const Batch& kept, std::int64_t width,
                                              Cached cached) {
  batch_ = segment_ != nullptr ? segment_->batch : kept;
  sequences_.clear();
  for (std::size_t i = 0; i < batch_.size(); ++i) {
    SequenceRows sequence = batch_[i].rows;
    sequence.kv = (segment_ != nullptr ? kept.front() : kept[i]).rows.kv;
    const std::int64_t first = cached == Cached::kNew ? sequence.position / kKvBlockTokens : 0;
    const std::int64_t end = (sequence.length() + kKvBlockTokens - 1) / kKvBlockTokens;
    std::vector<DevicePtr<std::byte>>& blocks = batch_[i].blocks;
    if (end > static_cast<std::int64_t>(blocks.size())) {
      throw std::logic_error("a sequence is longer than its blocks");
    }
    const auto bytes = static_cast<std::int64_t>(sequence.kv.layer_offset +
                                                 static_cast<std::size_t>(kKvBlockTokens * width) *
                                                     kv_value_bytes(sequence.kv.format));
    for (std::int64_t b = 0; b < static_cast<std::int64_t>(blocks.size()); ++b) {
      DevicePtr<std::byte>& block = blocks[static_cast<std::size_t>(b)];
      block = first <= b && b < end ? at(block, bytes) : nullptr;
    }
    sequence.kv.blocks = blocks;
    sequences_.push_back(sequence);
  }
  return sequences_;
}

std::span<const ExpertTask> Operands::tasks(std::span<const KeptTask> kept) {
  kept_tasks_.assign(kept.begin(), kept.end());
  tasks_.clear();
  for (KeptTask& task : kept_tasks_) {
    task.expert = (*this)(task.expert);
    tasks_.push_back({&task.expert, task.pairs});
  }
  return tasks_;
}

std::span<const ExpertTask> Operands::tasks(std::span<const ExpertView> experts,
                                            const Routing& routing) {
  std::map<std::int32_t, KeptTask> by_expert;
  const std::span<const std::int32_t> used = unwrap(routing.used);
  for (std::size_t pair = 0; pair < used.size(); ++pair) {
    const std::int32_t expert = used[pair];
    if (expert < 0 || static_cast<std::size_t>(expert) >= experts.size()) {
      throw std::logic_error("there is no expert " + std::to_string(expert));
    }
    KeptTask& task = by_expert[expert];
    task.expert = experts[static_cast<std::size_t>(expert)];
    task.pairs.push_back(static_cast<std::int32_t>(pair));
  }
  std::vector<KeptTask> kept;
  for (auto& [expert, task] : by_expert) kept.push_back(std::move(task));
  return tasks(kept);
}

}  // namespace dsfp4::ops::testing
