// Times ops in host memory on random operands at any shape, one call at a time, on operands that
// rotate through more memory than the caches hold. Every method returns seconds, one value a run,
// in the order of the runs; one more call before them warms up. Sizes are the caller's to choose:
// they are not limited here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "ops/ops.h"

namespace dsfp4::ops::measure {

using Seconds = std::vector<double>;

/// One op of a layer: its name and what it reads and computes at least.
struct ProfiledOp {
  std::string name;
  double bytes = 0.0;  // of weights and cache
  double flops = 0.0;
  Seconds seconds;
};

/// A real layer's widths; the defaults are DeepSeek-R1's.
struct LayerShape {
  std::int64_t hidden = 7168;
  std::int64_t q_lora_rank = 1536;
  MlaShape mla{128, 512, 128, 64, 128, 0.1352f};
  std::int64_t moe_intermediate = 2048;
  std::int64_t experts = 256;
  std::int64_t top_k = 8;
  std::int64_t expert_slots = 64;  // experts that share memory: expert e lies in slot e % slots
  format::WeightFormat attention = format::WeightFormat::kBF16;
  format::WeightFormat expert = format::WeightFormat::kNvfp4;
};

class KernelBench {
 public:
  /// Owns `ops`, which computes on the host; reads with a pool of `threads` threads.
  KernelBench(std::unique_ptr<Ops> ops, int threads);

  std::string isa() const { return std::string(ops_->isa()); }

  /// All threads read `bytes` bytes of memory, in long runs; of several distances of prefetching,
  /// the seconds of the fastest, sorted.
  Seconds read_memory(std::size_t bytes, int runs);
  /// Operations a second of each register-only loop (cpu/peak.h): {name, {isa, rate}}.
  std::map<std::string, std::pair<std::string, double>> peaks();

  /// Here and in experts(), up to 16 tokens are a decode step, more a prefill step.
  Seconds linear(format::WeightFormat format, std::int64_t rows, std::int64_t cols,
                 std::int64_t tokens, std::int64_t copies, int runs);
  /// The routed part of a layer. `chosen`: [runs + 1, tokens * top_k] expert numbers; expert e lies
  /// in slot e % slots.
  Seconds experts(format::WeightFormat format, std::int64_t hidden, std::int64_t intermediate,
                  std::int64_t slots, std::int64_t tokens, std::int64_t top_k,
                  std::span<const std::int32_t> chosen, int runs);
  /// Absorbed attention of one token on a context of `context` tokens, by op.
  std::map<std::string, Seconds> decode_attention(const MlaShape& shape,
                                                  format::WeightFormat kv_b_proj, KvFormat cache,
                                                  std::int64_t context, std::int64_t copies,
                                                  int runs);
  /// `rows` tokens at `position`, `position` + 1, ...
  Seconds prefill_attention(const MlaShape& shape, format::WeightFormat kv_b_proj, KvFormat cache,
                            std::int64_t position, std::int64_t rows, std::int64_t copies,
                            int runs);
  /// All ops of one MoE layer, in order: `rows` tokens at `position`, as one sequence's prefill or
  /// (decode) as one token.
  std::vector<ProfiledOp> layer(const LayerShape& shape, std::int64_t position, std::int64_t rows,
                                bool decode, int runs);

 private:
  std::unique_ptr<Ops> ops_;
  ThreadPool pool_;
};

}  // namespace dsfp4::ops::measure
