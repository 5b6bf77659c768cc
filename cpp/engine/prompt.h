// How a prompt passes: in equal pieces, and asked about on the way.
#pragma once

#include <cstdint>

#include "dsfp4/model.h"

namespace dsfp4::engine {

/// Rows of each piece but the last of a prompt of `tokens` >= 1 tokens where `most` >= 1 may pass
/// together: as few pieces as that allows, of the same length but for whole blocks of the KV cache,
/// as every piece reads the weights again.
std::int64_t piece_rows(std::int64_t tokens, std::int64_t most);
/// Asks keep_going, then on_prefill with `done` tokens of `total`. `options` must outlive it.
KeepGoing prefill_going(const GenerateOptions& options, std::int64_t done, std::int64_t total);

}  // namespace dsfp4::engine
