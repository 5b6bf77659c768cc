// dsfp4.Model's C++ side.
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "dsfp4/error.h"
#include "dsfp4/model.h"
#include "engine/planned.h"
#include "ops/cuda_plugin.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;

using Ids = ConstArray<std::int64_t>;
using TokenPairs = std::vector<std::pair<std::int32_t, float>>;
// The contents of pickles.
using TokenState = std::tuple<std::int32_t, float, TokenPairs>;
using ResultState = std::tuple<std::vector<std::int32_t>, std::vector<TokenLogprobs>, int,
                               std::int64_t, double, double>;

/// Python's hold on a model, which is destroyed without the GIL.
class Handle {
 public:
  explicit Handle(Model model) : model_(std::make_unique<Model>(std::move(model))) {}
  ~Handle() { destroy_without_gil(model_); }
  Handle(Handle&&) = default;
  Handle& operator=(Handle&&) = delete;

  Model& operator*() const noexcept { return *model_; }
  Model* operator->() const noexcept { return model_.get(); }

 private:
  std::unique_ptr<Model> model_;
};

std::vector<std::int32_t> ids_of(const Ids& ids) {
  if (ids.ndim() != 1) throw ParameterError("ids", "must be one-dimensional");
  std::vector<std::int32_t> narrow(ids.shape(0));
  for (std::size_t i = 0; i < narrow.size(); ++i) {
    narrow[i] = static_cast<std::int32_t>(ids.data()[i]);
    if (narrow[i] != ids.data()[i]) {
      throw ParameterError("ids", "token id " + std::to_string(ids.data()[i]) + " at position " +
                                      std::to_string(i) + " is outside every vocabulary");
    }
  }
  return narrow;
}

MemoryStrategy memory_strategy(std::optional<double> cpu_cache_size,
                               std::optional<double> prefetch_size,
                               std::optional<std::int64_t> max_experts,
                               std::optional<double> gpu_reserved,
                               std::optional<std::int64_t> max_gpu_layers = {},
                               std::optional<std::int64_t> min_layers = {}) {
  return {cpu_cache_size, prefetch_size, max_experts, gpu_reserved, max_gpu_layers, min_layers};
}

// GB/s; what is not known is left out.
nb::dict rates(const Rates& r) {
  nb::dict d;
  const auto put = [&](const char* name, double rate) {
    if (rate > 0.0) d[name] = rate * 1e-9;
  };
  put("ssd", r.ssd);
  put("host_experts", r.host_experts);
  put("copy_in", r.copy_in);
  put("copy_out", r.copy_out);
  put("both_host_experts", r.both_host_experts);
  put("both_copy_in", r.both_copy_in);
  return d;
}

