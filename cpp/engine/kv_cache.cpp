#include "engine/kv_cache.h"

#include <limits>

#include "base/checked.h"
#include "dsfp4/error.h"

namespace dsfp4::engine {

KvCache::KvCache(std::int64_t tokens, std::int64_t layers, std::size_t layer_bytes,
                 ops::KvFormat format)
    : block_bytes_(memory::Arena::padded(static_cast<std::size_t>(layers) * layer_bytes)),
      format_(format),
      arena_(static_cast<std::size_t>(ceil_div(tokens, ops::kKvBlockTokens)) * block_bytes_,
             "the KV cache") {
  const auto blocks = static_cast<std::size_t>(ceil_div(tokens, ops::kKvBlockTokens));
  free_.reserve(blocks);
  for (std::size_t i = 0; i < blocks; ++i) free_.push_back(arena_.take(block_bytes_));
}

std::uint64_t KvCache::total_bytes(std::int64_t tokens, std::int64_t layers,
                                   std::size_t layer_bytes) {
  const std::size_t block = memory::Arena::padded(static_cast<std::size_t>(layers) * layer_bytes);
  const auto blocks = static_cast<std::size_t>(ceil_div(tokens, ops::kKvBlockTokens));
  return checked_mul(blocks, block).value_or(std::numeric_limits<std::size_t>::max());
}

std::byte* KvCache::take() {
  if (free_.empty()) throw MemoryLimitError("the KV cache's blocks", block_bytes_, 0);
  std::byte* block = free_.back();
  free_.pop_back();
  return block;
}

Sequence::~Sequence() {
  for (std::byte* block : blocks_) cache_.give_back(block);
}

ops::SequenceRows Sequence::next_rows(std::int64_t first_row, std::int64_t rows) {
  const auto wanted = static_cast<std::size_t>(ceil_div(length_ + rows, ops::kKvBlockTokens));
  blocks_.reserve(wanted);
  while (blocks_.size() < wanted) blocks_.push_back(cache_.take());
  return {first_row, rows, length_, {blocks_, 0, cache_.format()}};
}

}  // namespace dsfp4::engine
