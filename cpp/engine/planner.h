// Plans for a machine that is described in numbers, from a checkpoint's headers or from the name of
// a published model: what a load would do, before there is a GPU or a byte of weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/published.h"
#include "dsfp4/model.h"
#include "engine/model_bytes.h"
#include "engine/placement.h"
#include "model/spec.h"
#include "ops/ops.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// Bytes of a machine on which nothing else runs.
struct DescribedMachine {
  std::uint64_t ram = 0;  // in all
  /// Of a GPU, the CUDA context included; none: there is no GPU.
  std::optional<std::uint64_t> vram;
};

enum class Tier : std::uint8_t { kVram, kRam, kSsd };
std::string_view tier_name(Tier tier);  // "vram", "ram", "ssd"

/// Bytes of one kind in one tier. A role may lie in several.
struct PlacedRole {
  std::string_view role;
  Tier tier = Tier::kRam;
  std::uint64_t bytes = 0;
  std::string_view format = {};  // of most of its matrices; empty where it has none
};

struct DescribedPlan {
  residency::Plan plan;
  std::int64_t max_context = 0;
  /// The bytes in "vram" add up to plan.vram_bytes and the CUDA context, in "ram" to ram_bytes.
  std::vector<PlacedRole> roles;
  std::vector<std::uint64_t> layer_bytes;  // dense weights of each layer, in the plan's formats
  std::uint64_t head_bytes = 0;            // of lm_head; of a tied embedding, too
  std::uint64_t kv_bytes_per_token = 0;    // of all layers
  std::string conversion;                  // the formats of what is converted; empty: nothing is
};

class Planner {
 public:
  /// Of `options` device, threads, kv_cache_dtype and quantization count here. Throws what a
  /// load throws for a folder's headers and for options; ParameterError for a device that is
  /// neither "cpu" nor "cuda".
  Planner(const std::filesystem::path& folder, const LoadOptions& options);
  /// Of a model of checkpoint::published_names().
  Planner(checkpoint::PublishedModel model, const LoadOptions& options);

  Planner(const Planner&) = delete;
  Planner& operator=(const Planner&) = delete;

  const checkpoint::ModelConfig& config() const noexcept { return config_; }
  /// Bytes of all matrices that decoding needs, as stored.
  std::uint64_t weight_bytes() const noexcept { return placement_->weight_bytes(); }
  std::uint64_t unneeded_bytes() const noexcept { return unneeded_bytes_; }
  /// Bytes of one routed expert as it is read; 0 if there are none.
  std::uint64_t expert_bytes() const noexcept { return placement_->expert_read_bytes(); }
  std::uint64_t experts() const noexcept { return sizes_.experts; }

  /// Of `options` the rest counts, but for memory_limit. Throws MemoryLimitError and ParameterError
  /// as a load would. At any time, from any thread.
  DescribedPlan plan(const DescribedMachine& machine, const LoadOptions& options) const;

 private:
  Planner(checkpoint::ModelConfig config, checkpoint::Catalogue catalogue,
          std::uint64_t unneeded_bytes, const LoadOptions& options);
  std::vector<PlacedRole> roles_of(const residency::Plan& plan,
                                   const residency::ModelBytes& bytes) const;

  checkpoint::ModelConfig config_;
  checkpoint::Catalogue catalogue_;
  std::uint64_t unneeded_bytes_;
  bool on_gpu_;
  std::unique_ptr<ops::Ops> host_ops_;  // the processor's, for its numbers
  ops::KvFormat kv_format_;
  model::ModelSpec spec_;
  checkpoint::ModelLayout layout_;
  model::ModelWeights weights_;
  std::unique_ptr<Placement> placement_;
  WeightSizes sizes_;
};

}  // namespace dsfp4::engine
