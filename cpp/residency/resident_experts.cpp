#include "residency/resident_experts.h"

#include <algorithm>
#include <vector>

#include "ops/mlp.h"
#include "ops/scratch.h"
#include "residency/expert_tasks.h"

namespace dsfp4::residency {
namespace {

/// Experts that are computed together: a group's end costs a little, and all those of a prompt can
/// take seconds.
constexpr std::size_t kGroup = 32;

}  // namespace

class ResidentExperts::Work final : public ExpertWork {
 public:
  Work(ResidentExperts& runner, const ExpertLayer& layer, memory::Arena& arena)
      : backend_(runner.backend_), layer_(layer), scope_(arena) {
    const std::int64_t tokens = layer.x.rows;
    const std::int64_t pairs = tokens * layer.top_k;
    const std::span<const ops::ExpertView> experts = runner.experts_of_(layer.layer);
    const ops::ExpertView* shared = layer.shared;
    const bool in_a_slot =
        shared != nullptr && backend_.takes_shared(experts, *shared, tokens, layer.top_k);
    if (!in_a_slot) shared_into(shared, backend_, arena, layer.x, layer.y);
    hidden_ = ops::scratch_matrix(arena, in_a_slot ? pairs + tokens : pairs,
                                  runner.moe_intermediate_size_);
    routed_ = ops::scratch_matrix(arena, pairs, runner.hidden_size_);
    over_ = backend_.routed_experts(experts, layer.routing, layer.top_k, layer.x, hidden_, routed_,
                                    layer.y, in_a_slot ? shared : nullptr);
    if (over_) return;
    const auto count = static_cast<std::size_t>(pairs);
    const std::span order(arena.take_array<std::int32_t>(count), count);
    for (const ChosenExpert& chosen : group_by_expert(layer.routing.used, order)) {
      tasks_.push_back({&experts[static_cast<std::size_t>(chosen.expert)], chosen.pairs});
    }
  }

  bool advance() override {
    if (over_) return false;
    const auto group = std::span(tasks_).subspan(done_, std::min(kGroup, tasks_.size() - done_));
    backend_.experts(group, layer_.top_k, layer_.x, hidden_, routed_);
    done_ += group.size();
    if (done_ < tasks_.size()) return true;
    backend_.combine(routed_, layer_.routing.weights, layer_.top_k, layer_.y);
    over_ = true;
    return false;
  }

 private:
  ops::Backend& backend_;
  const ExpertLayer layer_;
  const ops::ScratchScope scope_;
  ops::Matrix hidden_, routed_;
  bool over_ = false;
  std::vector<ops::ExpertTask> tasks_;
  std::size_t done_ = 0;  // of the tasks
};

std::unique_ptr<ExpertWork> ResidentExperts::start(const ExpertLayer& layer, memory::Arena& arena,
                                                   ReadAhead& /*ahead*/) {
  return std::make_unique<Work>(*this, layer, arena);
}

std::size_t ResidentExperts::scratch_bytes(const MoeShape& shape, std::int64_t tokens) {
  const std::int64_t pairs = tokens * shape.top_k;
  return std::max(ops::mlp_scratch_bytes(shape.shared_intermediate_size, tokens),
                  ops::scratch_bytes(pairs) +
                      ops::scratch_bytes((pairs + tokens) * shape.moe_intermediate_size) +
                      ops::scratch_bytes(pairs * shape.hidden_size));
}

}  // namespace dsfp4::residency
