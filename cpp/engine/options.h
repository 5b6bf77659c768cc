// Options of a load: checked, and in the terms of the plan.
#pragma once

#include <cstdint>
#include <string>

#include "dsfp4/model.h"
#include "ops/views.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// LoadOptions::threads, where 0 is all cores. Throws ParameterError outside 0 to 1024.
int thread_count(int threads);
/// Of kv_cache_dtype "bf16" (then the backend's `exact`) or "fp8"; throws ParameterError for
/// others.
ops::KvFormat kv_format(const std::string& dtype, ops::KvFormat exact);

/// Throw ParameterError for an option out of range.
void check_memory_config(const MemoryConfig& config);
void check_memory_strategy(const MemoryStrategy& strategy);
/// And for an option of memory that `device` does not have.
void check_memory_strategy(const MemoryStrategy& strategy, const std::string& device,
                           bool has_vram);

residency::Wishes wishes_of(const MemoryStrategy& strategy);
/// Of all options, which are checked.
residency::Wishes wishes_of(const LoadOptions& options, std::int64_t max_context, bool has_vram);

/// Of `available` bytes of VRAM, those that a plan may share out: blocks take whole pages.
std::uint64_t shared_out(std::uint64_t available) noexcept;

}  // namespace dsfp4::engine
