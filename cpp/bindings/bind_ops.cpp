// Single ops on arrays, backend selectable: what dsfp4.ops.layers builds on. For tests.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/expert_tasks.h"
#include "bindings/gil.h"
#include "dsfp4/error.h"
#include "engine/kv_cache.h"
#include "engine/sampler.h"
#include "format/block.h"
#include "model/layers.h"
#include "ops/ops.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;
using format::EncodedMatrix;
using format::WeightFormat;
using Floats = ConstArray<float>;
using Bytes = ConstArray<std::uint8_t>;

/// A float matrix that owns its values and becomes the array that is returned.
struct Result {
  Result(std::int64_t row_count, std::int64_t col_count)
      : values(static_cast<std::size_t>(row_count * col_count)), rows(row_count), cols(col_count) {}

  ops::Matrix view() { return {values.data(), rows, cols, cols}; }
  nb::object array() {
    return own_array(std::move(values),
                     {static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)});
  }

  std::vector<float> values;
  std::int64_t rows, cols;
};

ops::ConstMatrix matrix_of(const Floats& array, const char* parameter) {
  require(array.ndim() == 2, parameter, "must be two-dimensional");
  const auto rows = static_cast<std::int64_t>(array.shape(0));
  const auto cols = static_cast<std::int64_t>(array.shape(1));
  return {array.data(), rows, cols, cols};
}

Result copy_of(const Floats& array, const char* parameter) {
  const ops::ConstMatrix x = matrix_of(array, parameter);
  Result copy(x.rows, x.cols);
  std::copy_n(array.data(), array.size(), copy.values.data());
  return copy;
}

template <typename T>
std::vector<std::byte> bytes_of(const ConstArray<T>& array) {
  const auto* begin = reinterpret_cast<const std::byte*>(array.data());
  return {begin, begin + array.size() * sizeof(T)};
}

EncodedMatrix weight(const std::string& format, std::int64_t rows, std::int64_t cols,
                     const Bytes& data, const Bytes& scales, float global_scale) {
  for (const WeightFormat candidate :
       {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kFp8Block, WeightFormat::kNvfp4,
        WeightFormat::kMxfp4}) {
    if (format::weight_format_name(candidate) != format) continue;
    require(rows >= 0 && cols >= 0, "shape", "must not be negative");
    require(data.size() == format::data_bytes(candidate, rows, cols), "data",
            "has not the size of a " + format + " matrix of this shape");
    require(scales.size() == format::scale_bytes(candidate, rows, cols), "scales",
            "have not the size of a " + format + " matrix of this shape");
    return {candidate, rows, cols, bytes_of(data), bytes_of(scales), global_scale};
  }
  throw ParameterError("format", "'" + format + "' is not one of f32, bf16, fp8, nvfp4, mxfp4");
}

/// One backend, for the ops below.
class PyBackend {
 public:
  PyBackend(const std::string& device, int threads) {
    require(threads >= 1 && threads <= 1024, "threads",
            "must be 1 to 1024, not " + std::to_string(threads));
    if (device == "cpu") {
      ops_ = ops::make_cpu_ops(threads);
    } else if (device == "reference") {
      ops_ = ops::make_reference_ops(threads);
    } else {
      throw ParameterError("device", "'" + device + "' is not one of cpu, reference");
    }
  }

  nb::object linear(const EncodedMatrix& w, const Floats& x_array, bool exact_inputs) {
    const ops::ConstMatrix x = matrix_of(x_array, "x");
    require(x.cols == w.cols, "x", "must have as many columns as the weight");
    Result y(x.rows, w.rows);
    {
      const ReleasedGil released;
      ops_->linear(w.view(), x, y.view(), ops::Phase::kDecode,
                   exact_inputs ? ops::Inputs::kF32 : ops::Inputs::kBf16);
    }
    return y.array();
  }

  nb::object embed(const EncodedMatrix& table, const ConstArray<std::int32_t>& ids) {
    Result out(static_cast<std::int64_t>(ids.size()), table.cols);
    ops_->embed(table.view(), {ids.data(), ids.size()}, out.view());
    return out.array();
  }

