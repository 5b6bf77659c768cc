#include "engine/bench_cuda.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <random>

#include "base/device_access.h"
#include "engine/bench_timer.h"
#include "engine/bench_weights.h"
#include "engine/gpu_rates.h"
#include "engine/kv_cache.h"
#include "memory/arena.h"
#include "model/decoder.h"
#include "model/pass.h"
#include "ops/cuda_backend.h"
#include "ops/cuda_plugin.h"
#include "ops/host_routing.h"
#include "ops/scratch.h"
#include "residency/resident_experts.h"

namespace dsfp4::engine {
namespace {

using format::WeightFormat;
using ops::Matrix;
using ops::WeightView;

constexpr std::int64_t kHidden = 7168;
constexpr std::int64_t kExpert = 2048;
constexpr std::int64_t kTopK = 8;
const ops::MlaShape kMla{128, 512, 128, 64, 128, 0.1352f};

class Bench {
 public:
  Bench(int index, std::string only)
      : only_(std::move(only)),
        plugin_(ops::cuda_plugin()),
        backend_(plugin_, index, 0),
        timer_(plugin_, backend_.device()),
        weights_(backend_.device(), random_),
        arena_(std::size_t{2000} << 20, "the benchmark's activations", backend_.device().memory()) {
    read_rate_ = measure_reads();
    flop_rate_ = measure_products();
  }

  void linear(WeightFormat format, std::int64_t rows, std::int64_t cols, std::int64_t tokens) {
    const std::string name = "linear " + std::string(format::weight_format_name(format)) + " " +
                             std::to_string(rows) + "x" + std::to_string(cols) + ", " +
                             std::to_string(tokens) + " tokens";
    const ops::ScratchScope scope(arena_);
    const Matrix x = random(tokens, cols);
    const Matrix y = ops::scratch_matrix(arena_, tokens, rows);
    const auto bytes = static_cast<double>(format::stored_bytes(format, rows, cols));
    const int rotate = rotations(bytes);
    std::vector<WeightView> weights(static_cast<std::size_t>(rotate));
    for (WeightView& view : weights) view = weight(format, rows, cols);
    time(name, rotate, bytes + 4.0 * static_cast<double>(tokens * (rows + cols)),
         2.0 * static_cast<double>(rows * cols * tokens), [&](int i) {
           backend_.linear(weights[static_cast<std::size_t>(i)], x, y, ops::Phase::kDecode,
                           ops::Inputs::kBf16);
         });
  }

