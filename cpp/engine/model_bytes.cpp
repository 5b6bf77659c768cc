#include "engine/model_bytes.h"

#include <algorithm>

#include "dsfp4/model.h"
#include "engine/kv_cache.h"
#include "model/decoder.h"
#include "ops/host_routing.h"

namespace dsfp4::engine {

ops::Ops::Largest largest_step(const Running& running, const WeightSizes& sizes,
                               std::int64_t rows) {
  const model::ModelSpec& spec = running.spec;
  ops::Ops::Largest largest;
  largest.mla = spec.mla;
  largest.rows = rows;
  largest.context = running.max_context;
  largest.width = std::max({spec.hidden_size, spec.intermediate_size, spec.q_lora_rank,
                            spec.shared_intermediate_size, spec.moe_intermediate_size,
                            spec.mla.heads * spec.mla.v_head_dim, spec.mla.kv_lora_rank});
  largest.vocab = spec.vocab_size;
  largest.top_k = spec.router.top_k;
  largest.hidden_size = spec.hidden_size;
  largest.moe_layers = spec.moe_layers();
  if (spec.moe_layers() > 0) {
    largest.experts = sizes.layer_experts;
    largest.moe_intermediate_size = spec.moe_intermediate_size;
  }
  largest.widest = sizes.widest;
  return largest;
}

std::size_t scratch_bytes(const model::ModelSpec& spec, std::int64_t rows) {
  return std::max(model::scratch_bytes(spec, rows, model::Phase::kPrefill),
                  model::scratch_bytes(spec, 1, model::Phase::kDecode));
}

std::size_t logit_bytes(const model::ModelSpec& spec, ops::Device& device) {
  if (device.host_visible()) return 0;
  return static_cast<std::size_t>(kLogitRows * spec.vocab_size) * sizeof(float);
}

std::size_t host_expert_bytes(const model::ModelSpec& spec) {
  const std::int64_t values =
      spec.router.top_k * (2 * spec.hidden_size + spec.moe_intermediate_size);
  return static_cast<std::size_t>(kHostExpertRows * values) * sizeof(float);
}

residency::ModelBytes model_bytes(const Running& running, const WeightSizes& sizes) {
  const model::ModelSpec& spec = running.spec;
  ops::Device& device = running.ops.device();
  residency::ModelBytes bytes;
  bytes.dense = sizes.dense_bytes;
  bytes.embedding = sizes.embedding_bytes;
  bytes.host_embedding = sizes.embedding_host_bytes;
  bytes.layers = sizes.layer_bytes;
  bytes.layer_buffer = sizes.layer_slot_bytes;
  bytes.experts = sizes.experts;
  bytes.expert_bytes = sizes.expert_bytes;
  bytes.expert_slot = sizes.slot_bytes;
  bytes.device_slot = sizes.device_slot_bytes;
  bytes.experts_per_token = static_cast<std::uint64_t>(spec.router.top_k);
  bytes.kv_block =
      KvCache::block_bytes(spec.layers, model::kv_layer_bytes(spec, running.kv_format));
  bytes.reader = sizes.staging;
<<<<<<< de1913be9ccec83ecc57a301a10f297d670294cc
<<<<<<< a4b09579704617841537c50e07d5fc51ac3c9e05
=======
>>>>>>> dc63341
  if (!running.ops.device().host_visible()) bytes.load_buffer = sizes.load_buffer;
  for (std::int64_t rows = kPrefillChunk; rows <= kLongestPrefillChunk; rows *= 2) {
    const std::int64_t chunk = std::min(rows, running.max_context);
    if (!bytes.steps.empty() && chunk == bytes.steps.back().rows) break;
    bytes.steps.push_back(
        {chunk, scratch_bytes(spec, chunk) + logit_bytes(spec, running.ops.device()) +
                    running.ops.working_bytes(largest_step(running, sizes, chunk))});
<<<<<<< de1913be9ccec83ecc57a301a10f297d670294cc
=======
  if (!device.host_visible()) bytes.load_buffer = sizes.load_buffer;
  for (std::int64_t rows = kPrefillChunk; rows <= kLongestPrefillChunk; rows *= 2) {
    const std::int64_t chunk = std::min(rows, running.max_context);
    if (!bytes.steps.empty() && chunk == bytes.steps.back().rows) break;
    residency::ModelBytes::Step& step = bytes.steps.emplace_back();
    step.rows = chunk;
    step.bytes = scratch_bytes(spec, chunk) + logit_bytes(spec, device) +
                 running.ops.working_bytes(largest_step(running, sizes, chunk));
    if (device.host_visible()) continue;
    step.host_bytes =
        ops::RoutingReader::staging_bytes(device, chunk, spec.router) + host_expert_bytes(spec);
>>>>>>> ca5a0f8
=======
>>>>>>> dc63341
  }
  return bytes;
}

}  // namespace dsfp4::engine
