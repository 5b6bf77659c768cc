// The router's choice, one warp a token: scores, group limit, top-k, mixing weights. In shared
// memory: scores and selection values [experts], group scores [groups], and which are taken.
// Scores are computed in FP64 and rounded, as the host does, so that both choose alike.
#include "ops/cuda/common.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

struct Candidate {
  float value;
  int index;  // -1: none
};

// The host's order: NaN last, then the larger value, then the lower index.
__device__ bool better(Candidate a, Candidate b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  if (isnan(a.value) != isnan(b.value)) return isnan(b.value);
  if (a.value != b.value && !isnan(a.value)) return a.value > b.value;
  return a.index < b.index;
}

// The best index that is not taken, marked as taken; all lanes get it.
__device__ int take_best(const float* values, unsigned char* taken, int count) {
  const int lane = static_cast<int>(threadIdx.x);
  Candidate best{0.0f, -1};
  for (int i = lane; i < count; i += 32) {
    if (taken[i]) continue;
    const Candidate candidate{values[i], i};
    if (better(candidate, best)) best = candidate;
  }
  for (int step = 16; step > 0; step /= 2) {
    const Candidate other{__shfl_xor_sync(kAll, best.value, step),
                          __shfl_xor_sync(kAll, best.index, step)};
    if (better(other, best)) best = other;
  }
  __syncwarp();
  if (lane == 0 && best.index >= 0) taken[best.index] = 1;
  __syncwarp();
  return best.index;
}

__device__ double warp_sum_f64(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

__device__ void score(const RouterSpec& spec, const float* logits, float* scores) {
  const int lane = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>(spec.experts);
  if (spec.scoring == RouterSpec::Scoring::kSigmoid) {
    for (int i = lane; i < count; i += 32) {
      scores[i] = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logits[i]))));
    }
    return;
  }
  float largest = -INFINITY;
  for (int i = lane; i < count; i += 32) largest = fmaxf(largest, logits[i]);
  largest = warp_max(largest);
  double sum = 0.0;
  for (int i = lane; i < count; i += 32) sum += exp(static_cast<double>(logits[i]) - largest);
  sum = warp_sum_f64(sum);
  for (int i = lane; i < count; i += 32) {
    scores[i] = static_cast<float>(exp(static_cast<double>(logits[i]) - largest) / sum);
  }
}

__device__ void drop_weak_groups(const RouterSpec& spec, float* selection, float* group,
                                 unsigned char* taken) {
  const int lane = static_cast<int>(threadIdx.x);
  const int groups = static_cast<int>(spec.groups);
  const int width = static_cast<int>(spec.experts / spec.groups);
  for (int g = lane; g < groups; g += 32) {
    float first = -INFINITY;
    float second = -INFINITY;
    for (int i = 0; i < width; ++i) {
      const float x = selection[g * width + i];
      if (x > first) {
        second = first;
        first = x;
      } else {
        second = fmaxf(second, x);
      }
    }
    group[g] = spec.group_score == RouterSpec::GroupScore::kMax ? first : first + second;
    taken[g] = 0;
  }
  __syncwarp();
  for (std::int64_t k = 0; k < spec.kept_groups; ++k) take_best(group, taken, groups);
  for (int i = lane; i < static_cast<int>(spec.experts); i += 32) {
    if (!taken[i / width]) selection[i] = -INFINITY;
  }
  __syncwarp();
}

__global__ void route_kernel(RouterSpec spec, ConstMatrix logits, const float* bias,
                             const std::int32_t* forced, DeviceRouting out) {
  extern __shared__ float shared[];
  const int count = static_cast<int>(spec.experts);
  float* scores = shared;
  float* selection = scores + count;
  float* group = selection + count;
  auto* taken = reinterpret_cast<unsigned char*>(group + spec.groups);
  const int lane = static_cast<int>(threadIdx.x);

  score(spec, logits.data + blockIdx.x * logits.stride, scores);
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    selection[i] = scores[i] + (bias == nullptr ? 0.0f : bias[i]);
  }
  __syncwarp();
  if (spec.kept_groups < spec.groups) drop_weak_groups(spec, selection, group, taken);
  for (int i = lane; i < count; i += 32) taken[i] = 0;
  __syncwarp();

  const std::int64_t at = blockIdx.x * spec.top_k;
  double sum = 0.0;
  for (std::int64_t k = 0; k < spec.top_k; ++k) {
    const int own = take_best(selection, taken, count);
    const int used = forced == nullptr ? own : forced[at + k];
    sum += scores[used];
    if (lane == 0) {
      out.experts[at + k] = own;
      out.used[at + k] = used;
    }
  }
  __syncwarp();
  const double divisor = spec.normalize ? sum + 1e-20 : 1.0;
  for (std::int64_t k = lane; k < spec.top_k; k += 32) {
    out.weights[at + k] =
        static_cast<float>(scores[out.used[at + k]] / divisor * spec.scaling_factor);
  }
}

}  // namespace

bool route(Device* device, const RouterSpec* spec, ConstMatrix logits, const float* bias,
           const std::int32_t* forced, DeviceRouting out) {
  if (logits.rows == 0) return true;
  const auto shared = static_cast<std::size_t>(spec->experts * 9 + spec->groups * 4 +
                                               std::max(spec->experts, spec->groups));
  if (shared > static_cast<std::size_t>(device->shared_bytes)) {
    return fail(cudaErrorInvalidValue, "route: more experts than shared memory holds", __FILE__,
                __LINE__);
  }
  DSFP4_TRY(cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device->shared_bytes));
  route_kernel<<<static_cast<unsigned>(logits.rows), 32, shared, device->stream>>>(
      *spec, logits, bias, forced, out);
  DSFP4_LAUNCHED("route_kernel");
  return true;
}

}  // namespace dsfp4::ops::cuda
