#include "engine/context.h"

#include <algorithm>
#include <bit>
#include <string>

#include "dsfp4/error.h"
#include "ops/views.h"

namespace dsfp4::engine {

std::int64_t context_limit(std::int64_t wanted, std::int64_t model_limit) {
  if (wanted < 0 || wanted > model_limit) {
    throw ParameterError("max_context", "must be 1 to " + std::to_string(model_limit) +
                                            " tokens, or 0 for the most, not " +
                                            std::to_string(wanted));
  }
  return wanted == 0 ? model_limit : wanted;
}

std::int64_t next_shorter(std::int64_t context) {
  return static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(context - 1)));
}

std::int64_t affordable_context(std::int64_t model_limit, std::uint64_t block_bytes,
                                std::uint64_t memory) {
  const std::uint64_t blocks = memory / 8 / block_bytes;
  const auto most = static_cast<std::int64_t>(blocks) * ops::kKvBlockTokens;
  std::int64_t tokens = model_limit;
  while (tokens > std::max(kLeastContext, most)) tokens = next_shorter(tokens);
  return tokens;
}

std::int64_t plan_with_context(std::int64_t most, std::uint64_t block_bytes, std::uint64_t memory,
                               const std::function<void(std::int64_t context)>& plan) {
  std::int64_t context = affordable_context(most, block_bytes, memory);
  for (;;) {
    try {
      plan(context);
      return context;
    } catch (const MemoryLimitError&) {
      if (context <= kLeastContext) throw;
      context = std::max(kLeastContext, next_shorter(context));
    }
  }
}

}  // namespace dsfp4::engine
