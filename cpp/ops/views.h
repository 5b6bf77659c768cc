// Operands of ops: matrices, weights, caches and routings that lie on a device.
//
// Matrices are row-major FP32; a row is a token unless said otherwise. Weights stay in their stored
// format.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/device_ptr.h"
#include "format/weight.h"

namespace dsfp4::ops {

/// `Floats` is float* or const float*, or a DevicePtr of these.
template <typename Floats>
struct MatrixOf {
  Floats data{};
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;  // floats from one row to the next

  Floats row(std::int64_t r) const { return data + r * stride; }
  /// Rows [first, first + count).
  MatrixOf slice(std::int64_t first, std::int64_t count) const {
    return {row(first), count, cols, stride};
  }
  /// Columns [first, first + count) of every row.
  MatrixOf columns(std::int64_t first, std::int64_t count) const {
    return {data + first, rows, count, stride};
  }
  template <typename Other>
    requires std::convertible_to<Floats, Other> && (!std::same_as<Floats, Other>)
  operator MatrixOf<Other>() const {  // NOLINT: a plain view
    return {data, rows, cols, stride};
  }
};
using Matrix = MatrixOf<DevicePtr<float>>;
using ConstMatrix = MatrixOf<DevicePtr<const float>>;

using WeightView = format::WeightViewOf<DevicePtr<const std::byte>>;

/// Prefill attends to keys and values expanded from the latents; decode works on the latents
/// themselves. The phase, never a size, chooses the path.
enum class Phase : std::uint8_t { kPrefill, kDecode };

/// The change that a matrix product makes to its activations.
enum class Inputs : std::uint8_t {
  kBf16,  // may be rounded to BF16, or to a block-scaled integer that loses less
  kF32,   // as they are: the router
};

/// Geometry of multi-head latent attention.
struct MlaShape {
  std::int64_t heads = 0;
  std::int64_t kv_lora_rank = 0;
  std::int64_t qk_nope_head_dim = 0;
  std::int64_t qk_rope_head_dim = 0;
  std::int64_t v_head_dim = 0;
  float softmax_scale = 0.0f;

  constexpr std::int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  /// Values that the cache holds for a token and layer: the latent, then the rotated shared key.
  constexpr std::int64_t cache_width() const { return kv_lora_rank + qk_rope_head_dim; }
};

enum class KvFormat : std::uint8_t { kF32, kBf16, kFp8 };  // kFp8: E4M3 times KvView::scale

/// Bytes of one cached value.
std::size_t kv_value_bytes(KvFormat format);

/// Tokens in one block of the KV cache.
inline constexpr std::int64_t kKvBlockTokens = 64;

/// One sequence's cache in one layer: token t lies in blocks[t / kKvBlockTokens], `layer_offset`
/// bytes in, as row t % kKvBlockTokens of [kKvBlockTokens, cache_width].
struct KvView {
  std::span<const DevicePtr<std::byte>> blocks;  // the span is the host's
  std::size_t layer_offset = 0;
  KvFormat format = KvFormat::kF32;
  float scale = 1.0f;  // kFp8 only: the layer's k_scale
};

/// The rows of a batch that belong to one sequence: tokens at `position`, `position` + 1, ...
struct SequenceRows {
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t position = 0;
  KvView kv;

  /// Tokens that the last row of this step may look at.
  std::int64_t length() const { return position + rows; }
};

/// How a family chooses experts.
struct RouterSpec {
  enum class Scoring : std::uint8_t { kSoftmax, kSigmoid };
  enum class GroupScore : std::uint8_t { kMax, kSumOfTop2 };

  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  std::int64_t groups = 1;
  std::int64_t kept_groups = 1;  // == groups: no group limit
  Scoring scoring = Scoring::kSoftmax;
  GroupScore group_score = GroupScore::kMax;
  bool normalize = false;  // weights divided by their sum + 1e-20
  float scaling_factor = 1.0f;
};

/// Chosen experts, [tokens, top_k] row-major, on the device.
struct Routing {
  DeviceSpan<std::int32_t> experts;  // the router's own choice, best first, lower index on a tie
  DeviceSpan<std::int32_t> used;     // what `weights` belong to: the own choice or the forced one
  DeviceSpan<float> weights;
  /// The choice was made from these, [tokens, experts]; empty where nobody asks for them.
  Matrix logits = {};
};

template <typename Weight>
struct ExpertViewOf {
  Weight gate_proj, up_proj, down_proj;

  template <typename Other>
    requires std::convertible_to<Weight, Other> && (!std::same_as<Weight, Other>)
  operator ExpertViewOf<Other>() const {  // NOLINT: a plain view
    return {gate_proj, up_proj, down_proj};
  }
};
using ExpertView = ExpertViewOf<WeightView>;
/// One that lies in host memory, for those who read it there.
using HostExpertView = ExpertViewOf<format::WeightView>;

/// One expert and the (token, slot) pairs that chose it, each as token * top_k + slot.
template <typename Expert>
struct ExpertTaskOf {
  const Expert* expert = nullptr;
  std::span<const std::int32_t> pairs;  // on the host
};
using ExpertTask = ExpertTaskOf<ExpertView>;

/// How one token is drawn from logits; see GenerateOptions.
struct SampleSpec {
  double temperature = 0.0;  // 0: the likeliest
  std::int64_t top_k = 0;    // 0 is off
  double top_p = 1.0;
  double min_p = 0.0;
  double uniform = 0.0;  // the draw, in [0, 1)
};

/// Columns of the widest weight in each WeightFormat; 0 if there is none.
struct WidestWeights {
  std::array<std::int64_t, format::kWeightFormats> all{};  // but the down-projections of experts
  std::array<std::int64_t, format::kWeightFormats> expert_down{};
};

}  // namespace dsfp4::ops
