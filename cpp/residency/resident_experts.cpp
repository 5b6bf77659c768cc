#include "residency/resident_experts.h"

#include <algorithm>
#include <vector>

#include "ops/mlp.h"
#include "ops/scratch.h"
#include "residency/expert_tasks.h"

namespace dsfp4::residency {
namespace {

/// Experts that are computed together where somebody may want to leave.
constexpr std::size_t kPolledGroup = 32;

}  // namespace

void ResidentExperts::run(std::int64_t layer, ops::ConstMatrix x, const ops::Routing& routing,
                          std::int64_t top_k, memory::Arena& arena, ops::Matrix y,
                          const ops::ExpertView* shared, const Poll& poll) {
  const ops::ScratchScope scope(arena);
  const std::int64_t pairs = x.rows * top_k;
  const auto count = static_cast<std::size_t>(pairs);
  const std::span<const ops::ExpertView> experts = experts_of_(layer);
  const bool in_a_slot =
      shared != nullptr && backend_.takes_shared(experts, *shared, x.rows, top_k);
  if (!in_a_slot) shared_into(shared, backend_, arena, x, y);
  const std::int64_t rows = in_a_slot ? pairs + x.rows : pairs;
  const ops::Matrix hidden = ops::scratch_matrix(arena, rows, moe_intermediate_size_);
  const ops::Matrix routed = ops::scratch_matrix(arena, pairs, hidden_size_);
  if (backend_.routed_experts(experts, routing, top_k, x, hidden, routed, y,
                              in_a_slot ? shared : nullptr)) {
    return;
  }
  std::vector<ops::ExpertTask> tasks;
  for (const ChosenExpert& chosen :
       group_by_expert(routing.used, std::span(arena.take_array<std::int32_t>(count), count))) {
    tasks.push_back({&experts[static_cast<std::size_t>(chosen.expert)], chosen.pairs});
  }
  // A group's end costs a little, and a layer of a prompt can take seconds.
  for (std::span<const ops::ExpertTask> left = tasks; !left.empty();) {
    const std::size_t group = std::min(left.size(), poll ? kPolledGroup : left.size());
    backend_.experts(left.first(group), top_k, x, hidden, routed);
    left = left.subspan(group);
    ask(poll);
  }
  backend_.combine(routed, routing.weights, top_k, y);
}

std::size_t ResidentExperts::scratch_bytes(const MoeShape& shape, std::int64_t tokens) {
  const std::int64_t pairs = tokens * shape.top_k;
  return std::max(ops::mlp_scratch_bytes(shape.shared_intermediate_size, tokens),
                  ops::scratch_bytes(pairs) +
                      ops::scratch_bytes((pairs + tokens) * shape.moe_intermediate_size) +
                      ops::scratch_bytes(pairs * shape.hidden_size));
}

}  // namespace dsfp4::residency
