// The next token from one row of logits: the likeliest, or a draw among the likeliest under a
// temperature. The same steps as the host's sampler: sort (the lower id first among equals), top_k,
// probabilities, top_p, min_p, one draw; sums in FP64 and in a fixed order.
#include <cub/device/device_radix_sort.cuh>

#include "ops/cuda/common.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kThreads = 1024;

// NaN and -infinity cannot be chosen.
__device__ __forceinline__ bool possible(float logit) { return logit > -INFINITY; }

__global__ void __launch_bounds__(kThreads)
    likeliest_kernel(const float* logits, int count, std::int32_t* out) {
  __shared__ float best_logit[kThreads / 32];
  __shared__ int best_id[kThreads / 32];
  float logit = -INFINITY;
  int id = -1;
  const auto take = [&](float other, int other_id) {
    if (other_id < 0) return;
    if (id < 0 || other > logit || (other == logit && other_id < id)) {
      logit = other;
      id = other_id;
    }
  };
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    if (possible(logits[i])) take(logits[i], i);
  }
  const auto reduce = [&] {
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, logit, step);
      const int other_id = __shfl_xor_sync(0xffffffffu, id, step);
      take(other, other_id);
    }
  };
  reduce();
  if (threadIdx.x % 32 == 0) {
    best_logit[threadIdx.x / 32] = logit;
    best_id[threadIdx.x / 32] = id;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  logit = best_logit[threadIdx.x];
  id = best_id[threadIdx.x];
  reduce();
  if (threadIdx.x == 0) *out = id;
}

__global__ void candidates_kernel(const float* logits, int count, float* keys, std::int32_t* ids) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  keys[i] = possible(logits[i]) ? logits[i] : -INFINITY;
  ids[i] = i;
}

// One block; `keys` fall. Each thread has a run of them.
class Draw {
 public:
  __device__ Draw(const float* keys, int count, double temperature, double* sums, int* found)
      : keys_(keys), temperature_(temperature), sums_(sums), found_(found) {
    each_ = (count + kThreads - 1) / kThreads;
    begin_ = min(static_cast<int>(threadIdx.x) * each_, count);
    end_ = min(begin_ + each_, count);
  }

  __device__ double probability(int i) const {
    const float logit = keys_[i];
    if (logit == keys_[0]) return 1.0;
    return possible(logit) ? exp((static_cast<double>(logit) - keys_[0]) / temperature_) : 0.0;
  }
  /// sums[t]: of all before thread t's run; sums[kThreads]: of the first `count`.
  __device__ void add_up(int count) {
    double sum = 0.0;
    for (int i = begin_; i < min(end_, count); ++i) sum += probability(i);
    __syncthreads();
    sums_[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double before = 0.0;
      for (int t = 0; t < kThreads; ++t) {
        const double own = sums_[t];
        sums_[t] = before;
        before += own;
      }
      sums_[kThreads] = before;
    }
    __syncthreads();
  }
  __device__ double total() const { return sums_[kThreads]; }
  /// The first of `count` for which holds(sum up to and with it, probability); `count` if none.
  template <typename Holds>
  __device__ int first(int count, const Holds& holds) {
    __syncthreads();
    if (threadIdx.x == 0) *found_ = count;
    __syncthreads();
    double sum = sums_[threadIdx.x];
    for (int i = begin_; i < min(end_, count); ++i) {
      const double p = probability(i);
      sum += p;
      if (holds(sum, p)) {
        atomicMin(found_, i);
        break;
      }
    }
    __syncthreads();
    return *found_;
  }

 private:
  const float* keys_;
  double temperature_;
  double* sums_;
  int* found_;
  int each_, begin_, end_;
};

__global__ void __launch_bounds__(kThreads)
    draw_kernel(const float* keys, const std::int32_t* ids, int count, SampleSpec spec,
                std::int32_t* out) {
  __shared__ double sums[kThreads + 1];
  __shared__ int found;
  if (!possible(keys[0])) {
    if (threadIdx.x == 0) *out = -1;
    return;
  }
  Draw draw(keys, count, spec.temperature, sums, &found);
  int kept = spec.top_k > 0 && spec.top_k < count ? static_cast<int>(spec.top_k) : count;
  draw.add_up(kept);
  if (spec.top_p < 1.0) {
    const double enough = spec.top_p * draw.total();
    kept = min(draw.first(kept, [&](double sum, double) { return sum >= enough; }) + 1, kept);
  }
  if (spec.min_p > 0.0) {
    kept = draw.first(kept, [&](double, double p) { return p < spec.min_p; });
  }
  draw.add_up(kept);
  const double left = spec.uniform * draw.total();
  const int chosen = draw.first(kept, [&](double sum, double p) { return p > 0.0 && sum > left; });
  if (threadIdx.x == 0) *out = ids[chosen < kept ? chosen : 0];
}

// `bytes` of space; fails with cudaErrorInvalidValue if it takes more.
cudaError_t sort(const SampleSpace& space, std::size_t bytes, int count, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairsDescending(space.sort, bytes, space.keys, space.sorted_keys,
                                                   space.ids, space.sorted_ids, count, 0, 32,
                                                   stream);
}

}  // namespace

bool sample(Device* device, ConstMatrix logits, const SampleSpec* spec, std::byte* workspace,
            std::int32_t* id) {
  DSFP4_TRY(cudaSetDevice(device->index));
  const auto count = static_cast<int>(logits.cols);
  Carver carver(workspace);
  const SampleSpace space = SampleSpace::carve(carver, logits.cols);
  if (spec->temperature == 0.0) {
    likeliest_kernel<<<1, kThreads, 0, device->stream>>>(logits.data, count, space.out);
    DSFP4_LAUNCHED("likeliest_kernel");
  } else {
    candidates_kernel<<<blocks_for(count, 256), 256, 0, device->stream>>>(logits.data, count,
                                                                          space.keys, space.ids);
    DSFP4_LAUNCHED("candidates_kernel");
    DSFP4_TRY(
        sort(space, static_cast<std::size_t>(sort_bytes(logits.cols)), count, device->stream));
    draw_kernel<<<1, kThreads, 0, device->stream>>>(space.sorted_keys, space.sorted_ids, count,
                                                    *spec, space.out);
    DSFP4_LAUNCHED("draw_kernel");
  }
  DSFP4_TRY(cudaMemcpyAsync(id, space.out, sizeof(*id), cudaMemcpyDeviceToHost, device->stream));
  DSFP4_TRY(cudaStreamSynchronize(device->stream));
  return true;
}

}  // namespace dsfp4::ops::cuda
