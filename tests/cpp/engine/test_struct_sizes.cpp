// Structs that carry their size: what an older or a newer program has is read and filled, no more.
#include <array>
#include <cstddef>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "engine/struct_sizes.h"

namespace dsfp4 {
namespace {

// Places of fields on x86-64 with libstdc++. Programs that were compiled have these numbers in
// them: a line may be added, for a new field of a struct with struct_bytes; a line that changes is
// a break and raises DSFP4_ABI (api.h).
#define FIELD(Struct, field, at) \
  static_assert(offsetof(Struct, field) == (at), "a break of the binary interface")
#define SIZE(Struct, bytes) static_assert(sizeof(Struct) == (bytes), "see the comment above")
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
SIZE(MemoryConfig, 40);
FIELD(MemoryConfig, prefetch_layers, 0);
FIELD(MemoryConfig, expert_threshold, 16);
FIELD(MemoryConfig, cpu_share, 24);
SIZE(ComputeStreams, 3);
FIELD(ComputeStreams, prefetch, 0);
FIELD(ComputeStreams, compute, 1);
FIELD(ComputeStreams, transfer, 2);
SIZE(MemoryStrategy, 96);
FIELD(MemoryStrategy, cpu_cache_size, 0);
FIELD(MemoryStrategy, prefetch_size, 16);
FIELD(MemoryStrategy, max_experts, 32);
FIELD(MemoryStrategy, gpu_reserved, 48);
FIELD(MemoryStrategy, max_gpu_layers, 64);
FIELD(MemoryStrategy, min_layers, 80);
SIZE(Rates, 48);
FIELD(Rates, ssd, 0);
FIELD(Rates, host_experts, 8);
FIELD(Rates, copy_in, 16);
FIELD(Rates, copy_out, 24);
FIELD(Rates, both_host_experts, 32);
FIELD(Rates, both_copy_in, 40);
SIZE(TokenLogprob, 8);
FIELD(TokenLogprob, id, 0);
FIELD(TokenLogprob, logprob, 4);
SIZE(TokenLogprobs, 32);
FIELD(TokenLogprobs, chosen, 0);
FIELD(TokenLogprobs, top, 8);
FIELD(LoadOptions, struct_bytes, 0);
FIELD(LoadOptions, device, 8);
FIELD(LoadOptions, threads, 40);
FIELD(LoadOptions, max_context, 48);
FIELD(LoadOptions, kv_cache_dtype, 56);
FIELD(LoadOptions, memory_limit, 88);
FIELD(LoadOptions, memory, 96);
FIELD(LoadOptions, strategy, 136);
FIELD(LoadOptions, quantization, 232);
FIELD(LoadOptions, cache_policy, 288);
FIELD(LoadOptions, warm_start_folder, 320);
FIELD(LoadOptions, trace_file, 352);
FIELD(LoadOptions, reader, 384);
FIELD(LoadOptions, direct_reads, 416);
FIELD(LoadOptions, ssd_rate, 424);
FIELD(LoadOptions, ram_limit, 432);
FIELD(LoadOptions, progress, 440);
FIELD(LoadOptions, keep_going, 472);
FIELD(GenerateOptions, struct_bytes, 0);
FIELD(GenerateOptions, max_tokens, 8);
FIELD(GenerateOptions, temperature, 16);
FIELD(GenerateOptions, top_k, 24);
FIELD(GenerateOptions, top_p, 32);
FIELD(GenerateOptions, min_p, 40);
FIELD(GenerateOptions, repetition_penalty, 48);
FIELD(GenerateOptions, logit_bias, 56);
FIELD(GenerateOptions, logprobs, 80);
FIELD(GenerateOptions, seed, 88);
FIELD(GenerateOptions, stop_ids, 96);
FIELD(GenerateOptions, on_prefill, 128);
FIELD(GenerateOptions, keep_going, 160);
FIELD(ForwardOptions, struct_bytes, 0);
FIELD(ForwardOptions, forced_experts, 8);
FIELD(ForwardOptions, chosen_experts, 24);
FIELD(ForwardOptions, router_logits, 40);
FIELD(ForwardOptions, decode, 56);
FIELD(ForwardOptions, routed_experts, 57);
FIELD(ForwardOptions, keep_going, 64);
FIELD(ForwardOptions, on_logits, 96);
FIELD(ModelStats, struct_bytes, 0);
FIELD(ModelStats, reserved_bytes, 8);
FIELD(ModelStats, tiered, 16);
FIELD(ModelStats, slots, 24);
FIELD(ModelStats, cache_slots, 32);
FIELD(ModelStats, slot_bytes, 40);
FIELD(ModelStats, image_bytes, 48);
FIELD(ModelStats, hits, 56);
FIELD(ModelStats, misses, 64);
FIELD(ModelStats, joined, 72);
FIELD(ModelStats, prefetched, 80);
FIELD(ModelStats, evictions, 88);
FIELD(ModelStats, prefetched_bytes, 96);
FIELD(ModelStats, demand_bytes, 104);
FIELD(ModelStats, speculative_bytes, 112);
FIELD(ModelStats, wasted_bytes, 120);
FIELD(ModelStats, used_bytes, 128);
FIELD(ModelStats, skipped_pairs, 136);
FIELD(ModelStats, total_pairs, 144);
FIELD(ModelStats, predicted, 152);
FIELD(ModelStats, predicted_used, 160);
FIELD(ModelStats, predictable, 168);
FIELD(ModelStats, wait_seconds, 176);
FIELD(ModelStats, expert_seconds, 184);
FIELD(ModelStats, streamed_layers, 192);
FIELD(ModelStats, streamed_bytes, 200);
FIELD(ModelStats, stream_wait_seconds, 208);
FIELD(ModelStats, reads, 216);
FIELD(ModelStats, read_bytes, 224);
FIELD(ModelStats, read_retries, 232);
FIELD(ModelStats, read_stalls, 240);
FIELD(ModelStats, reads_in_flight, 248);
FIELD(ModelStats, ssd_busy_seconds, 256);
FIELD(ModelStats, device_slots, 264);
FIELD(ModelStats, device_cache_slots, 272);
FIELD(ModelStats, device_slot_bytes, 280);
FIELD(ModelStats, device_hits, 288);
FIELD(ModelStats, uploads, 296);
FIELD(ModelStats, uploaded_bytes, 304);
FIELD(ModelStats, device_evictions, 312);
FIELD(ModelStats, device_returns, 320);
FIELD(ModelStats, uploads_ahead, 328);
FIELD(ModelStats, uploads_ahead_used, 336);
FIELD(ModelStats, cpu_bytes, 344);
FIELD(ModelStats, cpu_seconds, 352);
FIELD(ModelStats, layer_upload_bytes, 360);
FIELD(ModelStats, layer_upload_wait_seconds, 368);
FIELD(ModelStats, rates, 376);
FIELD(GenerationResult, struct_bytes, 0);
FIELD(GenerationResult, tokens, 8);
FIELD(GenerationResult, logprobs, 32);
FIELD(GenerationResult, finish_reason, 56);
FIELD(GenerationResult, prompt_tokens, 64);
FIELD(GenerationResult, prefill_seconds, 72);
FIELD(GenerationResult, decode_seconds, 80);
#undef FIELD
#undef SIZE

constexpr unsigned char kPoison = 0xA5;

// An older program's struct: the first `bytes` bytes of a Struct, then bytes that nobody may touch.
template <typename Struct>
class Older {
 public:
  explicit Older(std::size_t bytes) : bytes_(bytes) {
    whole_ = new (memory_.data()) Struct;
    whole_->struct_bytes = bytes;
    std::memcpy(rest_.data(), memory_.data() + bytes, sizeof(Struct) - bytes);
    std::memset(memory_.data() + bytes, kPoison, sizeof(Struct) - bytes);
  }
  ~Older() {
    std::memcpy(memory_.data() + bytes_, rest_.data(), sizeof(Struct) - bytes_);
    whole_->~Struct();
  }
  Older(const Older&) = delete;
  Older& operator=(const Older&) = delete;

