// The router's choice, one block a token: scores, group limit, top-k, mixing weights. In shared
// memory: scores and selection values [experts], their ranks, group scores and ranks [groups].
// Scores are computed in FP64 and rounded, as the host does, so that both choose alike.
#include "ops/cuda/common.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Larger for what is chosen first, never 0: NaN last, then the larger value.
__device__ unsigned rank_of(float value) {
  if (isnan(value)) return 1;
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The first index of the largest rank, whose rank becomes 0 (taken); -1 if all are. One warp; all
// lanes get it.
__device__ int take_best(unsigned* ranks, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned best = 0;
  int index = count;
#pragma unroll 8
  for (int i = lane; i < count; i += 32) {
    if (ranks[i] > best) {
      best = ranks[i];
      index = i;
    }
  }
  const unsigned most = __reduce_max_sync(kAll, best);
  if (most == 0) return -1;
  index = __reduce_min_sync(kAll, best == most ? index : count);
  __syncwarp();  // all have read their ranks
  if (lane == 0) ranks[index] = 0;
  __syncwarp();
  return index;
}

// The block's sum (or maximum) of each thread's value, in a fixed order; all threads get it.
template <typename T, typename Combine>
__device__ T reduce(T value, T* parts, const Combine& combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kAll, value, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
  for (int w = 1; w < kWarps; ++w) value = combine(value, parts[w]);
  return value;
}

__device__ void score(const RouterSpec& spec, const float* logits, float* scores) {
  const int thread = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>(spec.experts);
  if (spec.scoring == RouterSpec::Scoring::kSigmoid) {
    for (int i = thread; i < count; i += kThreads) {
      scores[i] = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logits[i]))));
    }
    return;
  }
  __shared__ float largest_parts[kWarps];
  __shared__ double sum_parts[kWarps];
  float largest = -INFINITY;
  for (int i = thread; i < count; i += kThreads) largest = fmaxf(largest, logits[i]);
  largest = reduce(largest, largest_parts, [](float a, float b) { return fmaxf(a, b); });
  double sum = 0.0;
  for (int i = thread; i < count; i += kThreads) {
    sum += exp(static_cast<double>(logits[i]) - largest);
  }
  sum = reduce(sum, sum_parts, [](double a, double b) { return a + b; });
  for (int i = thread; i < count; i += kThreads) {
    scores[i] = static_cast<float>(exp(static_cast<double>(logits[i]) - largest) / sum);
  }
}

// Values of groups that are not among the best become -infinity.
__device__ void drop_weak_groups(const RouterSpec& spec, float* selection, unsigned* group) {
  const int groups = static_cast<int>(spec.groups);
  const int width = static_cast<int>(spec.experts / spec.groups);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int g = warp; g < groups; g += kWarps) {
    float first = -INFINITY;
    float second = -INFINITY;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < width; i += 32) {
      const float x = selection[g * width + i];
      second = fmaxf(second, fminf(first, x));  // a NaN counts for nothing
      first = fmaxf(first, x);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float other_first = __shfl_xor_sync(kAll, first, step);
      const float other_second = __shfl_xor_sync(kAll, second, step);
      second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
      first = fmaxf(first, other_first);
    }
    const bool one = spec.group_score == RouterSpec::GroupScore::kMax;
    if (threadIdx.x % 32 == 0) group[g] = rank_of(one ? first : first + second);
  }
  __syncthreads();
  if (warp == 0) {
    for (std::int64_t k = 0; k < spec.kept_groups; ++k) take_best(group, groups);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(spec.experts); i += kThreads) {
    if (group[i / width] != 0) selection[i] = -INFINITY;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    route_kernel(RouterSpec spec, ConstMatrix logits, const float* bias, const std::int32_t* forced,
                 DeviceRouting out) {
  extern __shared__ float shared[];
  begin_kernel();
  const int count = static_cast<int>(spec.experts);
  float* scores = shared;
  float* selection = scores + count;
  auto* ranks = reinterpret_cast<unsigned*>(selection + count);
  unsigned* group = ranks + count;
  const int thread = static_cast<int>(threadIdx.x);

  score(spec, logits.data + blockIdx.x * logits.stride, scores);
  for (int i = thread; i < count; i += kThreads) {  // those that it has written itself
    selection[i] = scores[i] + (bias == nullptr ? 0.0f : bias[i]);
  }
  __syncthreads();
  if (spec.kept_groups < spec.groups) drop_weak_groups(spec, selection, group);
  for (int i = thread; i < count; i += kThreads) ranks[i] = rank_of(selection[i]);
  __syncthreads();
  if (thread >= 32) return;

  const std::int64_t at = blockIdx.x * spec.top_k;
  double sum = 0.0;
  for (std::int64_t k = 0; k < spec.top_k; ++k) {
    const int own = take_best(ranks, count);
    const int used = forced == nullptr ? own : forced[at + k];
    sum += scores[used];
    if (thread == 0) {
      out.experts[at + k] = own;
      out.used[at + k] = used;
    }
  }
  __syncwarp();
  const double divisor = spec.normalize ? sum + 1e-20 : 1.0;
  for (std::int64_t k = thread; k < spec.top_k; k += 32) {
    out.weights[at + k] =
        static_cast<float>(scores[out.used[at + k]] / divisor * spec.scaling_factor);
  }
}

}  // namespace

bool route(Device* device, const RouterSpec* spec, ConstMatrix logits, const float* bias,
           const std::int32_t* forced, DeviceRouting out) {
  if (logits.rows == 0) return true;
  const auto shared = static_cast<std::size_t>(spec->experts * 3 + spec->groups) * sizeof(float);
  if (shared + 1024 > static_cast<std::size_t>(device->shared_bytes)) {
    return fail(cudaErrorInvalidValue, "route: more experts than shared memory holds", __FILE__,
                __LINE__);
  }
  DSFP4_TRY(cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)));
  DSFP4_TRY(launch(device, route_kernel, static_cast<unsigned>(logits.rows), kThreads, shared,
                   *spec, logits, bias, forced, out));
  return true;
}

}  // namespace dsfp4::ops::cuda
