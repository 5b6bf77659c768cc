#include "ops/cuda/tensor_map.cuh"

namespace dsfp4::ops::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver itself, as the plugin links the runtime only; null if it has none.
Encode find_encode() {
  cudaDriverEntryPointQueryResult found{};
  void* entry = nullptr;
  const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                            cudaEnableDefault, &found);
  if (code != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

bool map_tiles(CUtensorMap& map, const __nv_bfloat16* data, std::int64_t rows, std::int64_t cols,
               std::int64_t stride, int box_rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr) {
    return fail(cudaErrorInsufficientDriver, "cuTensorMapEncodeTiled", __FILE__, __LINE__);
  }
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(stride) * sizeof(__nv_bfloat16)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16*>(data), size,
             row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return fail(cudaErrorInvalidValue, "cuTensorMapEncodeTiled", __FILE__, __LINE__);
  }
  return true;
}

}  // namespace dsfp4::ops::cuda
