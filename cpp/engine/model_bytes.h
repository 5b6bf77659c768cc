// Bytes that a model takes, in the terms of the plan: from its headers, its shape and the ops'
// numbers, before anything is loaded.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "engine/loader.h"
#include "model/spec.h"
#include "ops/ops.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// Tokens of a prompt that pass the layers together, where all weights are in memory.
inline constexpr std::int64_t kPrefillChunk = 256;
/// And at most, where experts are read from the SSD, once for each chunk.
inline constexpr std::int64_t kLongestPrefillChunk = 32768;

/// A backend in numbers. They are known without its device, too.
struct Backend {
  bool host_visible = true;  // its memory is RAM
  /// As Ops::working_bytes().
  std::function<std::uint64_t(const ops::Ops::Largest&)> working_bytes;
};
/// Of ops, which must outlive it.
Backend backend_of(const ops::Ops& ops);
/// Of an NVIDIA GPU.
Backend cuda_backend();

/// How a model is run.
struct Running {
  const model::ModelSpec& spec;
  Backend backend;
  std::optional<Backend> host;  // the processor, beside a GPU that perhaps does not hold everything
  ops::KvFormat kv_format;
  std::int64_t max_context;  // tokens
};

/// The largest step with `rows` rows of a prompt; `sizes` must outlive it.
ops::Ops::Largest largest_step(const Running& running, const WeightSizes& sizes, std::int64_t rows);
/// The largest step in which the processor computes experts beside a GPU.
ops::Ops::Largest largest_host_step(const Running& running, const WeightSizes& sizes);
/// Arena bytes of a step with `rows` rows of a prompt, and of a decode step.
std::size_t scratch_bytes(const model::ModelSpec& spec, std::int64_t rows);
/// Of an arena for logits on their way to the host; 0 where they need none.
std::size_t logit_bytes(const model::ModelSpec& spec, bool host_visible);
/// Of RAM, in a step of so many rows of a model of which only a part is on a GPU.
std::size_t host_step_bytes(const Running& running, const WeightSizes& sizes, std::int64_t rows);

residency::ModelBytes model_bytes(const Running& running, const WeightSizes& sizes);

}  // namespace dsfp4::engine