  nb::object rms_norm(const Floats& x_array, const Floats& weight, float eps) {
    const ops::ConstMatrix x = matrix_of(x_array, "x");
    require(weight.size() == static_cast<std::size_t>(x.cols), "weight",
            "must have one value a column of x");
    Result y(x.rows, x.cols);
    ops_->rms_norm(x, {weight.data(), weight.size()}, eps, y.view());
    return y.array();
  }

  nb::object silu_mul(const Floats& gate_array, const Floats& up_array) {
    const ops::ConstMatrix up = matrix_of(up_array, "up");
    Result gate = copy_of(gate_array, "gate");
    require(gate.rows == up.rows && gate.cols == up.cols, "up", "must have gate's shape");
    ops_->silu_mul(gate.view(), up);
    return gate.array();
  }

  nb::object rope(const Floats& x_array, std::int64_t heads, const Floats& cos_sin_array) {
    Result x = copy_of(x_array, "x");
    const ops::ConstMatrix cos_sin = matrix_of(cos_sin_array, "cos_sin");
    require(heads >= 1 && x.cols % heads == 0, "heads", "must divide the columns of x");
    require(cos_sin.rows == x.rows && cos_sin.cols == x.cols / heads && cos_sin.cols % 2 == 0,
            "cos_sin", "must be [rows of x, dims of a head], dims even");
    ops_->rope(x.view(), heads, x.cols / heads, cos_sin);
    return x.array();
  }

  nb::tuple route(const ops::RouterSpec& spec, const Floats& logits_array, const Floats& bias,
                  const ConstArray<std::int32_t>& forced) {
    const ops::ConstMatrix logits = matrix_of(logits_array, "logits");
    require(spec.top_k >= 1 && spec.top_k <= logits.cols, "top_k",
            "must be between 1 and the number of experts");
    const auto rows = static_cast<std::size_t>(logits.rows);
    const auto k = static_cast<std::size_t>(spec.top_k);
    require(forced.size() == 0 || forced.size() == rows * k, "experts", "must be [rows, top_k]");
    std::vector<std::int32_t> own(rows * k);
    std::vector<std::int32_t> used(rows * k);
    std::vector<float> weights(rows * k);
    ops_->route(spec, logits, {bias.data(), bias.size()}, {forced.data(), forced.size()},
                {own, used, weights});
    return nb::make_tuple(own_array(std::move(own), {rows, k}),
                          own_array(std::move(weights), {rows, k}));
  }

  /// The routed part of an MoE layer.
  nb::object moe(const std::vector<nb::handle>& expert_weights, const Floats& x_array,
                 const ConstArray<std::int32_t>& chosen, const Floats& weights, bool decode) {
    const ops::ConstMatrix x = matrix_of(x_array, "x");
    std::vector<ops::WeightView> matrices;
    matrices.reserve(expert_weights.size());
    for (const nb::handle weight : expert_weights) {
      matrices.push_back(nb::cast<const EncodedMatrix&>(weight).view());
    }
    const ExpertTasks given(matrices, x, chosen, weights);
    Result hidden(x.rows * given.top_k, given.experts.front().gate_proj.rows);
    Result routed(x.rows * given.top_k, x.cols);
    Result y(x.rows, x.cols);
    {
      const ReleasedGil released;
      const std::span<const float> mixing(weights.data(), weights.size());
      if (decode) {
        ops_->experts(given.tasks, given.top_k, x, hidden.view(), routed.view(),
                      ops::Phase::kDecode);
        ops_->combine(routed.view(), mixing, given.top_k, y.view());
      } else {
        ops_->add_experts(given.tasks, mixing, given.top_k, x, hidden.view(), routed.view(),
                          y.view(), ops::Phase::kPrefill);
      }
    }
    return y.array();
  }

