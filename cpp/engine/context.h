// How many tokens of context a model has where the user does not say.
#pragma once

#include <cstdint>
#include <functional>

namespace dsfp4::engine {

/// A context that the user did not choose is not made shorter than this.
inline constexpr std::int64_t kLeastContext = 4096;

/// Checks max_context: 0 is all of the model's. Throws ParameterError.
std::int64_t context_limit(std::int64_t wanted, std::int64_t model_limit);
/// The largest power of two below `context`.
std::int64_t next_shorter(std::int64_t context);
/// The longest context, all of the model's or a power of two, whose KV blocks of `block_bytes` take
/// at most an eighth of the memory, but at least kLeastContext where the model has it.
std::int64_t affordable_context(std::int64_t model_limit, std::uint64_t block_bytes,
                                std::uint64_t memory);

/// A context that the user did not choose, and `plan` with it: the longest of at most `most` tokens
/// that `memory` can be asked to spare for its KV blocks, shortened as long as `plan` throws
/// MemoryLimitError; its last one is passed on. Returns the tokens.
std::int64_t plan_with_context(std::int64_t most, std::uint64_t block_bytes, std::uint64_t memory,
                               const std::function<void(std::int64_t context)>& plan);

}  // namespace dsfp4::engine