  void moe(WeightFormat format, std::int64_t tokens, std::int64_t experts) {
    const std::string of = std::string(format::weight_format_name(format)) + ", " +
                           std::to_string(experts) + " experts, " + std::to_string(tokens) +
                           " tokens";
    const ops::ScratchScope scope(arena_);
    const auto views = make_experts(format, experts);
    const std::int64_t pairs = tokens * kTopK;
    const auto count = static_cast<std::size_t>(pairs);
    const Matrix x = random(tokens, kHidden);
    const Matrix y = random(tokens, kHidden);
    const Matrix hidden = ops::scratch_matrix(arena_, pairs, kExpert);
    const Matrix routed = ops::scratch_matrix(arena_, pairs, kHidden);
    const auto weights = arena_.take_array<float>(count);
    const std::vector<float> even(count, 0.125f);
    backend_.device().upload(even.data(), weights, count * sizeof(float));
    std::vector<ops::Routing> routings;
    // One token: other experts from call to call. Several: their experts are more than the cache.
    const int rotate = tokens == 1 ? static_cast<int>(experts / pairs) : 1;
    std::vector<std::vector<std::int32_t>> chosen_by(static_cast<std::size_t>(experts));
    for (int i = 0; i < rotate; ++i) {
      const auto used = arena_.take_array<std::int32_t>(count);
      std::vector<std::int32_t> choice(count);
      for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
        std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
        for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int32_t>(e);
        if (rotate == 1) {
          std::shuffle(order.begin(), order.end(), random_);
        } else {
          std::rotate(order.begin(), order.begin() + i * static_cast<std::ptrdiff_t>(pairs),
                      order.end());
        }
        for (std::size_t k = 0; k < static_cast<std::size_t>(kTopK); ++k) {
          choice[t * kTopK + k] = order[k];
          if (i == 0) {
            chosen_by[static_cast<std::size_t>(order[k])].push_back(
                static_cast<std::int32_t>(t * kTopK + k));
          }
        }
      }
      backend_.device().upload(choice.data(), used, count * sizeof(std::int32_t));
      routings.push_back({{used, count}, {used, count}, {weights, count}});
    }
    std::vector<ops::ExpertTask> tasks;
    for (std::size_t e = 0; e < chosen_by.size(); ++e) {
      if (!chosen_by[e].empty()) tasks.push_back({&views[e], chosen_by[e]});
    }
    const double bytes = static_cast<double>(tasks.size()) * 3.0 *
                         static_cast<double>(format::stored_bytes(format, kExpert, kHidden));
    const double flops = 6.0 * static_cast<double>(pairs * kHidden * kExpert);
    time("experts " + of, rotate, bytes, flops, [&](int i) {
      backend_.routed_experts(views, routings[static_cast<std::size_t>(i)], kTopK, x, hidden,
                              routed, y, nullptr);
    });
    const std::string name = "expert tasks " + of;
    if (!wanted(name)) return;
    add(name, timer_.seconds_queued([&] {
      backend_.experts(tasks, kTopK, x, hidden, routed, ops::Phase::kDecode);
    }),
        bytes, flops);
  }

  void attention(ops::KvFormat format, std::int64_t context, std::int64_t sequences, bool decode) {
    const std::string name = std::string(decode ? "MLA decode " : "MLA prefill ") +
                             (format == ops::KvFormat::kFp8 ? "fp8 " : "bf16 ") +
                             std::to_string(context) + " x " + std::to_string(sequences);
    if (!wanted(name)) return;
    const ops::ScratchScope scope(arena_);
    const std::int64_t rows = decode ? sequences : context;
    const std::size_t layer = static_cast<std::size_t>(ops::kKvBlockTokens * kMla.cache_width()) *
                              ops::kv_value_bytes(format);
    // Several layers, so that a small context is read from memory and not from the cache.
    const double bytes = static_cast<double>(context * sequences) *
                         static_cast<double>(kMla.cache_width()) *
                         static_cast<double>(ops::kv_value_bytes(format));
    const int layers = decode ? std::min(rotations(bytes), 40) : 1;
    KvCache cache(context * sequences, layers, layer, format, backend_.device().memory());
    std::deque<Sequence> made;
    std::vector<ops::SequenceRows> batch;
    for (std::int64_t s = 0; s < sequences; ++s) {
      made.emplace_back(cache);
      const ops::SequenceRows all = made.back().next_rows(0, context);
      fill_cache(all, layers, layer);
      batch.push_back(all);
      if (decode) {
        batch.back().first_row = s;
        batch.back().rows = 1;
        batch.back().position = context - 1;
      }
    }
    const Matrix q = random(rows, kMla.heads * kMla.qk_head_dim());
    if (decode) {
      const Matrix q_abs = random(rows, kMla.heads * kMla.kv_lora_rank);
      const Matrix out = ops::scratch_matrix(arena_, rows, kMla.heads * kMla.kv_lora_rank);
      time(name, layers, bytes, 278528.0 * static_cast<double>(context * sequences), [&](int i) {
        for (ops::SequenceRows& s : batch) s.kv.layer_offset = static_cast<std::size_t>(i) * layer;
        backend_.latent_attention(kMla, batch, q_abs, q, out);
      });
      return;
    }
    const WeightView kv_b = weight(WeightFormat::kBF16, kMla.heads * 256, kMla.kv_lora_rank);
    const Matrix out = ops::scratch_matrix(arena_, rows, kMla.heads * kMla.v_head_dim);
    const auto square = static_cast<double>(context * context);
    time(name, 1, bytes, static_cast<double>(kMla.heads) * square * (192 + 128),
         [&](int) { backend_.prefill_attention(kMla, kv_b, batch, q, out); });
  }