nb::dict stats(const Handle& model) {
  ModelStats s;
  {
    const ReleasedGil released;
    s = model->stats();
  }
  nb::dict d;
  const auto put = [&](const char* name, auto value) { d[name] = value; };
  put("reserved_bytes", s.reserved_bytes);
  put("tiered", s.tiered);
  put("slots", s.slots);
  put("cache_slots", s.cache_slots);
  put("slot_bytes", s.slot_bytes);
  put("image_bytes", s.image_bytes);
  put("hits", s.hits);
  put("misses", s.misses);
  put("joined", s.joined);
  put("prefetched", s.prefetched);
  put("evictions", s.evictions);
  put("prefetched_bytes", s.prefetched_bytes);
  put("demand_bytes", s.demand_bytes);
  put("speculative_bytes", s.speculative_bytes);
  put("wasted_bytes", s.wasted_bytes);
  put("used_bytes", s.used_bytes);
  put("skipped_pairs", s.skipped_pairs);
  put("total_pairs", s.total_pairs);
  put("predicted", s.predicted);
  put("predicted_used", s.predicted_used);
  put("predictable", s.predictable);
  put("wait_seconds", s.wait_seconds);
  put("expert_seconds", s.expert_seconds);
  put("streamed_layers", s.streamed_layers);
  put("streamed_bytes", s.streamed_bytes);
  put("stream_wait_seconds", s.stream_wait_seconds);
  put("reads", s.reads);
  put("read_bytes", s.read_bytes);
  put("read_retries", s.read_retries);
  put("read_stalls", s.read_stalls);
  put("reads_in_flight", s.reads_in_flight);
  put("ssd_busy_seconds", s.ssd_busy_seconds);
  put("device_slots", s.device_slots);
  put("device_cache_slots", s.device_cache_slots);
  put("device_slot_bytes", s.device_slot_bytes);
  put("device_hits", s.device_hits);
  put("uploads", s.uploads);
  put("uploaded_bytes", s.uploaded_bytes);
  put("device_evictions", s.device_evictions);
  put("device_returns", s.device_returns);
  put("uploads_ahead", s.uploads_ahead);
  put("uploads_ahead_used", s.uploads_ahead_used);
  put("cpu_bytes", s.cpu_bytes);
  put("cpu_seconds", s.cpu_seconds);
  put("layer_upload_bytes", s.layer_upload_bytes);
  put("layer_upload_wait_seconds", s.layer_upload_wait_seconds);
  put("rates", rates(s.rates));
  return d;
}

Handle load(const std::string& path, const std::string& device, int threads,
            std::int64_t max_context, const std::string& kv_cache_dtype, double memory_limit,
            std::uint64_t ram_limit, const std::optional<nb::callable>& progress,
            std::optional<std::int64_t> prefetch_layers, double expert_threshold,
            std::optional<double> cpu_share, std::optional<double> cpu_cache_size,
            std::optional<double> prefetch_size, std::optional<std::int64_t> max_experts,
            std::optional<double> gpu_reserved, const std::string& cache_policy,
            const std::string& warm_start_folder, const std::string& reader, bool direct_reads,
            const std::string& trace_file, std::uint64_t ssd_rate,
            std::optional<std::map<std::string, std::string>> quantization,
            std::optional<std::int64_t> max_gpu_layers, std::optional<std::int64_t> min_layers) {
  LoadOptions options;
  options.quantization = std::move(quantization);
  options.device = device;
  options.threads = threads;
  options.max_context = max_context;
  options.kv_cache_dtype = kv_cache_dtype;
  options.memory_limit = memory_limit;
  options.memory = {prefetch_layers, expert_threshold, cpu_share};
  options.strategy = memory_strategy(cpu_cache_size, prefetch_size, max_experts, gpu_reserved,
                                     max_gpu_layers, min_layers);
  options.cache_policy = cache_policy;
  options.warm_start_folder = warm_start_folder;
  options.reader = reader;
  options.direct_reads = direct_reads;
  options.ssd_rate = ssd_rate;
  options.trace_file = trace_file;
  options.ram_limit = ram_limit;
  if (progress) {
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
      const nb::gil_scoped_acquire gil;
      (*progress)(done, total);
    };
  }
  options.keep_going = keep_going();
  const ReleasedGil released;
  return Handle(Model::load(path, options));
}

