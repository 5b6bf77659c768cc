// Bytes that a model takes, in the terms of the plan: from its headers, its shape and the ops'
// numbers, before anything is loaded.
#pragma once

#include <cstdint>

#include "engine/loader.h"
#include "model/spec.h"
#include "ops/ops.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// Tokens of a prompt that pass the layers together, where all weights are in memory.
inline constexpr std::int64_t kPrefillChunk = 256;
/// And at most, where experts are read from the SSD, once for each chunk.
inline constexpr std::int64_t kLongestPrefillChunk = 4096;

/// Rows of a step whose experts the host computes, of a model on a GPU that is tiered.
inline constexpr std::int64_t kHostExpertRows = 16;

/// How a model is run.
struct Running {
  const model::ModelSpec& spec;
  ops::Ops& ops;
  ops::KvFormat kv_format;
  std::int64_t max_context;  // tokens
};

/// The largest step with `rows` rows of a prompt; `sizes` must outlive it.
ops::Ops::Largest largest_step(const Running& running, const WeightSizes& sizes, std::int64_t rows);
/// Arena bytes of a step with `rows` rows of a prompt, and of a decode step.
std::size_t scratch_bytes(const model::ModelSpec& spec, std::int64_t rows);
/// Of an arena for logits on their way to the host; 0 where they need none.
std::size_t logit_bytes(const model::ModelSpec& spec, ops::Device& device);
<<<<<<< de1913be9ccec83ecc57a301a10f297d670294cc
<<<<<<< a4b09579704617841537c50e07d5fc51ac3c9e05
=======
/// Of RAM for kHostExpertRows: their inputs, and what experts make of them.
std::size_t host_expert_bytes(const model::ModelSpec& spec);
>>>>>>> ca5a0f8
=======
>>>>>>> dc63341

residency::ModelBytes model_bytes(const Running& running, const WeightSizes& sizes);

}  // namespace dsfp4::engine
