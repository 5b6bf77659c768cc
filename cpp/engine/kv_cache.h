// The KV cache: blocks of kKvBlockTokens tokens over all layers, handed to sequences and back.
#pragma once

#include <cstdint>
#include <vector>

#include "memory/arena.h"
#include "ops/views.h"

namespace dsfp4::engine {

class KvCache {
 public:
  /// Room for `tokens` tokens in all; a block is `layers` x `layer_bytes` bytes.
  KvCache(std::int64_t tokens, std::int64_t layers, std::size_t layer_bytes, ops::KvFormat format,
          memory::MemorySource& source = memory::host_memory());

  /// Bytes of a block, for ops::kKvBlockTokens tokens.
  static std::size_t block_bytes(std::int64_t layers, std::size_t layer_bytes);

  ops::KvFormat format() const noexcept { return format_; }
  std::size_t free_blocks() const noexcept { return free_.size(); }

  /// Throws MemoryLimitError if no block is left.
  DevicePtr<std::byte> take();
  void give_back(DevicePtr<std::byte> block) { free_.push_back(block); }

 private:
  std::size_t block_bytes_;
  ops::KvFormat format_;
  memory::Arena arena_;
  std::vector<DevicePtr<std::byte>> free_;
};

/// One sequence: how many tokens it has, and the blocks that hold their latents.
class Sequence {
 public:
  explicit Sequence(KvCache& cache) : cache_(cache) {}
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  std::int64_t length() const noexcept { return length_; }

  /// The next `rows` tokens as rows [first_row, ...) of a batch, with blocks to hold them.
  /// They count once advance() is called; views stay valid until the next call of this.
  ops::SequenceRows next_rows(std::int64_t first_row, std::int64_t rows);
  void advance(std::int64_t rows) noexcept { length_ += rows; }

 private:
  KvCache& cache_;
  std::vector<DevicePtr<std::byte>> blocks_;
  std::int64_t length_ = 0;
};

}  // namespace dsfp4::engine