  // One token through `layers` layers of R1 (the first dense, attention and head BF16, the rest
  // NVFP4), at position `context`, logits on the host: measured by the host's clock.
  void model(std::int64_t layers, std::int64_t context) {
    const std::string name =
        "model of " + std::to_string(layers) + " layers, a token at " + std::to_string(context);
    if (!wanted(name)) return;
    const ops::ScratchScope scope(arena_);
    model::ModelSpec spec = r1_spec(layers);
    double bytes = 0.0;
    const model::ModelWeights weights = r1_weights(spec, bytes);
    residency::ResidentExperts experts(backend_, kHidden, kExpert, [&](std::int64_t layer) {
      return std::span<const ops::ExpertView>(
          weights.layers[static_cast<std::size_t>(layer)].experts);
    });
    const model::Decoder decoder(spec, weights, backend_, experts, nullptr, nullptr,
                                 ops::KvFormat::kBf16);
    const std::size_t layer_bytes = model::kv_layer_bytes(spec, ops::KvFormat::kBf16);
    KvCache cache(context + 1, layers, layer_bytes, ops::KvFormat::kBf16,
                  backend_.device().memory());
    Sequence sequence(cache);
    fill_cache(sequence.next_rows(0, context), static_cast<int>(layers), layer_bytes);
    sequence.advance(context);
    bytes += static_cast<double>(context * layers * kMla.cache_width() * 2);
    ops::RoutingReader routings(backend_.device(), 1, spec.router, kHidden);
    const Matrix logits = ops::scratch_matrix(arena_, 1, spec.vocab_size);
    std::vector<float> on_host(static_cast<std::size_t>(spec.vocab_size));
    std::vector<double> times;
    for (std::int32_t i = 0; i < 60; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const ops::ScratchScope step(arena_);
      const ops::SequenceRows row = sequence.next_rows(0, 1);
      const std::int32_t id = i * 97;
      model::Batch batch;
      batch.phase = ops::Phase::kDecode;
      batch.ids = {&id, 1};
      batch.sequences = {&row, 1};
      model::Pass pass(decoder, batch, arena_, routings);
      while (!pass.done()) pass.advance();
      decoder.head(pass.hidden(), logits, ops::Phase::kDecode);
      backend_.device().download(logits.data, on_host.data(), on_host.size() * sizeof(float));
      times.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(times.begin() + 10, times.begin() + 35, times.end());
    results.push_back({name, times[35], bytes, 0.0, bytes / read_rate_});
  }

  std::vector<KernelTime> results;

 private:
  static model::ModelSpec r1_spec(std::int64_t layers) {
    model::ModelSpec spec;
    spec.vocab_size = 129280;
    spec.hidden_size = kHidden;
    spec.layers = layers;
    spec.dense_layers = 1;
    spec.q_lora_rank = 1536;
    spec.intermediate_size = 18432;
    spec.moe_intermediate_size = kExpert;
    spec.shared_intermediate_size = kExpert;
    spec.mla = kMla;
    for (int i = 0; i < 32; ++i) spec.rope.inverse_frequency.push_back(std::pow(1e4, -i / 32.0));
    spec.router = {256,
                   kTopK,
                   8,
                   4,
                   ops::RouterSpec::Scoring::kSigmoid,
                   ops::RouterSpec::GroupScore::kSumOfTop2,
                   true,
                   2.5f};
    return spec;
  }

  DeviceSpan<const float> ones(std::int64_t count) {
    const std::vector<float> values(static_cast<std::size_t>(count), 1.0f);
    const auto to = arena_.take_array<float>(values.size());
    backend_.device().upload(values.data(), to, values.size() * sizeof(float));
    return {to, values.size()};
  }

  // `bytes` counts what one token reads.
  model::ModelWeights r1_weights(const model::ModelSpec& spec, double& bytes) {
    const auto read = [&](WeightFormat format, std::int64_t rows, std::int64_t cols) {
      bytes += static_cast<double>(format::stored_bytes(format, rows, cols));
      return weight(format, rows, cols);
    };
    const auto mlp = [&](std::int64_t width) {
      return model::MlpWeights{read(WeightFormat::kNvfp4, width, kHidden),
                               read(WeightFormat::kNvfp4, width, kHidden),
                               read(WeightFormat::kNvfp4, kHidden, width)};
    };
    constexpr WeightFormat kBf16 = WeightFormat::kBF16;
    model::ModelWeights weights;
    weights.lm_head = read(kBf16, spec.vocab_size, kHidden);
    weights.embed_tokens = weights.lm_head;
    weights.norm = ones(kHidden);
    for (std::int64_t i = 0; i < spec.layers; ++i) {
      model::LayerWeights layer;
      layer.input_layernorm = weights.norm;
      layer.post_attention_layernorm = weights.norm;
      layer.self_attn.q_a_proj = read(kBf16, spec.q_lora_rank, kHidden);
      layer.self_attn.q_b_proj = read(kBf16, kMla.heads * kMla.qk_head_dim(), spec.q_lora_rank);
      layer.self_attn.q_a_layernorm = ones(spec.q_lora_rank);
      layer.self_attn.kv_a_proj_with_mqa = read(kBf16, kMla.cache_width(), kHidden);
      layer.self_attn.kv_a_layernorm = ones(kMla.kv_lora_rank);
      layer.self_attn.kv_b_proj = read(kBf16, kMla.heads * 256, kMla.kv_lora_rank);
      layer.self_attn.o_proj = read(kBf16, kHidden, kMla.heads * kMla.v_head_dim);
      if (spec.is_moe(i)) {
        layer.gate = read(kBf16, spec.router.experts, kHidden);
        layer.e_score_correction_bias = ones(spec.router.experts);
        layer.shared_experts = mlp(kExpert);
        layer.experts = make_experts(WeightFormat::kNvfp4, spec.router.experts);
        bytes += static_cast<double>(kTopK) * 3.0 *
                 static_cast<double>(format::stored_bytes(WeightFormat::kNvfp4, kExpert, kHidden));
      } else {
        layer.mlp = mlp(spec.intermediate_size);
      }
      weights.layers.push_back(std::move(layer));
    }
    return weights;
  }

  bool wanted(const std::string& name) const { return name.find(only_) != std::string::npos; }

  int rotations(double bytes) const {
    return static_cast<int>(
        std::clamp(static_cast<double>(RandomWeights::kBytes) * 0.5 / bytes, 1.0, 64.0));
  }

  WeightView weight(WeightFormat format, std::int64_t rows, std::int64_t cols) {
    return weights_.next(format, rows, cols);
  }

  std::vector<ops::ExpertView> make_experts(WeightFormat format, std::int64_t experts) {
    std::vector<ops::ExpertView> views;
    views.reserve(static_cast<std::size_t>(experts));
    for (std::int64_t e = 0; e < experts; ++e) {
      views.push_back({weight(format, kExpert, kHidden), weight(format, kExpert, kHidden),
                       weight(format, kHidden, kExpert)});
    }
    return views;
  }

  Matrix random(std::int64_t rows, std::int64_t cols) {
    const Matrix matrix = ops::scratch_matrix(arena_, rows, cols);
    std::vector<float> values(static_cast<std::size_t>(rows * cols));
    for (float& v : values) v = static_cast<float>(static_cast<std::int32_t>(random_())) * 0x1p-31f;
    backend_.device().upload(values.data(), matrix.data, values.size() * sizeof(float));
    return matrix;
  }

  void fill_cache(ops::SequenceRows all, int layers, std::size_t layer) {
    const ops::ScratchScope scope(arena_);
    const std::int64_t piece = std::min<std::int64_t>(all.rows, 8192);
    const Matrix latents = random(piece, kMla.cache_width());
    for (int i = 0; i < layers; ++i) {
      for (std::int64_t at = 0; at < all.rows; at += piece) {
        ops::SequenceRows part = all;
        part.position = at;
        part.rows = std::min(piece, all.rows - at);
        part.kv.layer_offset = static_cast<std::size_t>(i) * layer;
        part.kv.scale = 0.01f;
        backend_.kv_append({&part, 1}, latents.slice(0, part.rows));
      }
    }
  }

  void time(const std::string& name, int rotate, double bytes, double flops,
            const std::function<void(int)>& call) {
    if (!wanted(name)) return;
    add(name, timer_.seconds_of(rotate, call), bytes, flops);
  }

  void add(const std::string& name, double seconds, double bytes, double flops) {
    results.push_back(
        {name, seconds, bytes, flops, std::max(bytes / read_rate_, flops / flop_rate_)});
  }

  double measure_reads() {
    const double seconds =
        read_seconds(plugin_, backend_.device(), timer_, weights_.memory(), RandomWeights::kBytes);
    results.push_back(
        {"read rate", seconds, static_cast<double>(RandomWeights::kBytes), 0.0, seconds});
    return static_cast<double>(RandomWeights::kBytes) / seconds;
  }

  double measure_products() {
    std::byte* sink = DeviceAccess::address(arena_.take(256));
    double flops = 0.0;
    const double seconds = timer_.seconds_of(1, [&](int) {
      ops::cuda_check(plugin_,
                      plugin_.multiply_loop(backend_.device().opened(), 2000, sink, &flops));
    });
    results.push_back({"mma.sync rate", seconds, 0.0, flops, seconds});
    return flops / seconds;
  }

  std::string only_;
  std::mt19937 random_{1};
  const ops::cuda::Plugin& plugin_;
  ops::CudaBackend backend_;
  CudaTimer timer_;
  RandomWeights weights_;
  memory::Arena arena_;
  double read_rate_ = 1.0;
  double flop_rate_ = 1.0;
};

constexpr WeightFormat kFormats[] = {WeightFormat::kNvfp4, WeightFormat::kMxfp4,
                                     WeightFormat::kFp8Block, WeightFormat::kBF16};

}  // namespace

std::vector<KernelTime> bench_cuda(int index, const std::string& only) {
  Bench bench(index, only);
  for (const WeightFormat format : kFormats) bench.linear(format, 18432, kHidden, 1);
  for (const WeightFormat format : kFormats) bench.linear(format, kHidden, 16384, 1);
  for (const std::int64_t tokens : {2, 4, 8, 16, 32, 64, 512, 4096}) {
    bench.linear(WeightFormat::kNvfp4, 18432, kHidden, tokens);
  }
  for (const WeightFormat format : kFormats) bench.linear(format, kHidden, kHidden, 4096);
  for (const WeightFormat format : {WeightFormat::kNvfp4, WeightFormat::kMxfp4}) {
    bench.moe(format, 1, 64);
    for (const std::int64_t tokens : {4, 32, 512, 4096}) bench.moe(format, tokens, 256);
  }
  for (const ops::KvFormat format : {ops::KvFormat::kBf16, ops::KvFormat::kFp8}) {
    bench.attention(format, 4096, 1, true);
    bench.attention(format, 32768, 8, true);
    bench.attention(format, 131072, 1, true);
  }
  bench.attention(ops::KvFormat::kBf16, 4096, 1, false);
  bench.model(4, 4000);
  return std::move(bench.results);
}

}  // namespace dsfp4::engine