// Results that are not asked for have no rows. Logits go to `on_logits` if there is one.
nb::tuple forward(const Handle& handle, const Ids& ids,
                  const std::optional<ConstArray<std::int32_t>>& experts, bool decode,
                  bool return_logits, bool return_router_logits,
                  const std::optional<nb::callable>& on_logits, std::uint64_t ram_limit) {
  Model& model = *handle;
  const std::vector<std::int32_t> tokens = ids_of(ids);
  const auto count = static_cast<std::int64_t>(tokens.size());
  if (count > model.max_context()) throw ContextLengthError(count, model.max_context());
  const auto vocab = static_cast<std::size_t>(model.vocab_size());
  const auto layers = static_cast<std::size_t>(model.moe_layers());
  const auto top_k = static_cast<std::size_t>(model.num_experts_per_tok());
  const auto width = static_cast<std::size_t>(model.num_experts());
  const std::size_t rows = return_logits && !on_logits ? tokens.size() : 0;
  const std::size_t router_layers = return_router_logits ? layers : 0;
  const std::size_t values_per_token = layers * top_k + router_layers * width;
  const std::uint64_t bytes = sizeof(float) * (rows * vocab + tokens.size() * values_per_token);
  {
    const ReleasedGil released;
    engine::check_result(bytes, ram_limit,
                         memory::ram_account().committed(memory::machine_memory()));
  }
  std::vector<float> logits(rows * vocab);
  std::vector<std::int32_t> chosen(layers * tokens.size() * top_k);
  std::vector<float> routers(router_layers * tokens.size() * width);
  ForwardOptions options;
  options.chosen_experts = chosen;
  options.router_logits = routers;
  options.decode = decode;
  options.keep_going = keep_going();
  if (on_logits) {
    options.on_logits = [&](std::int64_t first, std::span<const float> window) {
      const nb::gil_scoped_acquire gil;
      (*on_logits)(first, own_array(std::vector<float>(window.begin(), window.end()),
                                    {window.size() / vocab, vocab}));
    };
  }
  if (experts) {
    if (experts->ndim() != 3 || experts->shape(0) != layers || experts->shape(1) != tokens.size() ||
        experts->shape(2) != top_k) {
      throw ParameterError("experts", "must have shape [" + std::to_string(layers) + ", " +
                                          std::to_string(tokens.size()) + ", " +
                                          std::to_string(top_k) +
                                          "]: [moe_layers, tokens, num_experts_per_tok]");
    }
    options.forced_experts = {experts->data(), experts->size()};
  }
  {
    const ReleasedGil released;
    model.forward(tokens, logits, options);
  }
  return nb::make_tuple(own_array(std::move(logits), {rows, vocab}),
                        own_array(std::move(chosen), {layers, tokens.size(), top_k}),
                        own_array(std::move(routers), {router_layers, tokens.size(), width}));
}

std::vector<double> token_seconds(const Handle& model, const Ids& ids, bool routed_experts) {
  using Clock = std::chrono::steady_clock;
  const std::vector<std::int32_t> tokens = ids_of(ids);
  std::vector<double> seconds;
  seconds.reserve(tokens.size());
  ForwardOptions options;
  options.decode = true;
  options.routed_experts = routed_experts;
  options.keep_going = keep_going();
  const ReleasedGil released;
  auto start = Clock::now();
  options.on_logits = [&](std::int64_t, std::span<const float>) {
    const auto end = Clock::now();
    seconds.push_back(std::chrono::duration<double>(end - start).count());
    start = end;
  };
  model->forward(tokens, {}, options);
  return seconds;
}

GenerationResult generate(const Handle& model, const Ids& ids, std::int64_t max_tokens,
                          double temperature, std::int64_t top_k, double top_p, double min_p,
                          double repetition_penalty,
                          std::vector<std::pair<std::int32_t, float>> logit_bias, int logprobs,
                          std::uint64_t seed, std::optional<std::vector<std::int32_t>> stop_ids,
                          const std::optional<nb::callable>& on_token,
                          const std::optional<nb::callable>& on_prefill) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.temperature = temperature;
  options.top_k = top_k;
  options.top_p = top_p;
  options.min_p = min_p;
  options.repetition_penalty = repetition_penalty;
  options.logit_bias = std::move(logit_bias);
  options.logprobs = logprobs;
  options.seed = seed;
  options.stop_ids = std::move(stop_ids);
  const std::vector<std::int32_t> prompt = ids_of(ids);
  options.keep_going = keep_going();
  const auto call = [](const nb::callable& callback, auto... arguments) {
    const nb::gil_scoped_acquire gil;
    const nb::object answer = callback(arguments...);
    const int go_on = answer.is_none() ? 1 : PyObject_IsTrue(answer.ptr());
    if (go_on < 0) throw nb::python_error();
    return go_on != 0;
  };
  if (on_prefill) {
    options.on_prefill = [&](std::int64_t done, std::int64_t total) {
      return call(*on_prefill, done, total);
    };
  }
  TokenCallback token_callback;
  if (on_token) token_callback = [&](std::int32_t token) { return call(*on_token, token); };
  const ReleasedGil released;
  return model->generate(prompt, options, token_callback);
}

