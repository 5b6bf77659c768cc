#include "engine/kv_cache.h"

#include "base/checked.h"
#include "dsfp4/error.h"

namespace dsfp4::engine {

KvCache::KvCache(std::int64_t tokens, std::int64_t layers, std::size_t layer_bytes,
                 ops::KvFormat format, memory::MemorySource& source)
    : block_bytes_(block_bytes(layers, layer_bytes)),
      format_(format),
      arena_(static_cast<std::size_t>(ceil_div(tokens, ops::kKvBlockTokens)) * block_bytes_,
             "the KV cache", source) {
  const auto blocks = static_cast<std::size_t>(ceil_div(tokens, ops::kKvBlockTokens));
  free_.reserve(blocks);
  for (std::size_t i = 0; i < blocks; ++i) free_.push_back(arena_.take(block_bytes_));
}

std::size_t KvCache::block_bytes(std::int64_t layers, std::size_t layer_bytes) {
  return memory::Arena::padded(static_cast<std::size_t>(layers) * layer_bytes);
}

DevicePtr<std::byte> KvCache::take() {
  if (free_.empty()) throw MemoryLimitError("the KV cache's blocks", block_bytes_, 0);
  const DevicePtr<std::byte> block = free_.back();
  free_.pop_back();
  return block;
}

Sequence::~Sequence() {
  for (const DevicePtr<std::byte> block : blocks_) cache_.give_back(block);
}

ops::SequenceRows Sequence::next_rows(std::int64_t first_row, std::int64_t rows) {
  const auto wanted = static_cast<std::size_t>(ceil_div(length_ + rows, ops::kKvBlockTokens));
  blocks_.reserve(wanted);
  while (blocks_.size() < wanted) blocks_.push_back(cache_.take());
  return {first_row, rows, length_, {blocks_, 0, cache_.format()}};
}

}  // namespace dsfp4::engine
