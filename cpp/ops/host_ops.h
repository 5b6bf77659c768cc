// Ops whose plain loops serve every backend that computes in host memory.
#pragma once

#include "base/thread_pool.h"
#include "format/scalar.h"
#include "ops/ops.h"
#include "ops/raw.h"

namespace dsfp4::ops {

/// Base of the backends in host memory: it owns their threads and does the ops that only move or
/// scale values, where there is nothing to gain from a second version.
class HostBackend : public Ops {
 public:
  explicit HostBackend(int threads) : pool_(threads) {}

  Device& device() const override { return host_device(); }

  void embed(const WeightView& table, std::span<const std::int32_t> ids, Matrix out) override;
  void zero(Matrix y) override;
  void add(ConstMatrix x, Matrix y) override;
  void rope(Matrix x, std::int64_t heads, std::int64_t head_stride, ConstMatrix cos_sin) override;
  void kv_append(std::span<const SequenceRows> batch, ConstMatrix x) override;
  void route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
             std::span<const std::int32_t> forced, Routing out) override;
  void combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
               Matrix y) override;

 protected:
  ThreadPool pool_;
};

/// Address of token `t` in a sequence's cache.
inline std::byte* kv_row(const KvView& kv, std::int64_t t, std::size_t row_bytes) {
  return unwrap(kv.blocks[static_cast<std::size_t>(t / kKvBlockTokens)]) + kv.layer_offset +
         static_cast<std::size_t>(t % kKvBlockTokens) * row_bytes;
}

}  // namespace dsfp4::ops