std::optional<std::string> cuda_problem() {
  try {
    ops::cuda_device(0);
  } catch (const CudaError& error) {
    return error.what();
  }
  return std::nullopt;
}

template <auto Getter>
auto get(const Handle& model) {
  return ((*model).*Getter)();
}

const char* finish_reason(const GenerationResult& result) {
  switch (result.finish_reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "";
}

TokenPairs top_of(const TokenLogprobs& logprobs) {
  TokenPairs top;
  top.reserve(logprobs.top.size());
  for (const TokenLogprob& one : logprobs.top) top.emplace_back(one.id, one.logprob);
  return top;
}

}  // namespace

void bind_model(nb::module_& m) {
  m.def("cuda_problem", &cuda_problem,
        "Why device 'cuda' cannot be used here, in one sentence; None if it can.");
  nb::class_<TokenLogprobs>(m, "TokenLogprobs", "Natural logarithms of probabilities of a token.")
      .def_prop_ro("id", [](const TokenLogprobs& t) { return t.chosen.id; })
      .def_prop_ro("logprob", [](const TokenLogprobs& t) { return t.chosen.logprob; })
      .def_prop_ro("top", &top_of, "(id, logprob) of the likeliest tokens, best first.")
      .def("__getstate__",
           [](const TokenLogprobs& t) {
             return TokenState(t.chosen.id, t.chosen.logprob, top_of(t));
           })
      .def("__setstate__", [](TokenLogprobs& t, const TokenState& state) {
        const auto& [id, logprob, top] = state;
        new (&t) TokenLogprobs{{id, logprob}, {}};
        for (const auto& [other, its_logprob] : top) t.top.push_back({other, its_logprob});
      });

  nb::class_<GenerationResult>(m, "GenerationResult",
                               "What a generation gave. Times are in seconds.")
      .def_ro("tokens", &GenerationResult::tokens, "Generated ids, without the stop token.")
      .def_ro("logprobs", &GenerationResult::logprobs, "One a token, if they were asked for.")
      .def_prop_ro("finish_reason", &finish_reason, "'stop', 'length' or 'cancelled'.")
      .def_ro("prompt_tokens", &GenerationResult::prompt_tokens)
      .def_ro("prefill_seconds", &GenerationResult::prefill_seconds)
      .def_ro("decode_seconds", &GenerationResult::decode_seconds)
      .def("__getstate__",
           [](const GenerationResult& r) {
             return ResultState(r.tokens, r.logprobs, static_cast<int>(r.finish_reason),
                                r.prompt_tokens, r.prefill_seconds, r.decode_seconds);
           })
      .def("__setstate__", [](GenerationResult& r, const ResultState& state) {
        const auto& [tokens, logprobs, reason, prompt_tokens, prefill, decode] = state;
        new (&r) GenerationResult{.tokens = tokens,
                                  .logprobs = logprobs,
                                  .finish_reason = static_cast<FinishReason>(reason),
                                  .prompt_tokens = prompt_tokens,
                                  .prefill_seconds = prefill,
                                  .decode_seconds = decode};
      });

  nb::class_<Handle>(m, "Model", "A loaded checkpoint; see dsfp4.Model.")
      .def(nb::new_(&load), nb::arg("path"), nb::arg("device") = "cpu", nb::arg("threads") = 0,
           nb::arg("max_context") = 0, nb::arg("kv_cache_dtype") = "bf16",
           nb::arg("memory_limit") = 0.0, nb::arg("ram_limit") = 0,
           nb::arg("progress") = nb::none(), nb::arg("prefetch_layers") = nb::none(),
           nb::arg("expert_threshold") = 0.0, nb::arg("cpu_share") = nb::none(),
           nb::arg("cpu_cache_size") = nb::none(), nb::arg("prefetch_size") = nb::none(),
           nb::arg("max_experts") = nb::none(), nb::arg("gpu_reserved") = nb::none(),
           nb::arg("cache_policy") = "default", nb::arg("warm_start_folder") = "",
           nb::arg("reader") = "auto", nb::arg("direct_reads") = true, nb::arg("trace_file") = "",
           nb::arg("ssd_rate") = 0, nb::arg("quantization") = nb::none(),
           nb::arg("max_gpu_layers") = nb::none(), nb::arg("min_layers") = nb::none())
      .def(
          "set_memory_config",
          [](const Handle& model, std::optional<std::int64_t> prefetch_layers,
             double expert_threshold, std::optional<double> cpu_share) {
            const KeepGoing go_on = keep_going();
            const ReleasedGil released;
            model->set_memory_config({prefetch_layers, expert_threshold, cpu_share}, go_on);
          },
          nb::arg("prefetch_layers").none(), nb::arg("expert_threshold"),
          nb::arg("cpu_share").none())
      .def(
          "set_compute_streams",
          [](const Handle& model, bool prefetch, bool compute, bool transfer) {
            const KeepGoing go_on = keep_going();
            const ReleasedGil released;
            model->set_compute_streams({prefetch, compute, transfer}, go_on);
          },
          nb::arg("prefetch"), nb::arg("compute"), nb::arg("transfer"))
      .def(
          "set_memory_strategy",
          [](const Handle& model, std::optional<double> cpu_cache_size,
             std::optional<double> prefetch_size, std::optional<std::int64_t> max_experts,
             std::optional<double> gpu_reserved) {
            const KeepGoing go_on = keep_going();
            const ReleasedGil released;
            model->set_memory_strategy(
                memory_strategy(cpu_cache_size, prefetch_size, max_experts, gpu_reserved), go_on);
          },
          nb::arg("cpu_cache_size") = nb::none(), nb::arg("prefetch_size") = nb::none(),
          nb::arg("max_experts") = nb::none(), nb::arg("gpu_reserved") = nb::none())
      .def("stats", &stats)
      .def_prop_ro("vocab_size", get<&Model::vocab_size>)
      .def_prop_ro("moe_layers", get<&Model::moe_layers>)
      .def_prop_ro("num_experts_per_tok", get<&Model::num_experts_per_tok>)
      .def_prop_ro("num_experts", get<&Model::num_experts>)
      .def_prop_ro("max_context", get<&Model::max_context>, "Longest sequence, in tokens.")
      .def_prop_ro("weight_bytes", get<&Model::weight_bytes>)
      .def_prop_ro("device", get<&Model::device>)
      .def("forward", &forward, nb::arg("ids"), nb::arg("experts") = nb::none(),
           nb::arg("decode") = false, nb::arg("return_logits") = true,
           nb::arg("return_router_logits") = false, nb::arg("on_logits") = nb::none(),
           nb::arg("ram_limit") = 0)
      .def("token_seconds", &token_seconds, nb::arg("ids"), nb::arg("routed_experts"))
      .def("generate", &generate, nb::arg("ids"), nb::kw_only(), nb::arg("max_tokens") = 256,
           nb::arg("temperature") = 0.0, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0,
           nb::arg("min_p") = 0.0, nb::arg("repetition_penalty") = 1.0,
           nb::arg("logit_bias") = nb::list(), nb::arg("logprobs") = 0, nb::arg("seed") = 0,
           nb::arg("stop_ids") = nb::none(), nb::arg("on_token") = nb::none(),
           nb::arg("on_prefill") = nb::none());
}

}  // namespace dsfp4::bindings
