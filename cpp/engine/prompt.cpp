#include "engine/prompt.h"

#include <algorithm>

#include "ops/views.h"

namespace dsfp4::engine {

std::int64_t piece_rows(std::int64_t tokens, std::int64_t most) {
  const std::int64_t pieces = (tokens + most - 1) / most;
  const std::int64_t rows = (tokens + pieces - 1) / pieces;
  const std::int64_t blocks = (rows + ops::kKvBlockTokens - 1) / ops::kKvBlockTokens;
  return std::min(blocks * ops::kKvBlockTokens, most);
}

KeepGoing prefill_going(const GenerateOptions& options, std::int64_t done, std::int64_t total) {
  return [&options, done, total] {
    if (options.keep_going && !options.keep_going()) return false;
    return !options.on_prefill || options.on_prefill(done, total);
  };
}

}  // namespace dsfp4::engine
