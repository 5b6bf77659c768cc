// Seconds of a call, and cached rows to attend to.
#pragma once

#include <chrono>
#include <cstddef>
#include <vector>

#include "base/checked.h"
#include "ops/views.h"

namespace dsfp4::ops::measure {

template <typename Body>
double seconds_of(const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The cache of one sequence, `copies` times (as so many layers would have it).
class CacheCopies {
 public:
  CacheCopies(std::int64_t tokens, std::int64_t width, KvFormat format, std::int64_t copies)
      : format_(format),
        layer_bytes_(static_cast<std::size_t>(kKvBlockTokens * width) * kv_value_bytes(format)),
        memory_(static_cast<std::size_t>(ceil_div(tokens, kKvBlockTokens) * copies) *
                layer_bytes_) {
    const std::size_t block_bytes = layer_bytes_ * static_cast<std::size_t>(copies);
    for (std::size_t at = 0; at < memory_.size(); at += block_bytes) {
      blocks_.emplace_back(memory_.data() + at);
    }
  }
  KvView view(std::int64_t copy) const {
    return {blocks_, static_cast<std::size_t>(copy) * layer_bytes_, format_, 1.0f};
  }

 private:
  KvFormat format_;
  std::size_t layer_bytes_;
  std::vector<std::byte> memory_;
  std::vector<DevicePtr<std::byte>> blocks_;
};

}  // namespace dsfp4::ops::measure