  /// Causal attention of the last rows[i] tokens of each sequence over its latents
  /// ([tokens, kv_lora_rank + rope], keys rotated already).
  nb::object mla_attention(const ops::MlaShape& shape, const EncodedMatrix& kv_b_proj,
                           const Floats& q_array, const std::vector<Floats>& latents,
                           const std::vector<std::int64_t>& rows, bool decode, bool fp8_cache) {
    const ops::ConstMatrix q = matrix_of(q_array, "q");
    require(latents.size() == rows.size() && !rows.empty(), "rows",
            "must have one entry a sequence");
    require(q.cols == shape.heads * shape.qk_head_dim(), "q",
            "must be [rows, heads * qk_head_dim]");
    require(kv_b_proj.rows == shape.heads * (shape.qk_nope_head_dim + shape.v_head_dim) &&
                kv_b_proj.cols == shape.kv_lora_rank,
            "kv_b_proj", "must be [heads * (nope + v), kv_lora_rank]");
    std::int64_t tokens = 0;
    std::int64_t total_rows = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const ops::ConstMatrix cached = matrix_of(latents[i], "latents");
      require(cached.cols == shape.cache_width(), "latents", "must be [tokens, kv_lora + rope]");
      require(rows[i] >= 1 && rows[i] <= cached.rows, "rows", "must be 1 to the tokens cached");
      tokens += cached.rows + ops::kKvBlockTokens;
      total_rows += rows[i];
    }
    require(total_rows == q.rows, "rows", "must add up to the rows of q");
    const ops::KvFormat kv_format = fp8_cache ? ops::KvFormat::kFp8 : ops_->default_kv_format();
    engine::KvCache cache(tokens, 1,
                          static_cast<std::size_t>(ops::kKvBlockTokens * shape.cache_width()) *
                              ops::kv_value_bytes(kv_format),
                          kv_format);
    std::vector<std::unique_ptr<engine::Sequence>> sequences;
    std::vector<ops::SequenceRows> batch;
    std::int64_t first_row = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const ops::ConstMatrix cached = matrix_of(latents[i], "latents");
      sequences.push_back(std::make_unique<engine::Sequence>(cache));
      const ops::SequenceRows all = sequences.back()->next_rows(0, cached.rows);
      ops_->kv_append({&all, 1}, cached);
      batch.push_back({first_row, rows[i], cached.rows - rows[i], all.kv});
      first_row += rows[i];
    }
    Result out(q.rows, shape.heads * shape.v_head_dim);
    Result q_abs(q.rows, shape.heads * shape.kv_lora_rank);
    Result attended(q.rows, shape.heads * shape.kv_lora_rank);
    {
      const ReleasedGil released;
      if (decode) {
        ops_->absorb_query(shape, kv_b_proj.view(), q, q_abs.view());
        ops_->latent_attention(shape, batch, q_abs.view(), q, attended.view());
        ops_->expand_value(shape, kv_b_proj.view(), attended.view(), out.view());
      } else {
        ops_->prefill_attention(shape, kv_b_proj.view(), batch, q, out.view());
      }
    }
    return out.array();
  }

 private:
  std::unique_ptr<ops::Ops> ops_;
};

// Bounded so that no product of two of them overflows.
void check_shape(const ops::MlaShape& shape) {
  const auto check = [](std::int64_t value, const char* parameter) {
    require(value >= 1 && value <= std::int64_t{1} << 20, parameter,
            "must be 1 to 2^20, not " + std::to_string(value));
  };
  check(shape.heads, "heads");
  check(shape.kv_lora_rank, "kv_lora_rank");
  check(shape.qk_nope_head_dim, "qk_nope_head_dim");
  check(shape.qk_rope_head_dim, "qk_rope_head_dim");
  check(shape.v_head_dim, "v_head_dim");
}

ops::RouterSpec router_spec(std::int64_t experts, std::int64_t top_k, std::int64_t groups,
                            std::int64_t kept_groups, const std::string& scoring,
                            const std::string& group_score, bool normalize, float scaling_factor) {
  require(scoring == "softmax" || scoring == "sigmoid", "scoring", "must be softmax or sigmoid");
  require(group_score == "max" || group_score == "top2", "group_score", "must be max or top2");
  return {experts,
          top_k,
          groups,
          kept_groups,
          scoring == "softmax" ? ops::RouterSpec::Scoring::kSoftmax
                               : ops::RouterSpec::Scoring::kSigmoid,
          group_score == "max" ? ops::RouterSpec::GroupScore::kMax
                               : ops::RouterSpec::GroupScore::kSumOfTop2,
          normalize,
          scaling_factor};
}

