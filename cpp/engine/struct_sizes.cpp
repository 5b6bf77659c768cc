#include "engine/struct_sizes.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

// All fields of a struct, in their order, as references. A binding of too few or too many names
// does not compile, so that no field is forgotten.
template <typename Struct>
  requires std::is_same_v<std::remove_const_t<Struct>, LoadOptions>
auto fields(Struct& of) {
  auto& [struct_bytes, device, threads, max_context, kv_cache_dtype, memory_limit, memory, strategy,
         quantization, cache_policy, warm_start_folder, trace_file, reader, direct_reads, ssd_rate,
         ram_limit, progress, keep_going] = of;
  return std::tie(struct_bytes, device, threads, max_context, kv_cache_dtype, memory_limit, memory,
                  strategy, quantization, cache_policy, warm_start_folder, trace_file, reader,
                  direct_reads, ssd_rate, ram_limit, progress, keep_going);
}

template <typename Struct>
  requires std::is_same_v<std::remove_const_t<Struct>, GenerateOptions>
auto fields(Struct& of) {
  auto& [struct_bytes, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, logit_bias,
         logprobs, seed, stop_ids, on_prefill, keep_going] = of;
  return std::tie(struct_bytes, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
                  logit_bias, logprobs, seed, stop_ids, on_prefill, keep_going);
}

template <typename Struct>
  requires std::is_same_v<std::remove_const_t<Struct>, ForwardOptions>
auto fields(Struct& of) {
  auto& [struct_bytes, forced_experts, chosen_experts, router_logits, decode, routed_experts,
         keep_going, on_logits] = of;
  return std::tie(struct_bytes, forced_experts, chosen_experts, router_logits, decode,
                  routed_experts, keep_going, on_logits);
}

template <typename Struct>
  requires std::is_same_v<std::remove_const_t<Struct>, ModelStats>
auto fields(Struct& of) {
  auto& [struct_bytes, reserved_bytes, tiered, slots, cache_slots, slot_bytes, image_bytes, hits,
         misses, joined, prefetched, evictions, prefetched_bytes, demand_bytes, speculative_bytes,
         wasted_bytes, used_bytes, skipped_pairs, total_pairs, predicted, predicted_used,
         predictable, wait_seconds, expert_seconds, streamed_layers, streamed_bytes,
         stream_wait_seconds, reads, read_bytes, read_retries, read_stalls, reads_in_flight,
         ssd_busy_seconds, device_slots, device_cache_slots, device_slot_bytes, device_hits,
         uploads, uploaded_bytes, device_evictions, device_returns, uploads_ahead,
         uploads_ahead_used, cpu_bytes, cpu_seconds, layer_upload_bytes, layer_upload_wait_seconds,
         rates] = of;
  return std::tie(struct_bytes, reserved_bytes, tiered, slots, cache_slots, slot_bytes, image_bytes,
                  hits, misses, joined, prefetched, evictions, prefetched_bytes, demand_bytes,
                  speculative_bytes, wasted_bytes, used_bytes, skipped_pairs, total_pairs,
                  predicted, predicted_used, predictable, wait_seconds, expert_seconds,
                  streamed_layers, streamed_bytes, stream_wait_seconds, reads, read_bytes,
                  read_retries, read_stalls, reads_in_flight, ssd_busy_seconds, device_slots,
                  device_cache_slots, device_slot_bytes, device_hits, uploads, uploaded_bytes,
                  device_evictions, device_returns, uploads_ahead, uploads_ahead_used, cpu_bytes,
                  cpu_seconds, layer_upload_bytes, layer_upload_wait_seconds, rates);
}

template <typename Struct>
  requires std::is_same_v<std::remove_const_t<Struct>, GenerationResult>
auto fields(Struct& of) {
  auto& [struct_bytes, tokens, logprobs, finish_reason, prompt_tokens, prefill_seconds,
         decode_seconds] = of;
  return std::tie(struct_bytes, tokens, logprobs, finish_reason, prompt_tokens, prefill_seconds,
                  decode_seconds);
}

std::size_t round_up(std::size_t bytes, std::size_t step) {
  return (bytes + step - 1) / step * step;
}

template <typename Struct>
[[noreturn]] void refuse(const char* name, std::size_t bytes) {
  const std::string own = std::to_string(sizeof(Struct));
  throw ParameterError(
      std::string(name) + ".struct_bytes",
      "is " + std::to_string(bytes) + ", and that of this library's struct is " + own +
          (bytes > sizeof(Struct)
               ? ": the program was compiled with the headers of a newer dsfp4; install that "
                 "version, or compile the program with this one's headers"
               : ": no version of the headers has such a struct; leave struct_bytes as the "
                 "header sets it, and compile the program with this version's headers"));
}

// Assigns the fields of `from` to those of `to` that lie within the first `bytes` bytes of a
// struct, struct_bytes itself left out. Throws ParameterError unless `bytes` is where a field ends.
template <typename Struct, typename From>
void assign_fields(const char* name, From& from, Struct& to, std::size_t bytes) {
  bool whole = false;
  const auto assign = [&](const auto& own, auto& source, auto& target) {
    const std::size_t end = static_cast<std::size_t>(reinterpret_cast<const std::byte*>(&target) -
                                                     reinterpret_cast<const std::byte*>(&to)) +
                            sizeof(target);
    whole = whole || round_up(end, alignof(Struct)) == bytes;
    if (end > bytes || static_cast<const void*>(&target) == own) return;
    if constexpr (std::is_const_v<From>) {
      target = source;
    } else {
      target = std::move(source);
    }
  };
  auto sources = fields(from);
  auto targets = fields(to);
  const auto each = [&]<std::size_t... I>(std::index_sequence<I...>) {
    (assign(&to.struct_bytes, std::get<I>(sources), std::get<I>(targets)), ...);
  };
  each(std::make_index_sequence<std::tuple_size_v<decltype(targets)>>());
  if (!whole) refuse<Struct>(name, bytes);
}

template <typename Struct>
Struct completed(const char* name, const Struct& given) {
  Struct all;
  assign_fields(name, given, all, given.struct_bytes);
  return all;
}

// A program with newer headers has fields that this library does not fill.
template <typename Struct>
void hand_over_fields(const char* name, Struct& from, Struct& to) {
  assign_fields(name, from, to, std::min(to.struct_bytes, sizeof(Struct)));
}

}  // namespace

LoadOptions complete(const LoadOptions& given) { return completed("LoadOptions", given); }
GenerateOptions complete(const GenerateOptions& given) {
  return completed("GenerateOptions", given);
}
ForwardOptions complete(const ForwardOptions& given) { return completed("ForwardOptions", given); }

void hand_over(ModelStats&& from, ModelStats& to) { hand_over_fields("ModelStats", from, to); }
void hand_over(GenerationResult&& from, GenerationResult& to) {
  hand_over_fields("GenerationResult", from, to);
}

}  // namespace dsfp4
