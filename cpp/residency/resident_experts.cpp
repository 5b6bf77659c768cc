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
      : ops_(runner.ops_), layer_(layer), scope_(arena) {
    const std::int64_t tokens = layer.x.rows;
    const std::int64_t pairs = tokens * layer.top_k;
    const std::span<const ops::ExpertView> experts = runner.experts_of_(layer.layer);
    const ops::ExpertView* shared = layer.shared;
    const bool routed = !runner.needs_host(layer.phase);
    const bool in_a_slot =
        routed && shared != nullptr && ops_.takes_shared(experts, *shared, tokens, layer.top_k);
    if (!in_a_slot) shared_into(layer, ops_, arena);
    const std::int64_t held = pairs_held(tokens, layer.top_k, layer.phase);
    hidden_ =
        ops::scratch_matrix(arena, in_a_slot ? held + tokens : held, runner.moe_intermediate_size_);
    routed_ = ops::scratch_matrix(arena, held, runner.hidden_size_);
    if (routed) {
      ops_.routed_experts(experts, layer.routing, layer.top_k, layer.x, hidden_, routed_, layer.y,
                          in_a_slot ? shared : nullptr);
      over_ = true;
      return;
    }
    order_.resize(static_cast<std::size_t>(pairs));
    for (const ChosenExpert& chosen : group_by_expert(layer.on_host.used, order_)) {
      tasks_.push_back({&experts[static_cast<std::size_t>(chosen.expert)], chosen.pairs});
    }
  }

  bool advance() override {
    if (over_) return false;
    const bool adds = layer_.phase == ops::Phase::kPrefill;
    const auto left = std::span(tasks_).subspan(done_);
    const auto group = left.first(std::min(kGroup, left.size()));
    if (adds) {
      ops_.add_experts(group, layer_.routing.weights, layer_.top_k, layer_.x, hidden_, routed_,
                       layer_.y, layer_.phase);
    } else {
      ops_.experts(group, layer_.top_k, layer_.x, hidden_, routed_, layer_.phase);
    }
    done_ += group.size();
    if (done_ < tasks_.size()) return true;
    if (!adds) ops_.combine(routed_, layer_.routing.weights, layer_.top_k, layer_.y);
    over_ = true;
    return false;
  }

 private:
  ops::Ops& ops_;
  const ExpertLayer layer_;
  const ops::ScratchScope scope_;
  ops::Matrix hidden_, routed_;
  bool over_ = false;
  std::vector<std::int32_t> order_;  // pairs, by expert
  std::vector<ops::ExpertTask> tasks_;
  std::size_t done_ = 0;  // of the tasks
};

std::unique_ptr<ExpertWork> ResidentExperts::start(const ExpertLayer& layer, memory::Arena& arena,
                                                   ReadAhead& /*ahead*/) {
  return std::make_unique<Work>(*this, layer, arena);
}

std::size_t ResidentExperts::scratch_bytes(const MoeShape& shape, std::int64_t tokens,
                                           ops::Phase phase) {
  const std::size_t pairs = pair_scratch_bytes(shape, tokens, phase);
  if (phase == ops::Phase::kPrefill) return pairs;
  // The shared expert may be one more of every token.
  return std::max(ops::mlp_scratch_bytes(shape.shared_intermediate_size, tokens),
                  pairs + ops::scratch_bytes(tokens * shape.moe_intermediate_size));
}

}  // namespace dsfp4::residency
