// What the kernels of attention of a prompt share: attention_prefill.cu, for all GPUs, and
// attention_prefill_hopper.cu with wgmma. DeepSeek's geometry only, keys 128 + 64, values 128.
#pragma once

#include "ops/cuda/kernels.h"
#include "ops/cuda/words.cuh"

namespace dsfp4::ops::cuda::prefill {

constexpr int kNope = 128;
constexpr int kRope = 64;
constexpr int kKey = kNope + kRope;
constexpr int kValue = 128;
constexpr int kExpanded = kNope + kValue;

struct Arguments {
  float scale;  // softmax_scale * log2 e
  SequencePart part;
  std::int64_t first_head, heads;  // of this group
  const __nv_bfloat16* expanded;   // [length, heads * 256]
  const __nv_bfloat16* keys;       // [length, 64]
  ConstMatrix q;
  Matrix out;

  __host__ __device__ __forceinline__ std::int64_t length() const {
    return part.position + part.rows;
  }

  /// Eight values of the query of the part's row `row`, zeros if there is none.
  __device__ __forceinline__ uint4 query_unit(std::int64_t row, std::int64_t head, int unit) const {
    if (row >= part.rows) return {};
    const float* from =
        q.data + (part.first_row + row) * q.stride + (first_head + head) * kKey + unit * 8;
    const float4 low = *reinterpret_cast<const float4*>(from);
    const float4 high = *reinterpret_cast<const float4*>(from + 4);
    return {pack_bf16(low.x, low.y), pack_bf16(low.z, low.w), pack_bf16(high.x, high.y),
            pack_bf16(high.z, high.w)};
  }

  /// The columns of `head` in the output's row of the part's row `row`.
  __device__ __forceinline__ float* output(std::int64_t row, std::int64_t head) const {
    return out.data + (part.first_row + row) * out.stride + (first_head + head) * kValue;
  }
};

/// For GPUs with wgmma.
bool launch_hopper(Device* device, const Arguments& arguments);

}  // namespace dsfp4::ops::cuda::prefill