  Struct& operator*() { return *whole_; }
  Struct* operator->() { return whole_; }
  bool rest_is_untouched() const {
    for (std::size_t i = bytes_; i < sizeof(Struct); ++i) {
      if (memory_[i] != std::byte{kPoison}) return false;
    }
    return true;
  }

 private:
  std::size_t bytes_;
  alignas(Struct) std::array<std::byte, sizeof(Struct)> memory_;
  std::array<std::byte, sizeof(Struct)> rest_;
  Struct* whole_;
};

TEST(StructSizes, OptionsOfThisVersionAreTakenWhole) {
  LoadOptions load;
  load.device = "reference";
  load.ram_limit = 7;
  load.keep_going = [] { return false; };
  const LoadOptions all = complete(load);
  EXPECT_EQ(all.struct_bytes, sizeof(LoadOptions));
  EXPECT_EQ(all.device, "reference");
  EXPECT_EQ(all.ram_limit, 7u);
  ASSERT_TRUE(all.keep_going);
  EXPECT_FALSE(all.keep_going());
  GenerateOptions sampled;
  sampled.max_tokens = 3;
  sampled.top_p = 0.5;
  sampled.seed = 9;
  const GenerateOptions generate = complete(sampled);
  EXPECT_EQ(generate.max_tokens, 3);
  EXPECT_EQ(generate.top_p, 0.5);
  EXPECT_EQ(generate.seed, 9u);
  const std::array<std::int32_t, 2> experts = {4, 5};
  ForwardOptions forced;
  forced.forced_experts = experts;
  forced.routed_experts = false;
  const ForwardOptions forward = complete(forced);
  EXPECT_EQ(forward.forced_experts.data(), experts.data());
  EXPECT_FALSE(forward.routed_experts);
}

TEST(StructSizes, FieldsThatAnOlderProgramLacksHaveTheirDefaults) {
  Older<LoadOptions> load(offsetof(LoadOptions, ram_limit));
  load->device = "reference";
  load->reader = "pread";
  load->ssd_rate = 5;
  const LoadOptions all = complete(*load);
  EXPECT_EQ(all.struct_bytes, sizeof(LoadOptions));
  EXPECT_EQ(all.device, "reference");
  EXPECT_EQ(all.reader, "pread");
  EXPECT_EQ(all.ssd_rate, 5u);
  EXPECT_EQ(all.ram_limit, 0u);
  EXPECT_FALSE(all.progress);
  EXPECT_FALSE(all.keep_going);

  Older<GenerateOptions> generate(offsetof(GenerateOptions, stop_ids));
  generate->seed = 3;
  EXPECT_EQ(complete(*generate).seed, 3u);
  EXPECT_FALSE(complete(*generate).stop_ids);
  EXPECT_FALSE(complete(*generate).on_prefill);

  Older<ForwardOptions> forward(offsetof(ForwardOptions, keep_going));
  forward->decode = true;
  EXPECT_TRUE(complete(*forward).decode);
  EXPECT_FALSE(complete(*forward).on_logits);
}

TEST(StructSizes, ResultsOfAnOlderProgramAreFilledAsFarAsTheyGo) {
  ModelStats stats;
  stats.reserved_bytes = 1;
  stats.hits = 2;
  stats.cpu_seconds = 3.0;
  stats.rates.ssd = 4.0;
  for (const std::size_t bytes :
       {offsetof(ModelStats, hits), offsetof(ModelStats, rates), sizeof(ModelStats)}) {
    Older<ModelStats> older(bytes);
    hand_over(ModelStats(stats), *older);
    EXPECT_TRUE(older.rest_is_untouched()) << bytes;
    EXPECT_EQ(older->struct_bytes, bytes);
    EXPECT_EQ(older->reserved_bytes, 1u);
    if (bytes > offsetof(ModelStats, cpu_seconds)) {
      EXPECT_EQ(older->cpu_seconds, 3.0);
    }
  }
  GenerationResult result;
  result.tokens = {1, 2, 3};
  result.prompt_tokens = 5;
  result.decode_seconds = 6.0;
  Older<GenerationResult> older(offsetof(GenerationResult, decode_seconds));
  hand_over(std::move(result), *older);
  EXPECT_TRUE(older.rest_is_untouched());
  EXPECT_EQ(older->tokens, (std::vector<std::int32_t>{1, 2, 3}));
  EXPECT_EQ(older->prompt_tokens, 5);
}

// Fields of a newer header are the program's own: they keep its defaults.
TEST(StructSizes, ResultsOfANewerProgramAreFilledAsFarAsTheyAreKnown) {
  ModelStats stats;
  stats.struct_bytes = sizeof(ModelStats) + 8;
  ModelStats known;
  known.hits = 2;
  hand_over(std::move(known), stats);
  EXPECT_EQ(stats.hits, 2u);
  EXPECT_EQ(stats.struct_bytes, sizeof(ModelStats) + 8);
}

template <typename Options>
void expect_refused(std::size_t bytes, const std::string& name, const std::string& words) {
  Options options;
  options.struct_bytes = bytes;
  try {
    complete(options);
    ADD_FAILURE() << name << " of " << bytes << " bytes was taken";
  } catch (const ParameterError& error) {
    EXPECT_EQ(error.parameter(), name + ".struct_bytes");
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

TEST(StructSizes, OptionsOfANewerProgramAreRefused) {
  expect_refused<LoadOptions>(sizeof(LoadOptions) + 8, "LoadOptions", "a newer dsfp4");
  expect_refused<GenerateOptions>(sizeof(GenerateOptions) + 32, "GenerateOptions", "newer dsfp4");
  expect_refused<ForwardOptions>(sizeof(ForwardOptions) + 8, "ForwardOptions", "a newer dsfp4");
}

TEST(StructSizes, SizesThatNoVersionHadAreRefused) {
  expect_refused<LoadOptions>(offsetof(LoadOptions, ram_limit) + 4, "LoadOptions", "no version");
  expect_refused<LoadOptions>(0, "LoadOptions", "no version");
  expect_refused<GenerateOptions>(sizeof(GenerateOptions) - 1, "GenerateOptions", "no version");
  // A program from before struct_bytes has a string's pointer there.
  expect_refused<LoadOptions>(0x7f00'1234'5678, "LoadOptions", "newer dsfp4");
  ModelStats stats;
  stats.struct_bytes = 3;
  EXPECT_THROW(hand_over(ModelStats(), stats), ParameterError);
}

}  // namespace
}  // namespace dsfp4