nb::object sample(const Floats& logits, std::size_t count, double temperature, std::int64_t top_k,
                  double top_p, double min_p, double repetition_penalty,
                  std::vector<std::pair<std::int32_t, float>> logit_bias,
                  const std::vector<std::int32_t>& prompt, std::uint64_t seed) {
  GenerateOptions options;
  options.temperature = temperature;
  options.top_k = top_k;
  options.top_p = top_p;
  options.min_p = min_p;
  options.repetition_penalty = repetition_penalty;
  options.logit_bias = std::move(logit_bias);
  const auto vocab = static_cast<std::int64_t>(logits.size());
  engine::check_options(options, vocab);
  for (const std::int32_t id : prompt) require(id >= 0 && id < vocab, "prompt", "has a bad id");
  std::vector<std::int32_t> ids(count);
  {
    const ReleasedGil released;
    for (std::size_t i = 0; i < count; ++i) {
      options.seed = seed + i;
      ids[i] = engine::Sampler(options, prompt, vocab).sample({logits.data(), logits.size()});
    }
  }
  return own_array(std::move(ids), {count});
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("sample", &sample, nb::arg("logits"), nb::arg("count"), nb::arg("temperature"),
        nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("repetition_penalty"),
        nb::arg("logit_bias"), nb::arg("prompt"), nb::arg("seed"));
  nb::class_<EncodedMatrix>(m, "Weight", "A weight matrix in its stored format.")
      .def_static("make", &weight, nb::arg("format"), nb::arg("rows"), nb::arg("cols"),
                  nb::arg("data"), nb::arg("scales"), nb::arg("global_scale") = 1.0f)
      .def_ro("rows", &EncodedMatrix::rows)
      .def_ro("cols", &EncodedMatrix::cols)
      .def_prop_ro("format", [](const EncodedMatrix& matrix) {
        return std::string(format::weight_format_name(matrix.format));
      });
  nb::class_<ops::RouterSpec>(m, "RouterSpec")
      .def_static("make", &router_spec, nb::arg("experts"), nb::arg("top_k"), nb::arg("groups") = 1,
                  nb::arg("kept_groups") = 1, nb::arg("scoring") = "softmax",
                  nb::arg("group_score") = "max", nb::arg("normalize") = false,
                  nb::arg("scaling_factor") = 1.0f);
  nb::class_<ops::MlaShape>(m, "MlaShape")
      .def(
          "__init__",
          [](ops::MlaShape* self, std::int64_t heads, std::int64_t kv_lora_rank,
             std::int64_t qk_nope_head_dim, std::int64_t qk_rope_head_dim, std::int64_t v_head_dim,
             float softmax_scale) {
            const ops::MlaShape shape{heads,      kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
                                      v_head_dim, softmax_scale};
            check_shape(shape);
            new (self) ops::MlaShape(shape);
          },
          nb::arg("heads"), nb::arg("kv_lora_rank"), nb::arg("qk_nope_head_dim"),
          nb::arg("qk_rope_head_dim"), nb::arg("v_head_dim"), nb::arg("softmax_scale"));
  nb::class_<PyBackend>(m, "Backend", "Computes single ops; see dsfp4.ops.")
      .def(nb::init<const std::string&, int>(), nb::arg("device"), nb::arg("threads") = 1)
      .def("linear", &PyBackend::linear, nb::arg("weight"), nb::arg("x"),
           nb::arg("exact_inputs") = false)
      .def("embed", &PyBackend::embed, nb::arg("table"), nb::arg("ids"))
      .def("rms_norm", &PyBackend::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"))
      .def("silu_mul", &PyBackend::silu_mul, nb::arg("gate"), nb::arg("up"))
      .def("rope", &PyBackend::rope, nb::arg("x"), nb::arg("heads"), nb::arg("cos_sin"))
      .def("route", &PyBackend::route, nb::arg("spec"), nb::arg("logits"), nb::arg("bias"),
           nb::arg("experts"))
      .def("moe", &PyBackend::moe, nb::arg("experts"), nb::arg("x"), nb::arg("chosen"),
           nb::arg("weights"), nb::arg("decode"))
      .def("mla_attention", &PyBackend::mla_attention, nb::arg("shape"), nb::arg("kv_b_proj"),
           nb::arg("q"), nb::arg("latents"), nb::arg("rows"), nb::arg("decode"),
           nb::arg("fp8_cache"));
}

}  // namespace dsfp4::bindings
