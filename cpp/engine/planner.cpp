#include "engine/planner.h"

#include <algorithm>
#include <utility>

#include "base/checked.h"
#include "dsfp4/error.h"
#include "engine/context.h"
#include "engine/kv_cache.h"
#include "engine/options.h"
#include "engine/quantization.h"
#include "memory/limits.h"
#include "model/decoder.h"
#include "ops/cuda_memory.h"
#include "storage/reader.h"

namespace dsfp4::engine {
namespace {

bool is_gpu(const std::string& device) {
  if (device == "cuda") return true;
  if (device == "cpu") return false;
  throw ParameterError("device", "'" + device + "' is not one of cpu, cuda");
}

constexpr std::string_view kEmbedding = "embedding";
constexpr std::string_view kRoutedExperts = "routed experts";

// Adds up the bytes of roles.
class Roles {
 public:
  void add(std::string_view role, Tier tier, std::uint64_t bytes, std::string_view format = {}) {
    if (bytes == 0) return;
    for (PlacedRole& placed : placed_) {
      if (placed.role == role && placed.tier == tier) {
        placed.bytes += bytes;
        return;
      }
    }
    placed_.push_back({role, tier, bytes, format});
  }
  std::vector<PlacedRole> take() { return std::move(placed_); }

 private:
  std::vector<PlacedRole> placed_;
};

}  // namespace

std::string_view tier_name(Tier tier) {
  switch (tier) {
    case Tier::kVram:
      return "vram";
    case Tier::kRam:
      return "ram";
    case Tier::kSsd:
      return "ssd";
  }
  return "";
}

Planner::Planner(const std::filesystem::path& folder, const LoadOptions& options)
    : Planner(checkpoint::read_config(folder), checkpoint::Catalogue::open(folder), 0, options) {}

Planner::Planner(checkpoint::PublishedModel model, const LoadOptions& options)
    : Planner(std::move(model.config), std::move(model.catalogue), model.unneeded_bytes, options) {}

Planner::Planner(checkpoint::ModelConfig config, checkpoint::Catalogue catalogue,
                 std::uint64_t unneeded_bytes, const LoadOptions& options)
    : config_(std::move(config)),
      catalogue_(std::move(catalogue)),
      unneeded_bytes_(unneeded_bytes),
      on_gpu_(is_gpu(options.device)),
      host_ops_(ops::make_cpu_ops(thread_count(options.threads))),
      kv_format_(kv_format(options.kv_cache_dtype,
                           on_gpu_ ? ops::KvFormat::kBf16 : host_ops_->default_kv_format())),
      spec_(model::make_spec(config_)),
      layout_(checkpoint::resolve_layout(catalogue_, config_)),
      placement_(std::make_unique<Placement>(catalogue_, layout_, weights_)),
      sizes_(placement_->sizes(!on_gpu_, formats_to_choose(options, on_gpu_),
                               thread_count(options.threads))) {
  sizes_.staging = storage::staging_bytes({});
}

DescribedPlan Planner::plan(const DescribedMachine& machine, const LoadOptions& options) const {
  if (on_gpu_ != machine.vram.has_value()) {
    throw ParameterError("vram",
                         on_gpu_ ? "must be given for device cuda" : "is of no use to device cpu");
  }
  const std::int64_t most = context_limit(options.max_context, config_.max_position_embeddings);
  std::optional<std::uint64_t> vram;
  if (machine.vram) {
    vram = shared_out(*machine.vram - std::min(*machine.vram, ops::kCudaContextBytes));
  }
  const residency::Budgets budgets{
      options.ram_limit, {.total = machine.ram, .available = machine.ram, .process = 0}, vram};
  Running running{spec_, on_gpu_ ? cuda_backend() : backend_of(*host_ops_), {}, kv_format_, most};
  if (on_gpu_ && spec_.moe_layers() > 0) running.host = backend_of(*host_ops_);

  DescribedPlan result;
  residency::ModelBytes bytes;
  const auto make = [&](std::int64_t context) {
    running.max_context = result.max_context = context;
    bytes = model_bytes(running, sizes_);
    result.plan =
        residency::make_plan(bytes, budgets, wishes_of(options, context, vram.has_value()));
  };
  const std::size_t block =
      KvCache::block_bytes(spec_.layers, model::kv_layer_bytes(spec_, kv_format_));
  if (options.max_context != 0) {
    make(most);
  } else {
    plan_with_context(
        most, block,
        vram.value_or(options.ram_limit > 0 ? options.ram_limit
                                            : memory::default_ram_limit(budgets.machine)),
        make);
  }
  const auto dense = placement_->dense_in(result.plan.formats, !on_gpu_);
  result.layer_bytes = dense.layers;
  for (const Placement::DenseShare& share : placement_->dense_shares(result.plan.formats)) {
    const bool head = share.role == residency::dense_role_name(residency::DenseRole::kLmHead);
    if (head || (config_.tie_word_embeddings && share.role == kEmbedding)) {
      result.head_bytes += share.bytes;
    }
  }
  result.kv_bytes_per_token = ceil_div<std::uint64_t>(block, ops::kKvBlockTokens);
  result.conversion = residency::describe(result.plan.formats);
  result.roles = roles_of(result.plan, bytes);
  return result;
}

std::vector<PlacedRole> Planner::roles_of(const residency::Plan& plan,
                                          const residency::ModelBytes& bytes) const {
  const Tier memory = on_gpu_ ? Tier::kVram : Tier::kRam;
  const Tier elsewhere = on_gpu_ ? Tier::kRam : Tier::kSsd;  // of streamed layers
  Roles roles;
  std::uint64_t matrices = 0;  // in the model's memory
  for (const Placement::DenseShare& share : placement_->dense_shares(plan.formats)) {
    if (share.role == kEmbedding && plan.embedding_in_ram) continue;
    const bool streamed = share.layer >= 0 && !plan.streamed.empty() &&
                          plan.streamed[static_cast<std::size_t>(share.layer)];
    roles.add(share.role, streamed ? elsewhere : memory, share.bytes,
              format::weight_format_name(share.format));
    if (!streamed) matrices += share.bytes;
  }
  const std::uint64_t buffers =
      plan.layer_buffers * (on_gpu_ ? plan.layer_buffer_bytes : bytes.layer_buffer);
  roles.add("buffers for layers", memory, buffers);
  roles.add("norms and alignment", memory, plan.dense_bytes - matrices - buffers);
  roles.add(kEmbedding, Tier::kRam, plan.embedding_bytes);

  if (plan.tiered) {
    roles.add(kRoutedExperts, Tier::kVram, plan.device_expert_bytes);
    roles.add(kRoutedExperts, Tier::kRam, plan.expert_bytes);
    roles.add(kRoutedExperts, Tier::kSsd, sizes_.experts * expert_bytes());
  } else {
    roles.add(kRoutedExperts, memory, plan.expert_bytes);
  }
  roles.add("KV cache", memory, plan.kv_bytes);
  roles.add("activations", memory, plan.step_bytes);
  roles.add("activations", Tier::kRam, plan.host_step_bytes);
  if (plan.ram_bytes > 0) roles.add("reads under way", Tier::kRam, bytes.reader);
  if (on_gpu_) roles.add("CUDA context", Tier::kVram, ops::kCudaContextBytes);
  return roles.take();
}

}  // namespace dsfp4::engine
