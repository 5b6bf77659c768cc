#include "engine/model_bytes.h"

#include <algorithm>

#include "dsfp4/model.h"
#include "engine/kv_cache.h"
#include "model/decoder.h"
#include "ops/cuda_memory.h"
#include "ops/host_routing.h"
#include "residency/device_tier.h"
#include "residency/prefetcher.h"

namespace dsfp4::engine {

Backend backend_of(const ops::Ops& ops) {
  return {.host_visible = ops.device().host_visible(),
          .working_bytes = [&ops](const ops::Ops::Largest& largest) {
            return ops.working_bytes(largest);
          }};
}

Backend cuda_backend() { return {.host_visible = false, .working_bytes = ops::cuda_working_bytes}; }

ops::Ops::Largest largest_step(const Running& running, const WeightSizes& sizes,
                               std::int64_t rows) {
  const model::ModelSpec& spec = running.spec;
  ops::Ops::Largest largest;
  largest.mla = spec.mla;
  largest.rows = rows;
  largest.dense_rows = std::min(rows, model::kDenseRows);
  largest.context = running.max_context;
  largest.width = std::max({spec.hidden_size, spec.intermediate_size, spec.q_lora_rank,
                            spec.shared_intermediate_size, spec.moe_intermediate_size,
                            spec.mla.heads * spec.mla.v_head_dim, spec.mla.kv_lora_rank});
  largest.step_width = std::max(spec.hidden_size, spec.moe_intermediate_size);
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

std::size_t logit_bytes(const model::ModelSpec& spec, bool host_visible) {
  if (host_visible) return 0;
  return static_cast<std::size_t>(kLogitRows * spec.vocab_size) * sizeof(float);
}

ops::Ops::Largest largest_host_step(const Running& running, const WeightSizes& sizes) {
  ops::Ops::Largest largest = largest_step(running, sizes, ops::kMostHostRows);
  largest.context = 1;  // attention is the GPU's
  return largest;
}

std::size_t host_step_bytes(const Running& running, const WeightSizes& sizes, std::int64_t rows) {
  const model::ModelSpec& spec = running.spec;
  const std::uint64_t working =
      running.host ? running.host->working_bytes(largest_host_step(running, sizes)) : 0;
  return working +
         ops::RoutingReader::staging_bytes(running.backend.host_visible, rows, spec.router,
                                           spec.hidden_size) +
         model::HostEmbedding::bytes(spec.hidden_size) +
         residency::Prefetcher::staging_bytes(rows, spec.router.top_k) +
         residency::DeviceTier::staging_bytes(
             {spec.router.top_k, spec.hidden_size, spec.moe_intermediate_size});
}

residency::ModelBytes model_bytes(const Running& running, const WeightSizes& sizes) {
  const model::ModelSpec& spec = running.spec;
  const bool in_host = running.backend.host_visible;
  residency::ModelBytes bytes;
  bytes.dense = sizes.dense_bytes;
  bytes.embedding = sizes.embedding_bytes;
  bytes.host_embedding = sizes.embedding_host_bytes;
  bytes.layers = sizes.layer_bytes;
  bytes.formats = sizes.formats;
  bytes.converted = sizes.converted;
  bytes.layer_buffer = sizes.layer_slot_bytes;
  bytes.experts = sizes.experts;
  bytes.expert_bytes = sizes.expert_bytes;
  bytes.expert_slot = sizes.slot_bytes;
  bytes.device_slot = sizes.device_slot_bytes;
  bytes.experts_per_token = static_cast<std::uint64_t>(spec.router.top_k);
  bytes.moe_layers = static_cast<std::uint64_t>(spec.moe_layers());
  bytes.kv_block =
      KvCache::block_bytes(spec.layers, model::kv_layer_bytes(spec, running.kv_format));
  bytes.reader = sizes.staging;
  if (!in_host || sizes.conversion > 0) {
    bytes.load_buffer = sizes.load_buffer + sizes.conversion;
  }
  for (std::int64_t rows = kPrefillChunk; rows <= kLongestPrefillChunk; rows *= 2) {
    const std::int64_t chunk = std::min(rows, running.max_context);
    if (!bytes.steps.empty() && chunk == bytes.steps.back().rows) break;
    residency::ModelBytes::Step& step = bytes.steps.emplace_back();
    step.rows = chunk;
    step.bytes = scratch_bytes(spec, chunk) + logit_bytes(spec, in_host) +
                 running.backend.working_bytes(largest_step(running, sizes, chunk));
    if (in_host) {
      step.bytes += residency::Prefetcher::staging_bytes(chunk, spec.router.top_k);
    } else {
      step.host_bytes = host_step_bytes(running, sizes, chunk);
    }
  }
  return bytes;
}

}  // namespace dsfp4::engine
