#include "residency/tiered_experts.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ops/mlp.h"
#include "ops/scratch.h"

namespace dsfp4::residency {

TieredExperts::TieredExperts(ops::Ops& ops, ExpertStore& store, ops::RouterSpec router,
                             std::vector<RouterView> routers, std::int64_t first_layer,
                             std::int64_t hidden_size, std::int64_t moe_intermediate_size,
                             std::int64_t most_rows, DeviceTier* device, Trace* trace)
    : ops_(ops),
      store_(store),
      router_(router),
      routers_(std::move(routers)),
      first_layer_(first_layer),
      hidden_size_(hidden_size),
      moe_intermediate_size_(moe_intermediate_size),
      device_(device),
      trace_(trace),
      prefetcher_(
          ops, store, router_, routers_, most_rows,
          device == nullptr ? Prefetcher::Elsewhere()
                            : [device](ExpertKey key) { return device->experts().has(key); }) {}

void TieredExperts::configure(const TieredOptions& options) {
  options_ = options;
  if (device_ != nullptr) device_->set_host_share(options.host_share);
}

void TieredExperts::begin_step(ops::Phase phase, std::int64_t rows, ReadAhead& ahead) {
  if (device_ != nullptr) device_->begin_step();
  if (layers_ahead(phase) == 0) return;
  prefetcher_.expect(rows, ahead);
}

std::int64_t TieredExperts::layers_ahead(ops::Phase phase) const {
  if (!overlaps_reads_) return 0;
  const bool pays = phase == ops::Phase::kPrefill || store_.cache_room() > 0;
  return options_.prefetch_layers.value_or(pays ? 1 : 0);
}

void TieredExperts::note_use(std::int64_t moe_layer, const ExpertLayer& layer, std::int64_t first,
                             std::int64_t end) {
  const std::span<const float> bias = routers_[static_cast<std::size_t>(moe_layer)].bias_on_host;
  const auto width = static_cast<std::size_t>(router_.experts);
  const auto slots = static_cast<std::size_t>(layer.top_k);
  std::vector<float> scores(width);
  for (auto t = static_cast<std::size_t>(first); t < static_cast<std::size_t>(end); ++t) {
    selection_scores(router_.scoring, layer.on_host.logits.subspan(t * width, width), bias, scores);
    store_.note_use(moe_layer, layer.on_host.used.subspan(t * slots, slots), scores);
  }
}

std::size_t TieredExperts::scratch_bytes(const MoeShape& shape, std::int64_t tokens,
                                         ops::Phase phase) {
  const std::int64_t shared = phase == ops::Phase::kDecode ? shape.shared_intermediate_size : 0;
  return std::max({Prefetcher::scratch_bytes(shape, tokens), ops::mlp_scratch_bytes(shared, tokens),
                   pair_scratch_bytes(shape, tokens, phase)});
}

}  // namespace dsfp4::residency
