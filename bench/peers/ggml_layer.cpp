// Times one MoE layer in ggml (llama.cpp's library) on random weights.
// usage: ggml_layer TYPE(nvfp4|mxfp4) REPACK(0|1) THREADS EXPERTS TOKENS RUNS
// Prints seconds, one run a line; exit code 3 if there is no repacked layout here.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr int64_t kHidden = 7168;
constexpr int64_t kIntermediate = 2048;
constexpr int64_t kTopK = 8;

// Random codes with scales near one, in ggml's blocks: MXFP4 1 + 16 bytes, NVFP4 4 + 32.
std::vector<uint8_t> random_blocks(ggml_type type, size_t bytes) {
  const size_t scales = type == GGML_TYPE_MXFP4 ? 1 : 4;
  const size_t block = type == GGML_TYPE_MXFP4 ? 17 : 36;
  std::vector<uint8_t> data(bytes);
  uint64_t state = 88172645463325252u;
  const size_t period = std::min(bytes, 4 * block * (size_t{1} << 16));
  for (size_t i = 0; i < period; ++i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    const auto random = static_cast<uint8_t>(state >> 32);
    const bool scale = i % block < scales;
    data[i] = !scale ? random : type == GGML_TYPE_MXFP4 ? 118 + random % 4 : 0x28 + random % 8;
  }
  // What follows repeats it: nothing here remembers bytes that it has seen.
  for (size_t i = period; i < bytes; i += period) {
    std::memcpy(&data[i], data.data(), std::min(period, bytes - i));
  }
  return data;
}

ggml_backend_buffer_type_t repacked_buffers() {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  auto* extra =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (extra == nullptr) return nullptr;
  for (ggml_backend_buffer_type_t* type = extra(device); type != nullptr && *type != nullptr;
       ++type) {
    if (std::string(ggml_backend_buft_name(*type)).find("REPACK") != std::string::npos)
      return *type;
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const ggml_type type = std::string(argv[1]) == "mxfp4" ? GGML_TYPE_MXFP4 : GGML_TYPE_NVFP4;
  const bool repack = std::atoi(argv[2]) != 0;
  const int threads = std::atoi(argv[3]);
  const int64_t experts = std::atoll(argv[4]);
  const int64_t tokens = std::atoll(argv[5]);
  const int runs = std::atoi(argv[6]);

  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, threads);
  ggml_backend_buffer_type_t buffers = repack ? repacked_buffers() : ggml_backend_cpu_buffer_type();
  if (buffers == nullptr) return 3;

  ggml_context* weights = ggml_init({ggml_tensor_overhead() * 8, nullptr, true});
  ggml_tensor* gate_w = ggml_new_tensor_3d(weights, type, kHidden, kIntermediate, experts);
  ggml_tensor* up_w = ggml_new_tensor_3d(weights, type, kHidden, kIntermediate, experts);
  ggml_tensor* down_w = ggml_new_tensor_3d(weights, type, kIntermediate, kHidden, experts);
  if (ggml_backend_alloc_ctx_tensors_from_buft(weights, buffers) == nullptr) return 4;
  for (ggml_tensor* tensor : {gate_w, up_w, down_w}) {
    if (repack && tensor->extra == nullptr) return 3;  // this type is not repacked here
    const std::vector<uint8_t> blocks = random_blocks(type, ggml_nbytes(tensor));
    ggml_backend_tensor_set(tensor, blocks.data(), 0, blocks.size());
  }

  ggml_context* values =
      ggml_init({ggml_tensor_overhead() * 64 + ggml_graph_overhead(), nullptr, true});
  ggml_tensor* x = ggml_new_tensor_3d(values, GGML_TYPE_F32, kHidden, 1, tokens);
  ggml_tensor* ids = ggml_new_tensor_2d(values, GGML_TYPE_I32, kTopK, tokens);
  ggml_tensor* gate = ggml_mul_mat_id(values, gate_w, x, ids);
  ggml_tensor* up = ggml_mul_mat_id(values, up_w, x, ids);
  ggml_tensor* out = ggml_mul_mat_id(values, down_w, ggml_swiglu_split(values, gate, up), ids);
  ggml_cgraph* graph = ggml_new_graph(values);
  ggml_build_forward_expand(graph, out);
  if (ggml_backend_alloc_ctx_tensors(values, backend) == nullptr) return 4;

  std::vector<float> input(static_cast<size_t>(kHidden * tokens));
  for (size_t i = 0; i < input.size(); ++i) {
    input[i] = static_cast<float>((i * 2654435761u) % 2001) / 1000.0f - 1.0f;
  }
  ggml_backend_tensor_set(x, input.data(), 0, input.size() * sizeof(float));

  std::vector<int32_t> chosen(static_cast<size_t>(kTopK * tokens));
  int64_t next = 0;
  for (int run = -1; run < runs; ++run) {
    for (int32_t& expert : chosen) expert = static_cast<int32_t>(next++ % experts);
    ggml_backend_tensor_set(ids, chosen.data(), 0, chosen.size() * sizeof(int32_t));
    const auto start = std::chrono::steady_clock::now();
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) return 4;
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (run >= 0) std::printf("%.9f\n", took.count());
  }
  return 0;
}
