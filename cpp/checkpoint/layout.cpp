#include "checkpoint/layout.h"

#include <initializer_list>
#include <utility>

#include "base/checked.h"
#include "checkpoint/safetensors.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

using format::DType;
using format::WeightFormat;
using Shape = std::vector<std::int64_t>;

[[noreturn]] void fail(const Catalogue& catalogue, const TensorInfo& tensor,
                       const std::string& problem) {
  throw CheckpointError(catalogue.file_name(tensor), tensor.name,
                        static_cast<std::int64_t>(tensor.offset), problem);
}

std::string type_text(DType dtype, const Shape& shape) {
  return std::string(format::dtype_name(dtype)) + " " + shape_text(shape);
}

// `tensor` must have one of the dtypes, and the shape.
void check(const Catalogue& catalogue, const TensorInfo& tensor,
           std::initializer_list<DType> dtypes, const Shape& shape) {
  std::string expected;
  for (const DType dtype : dtypes) {
    if (tensor.dtype == dtype && tensor.shape == shape) return;
    expected += (expected.empty() ? "" : " or ") + type_text(dtype, shape);
  }
  fail(catalogue, tensor,
       "is " + type_text(tensor.dtype, tensor.shape) + "; it must be " + expected);
}

const TensorInfo* require_scalar(const Catalogue& catalogue, const std::string& name) {
  const TensorInfo& tensor = catalogue.require(name);
  const bool scalar = tensor.shape.empty() || tensor.shape == Shape{1};
  if (!scalar || (tensor.dtype != DType::kF32 && tensor.dtype != DType::kBF16)) {
    fail(catalogue, tensor,
         "is " + type_text(tensor.dtype, tensor.shape) + "; it must be F32 or BF16, [] or [1]");
  }
  return &tensor;
}

WeightSource resolve_nvfp4(const Catalogue& catalogue, const std::string& module,
                           const TensorInfo& packed, std::int64_t rows, std::int64_t cols) {
  if (cols % format::kNvfp4Group != 0) {
    fail(catalogue, packed,
         "is U8, so NVFP4, but " + std::to_string(cols) + " columns are not a multiple of 16");
  }
  check(catalogue, packed, {DType::kU8}, {rows, cols / 2});
  WeightSource source;
  source.format = WeightFormat::kNvfp4;
  source.rows = rows;
  source.cols = cols;
  source.data = &packed;
  source.scales = &catalogue.require(module + ".weight_scale");
  check(catalogue, *source.scales, {DType::kF8E4M3}, {rows, cols / format::kNvfp4Group});
  source.global_scale_is_reciprocal = packed.name.ends_with("_packed");
  source.global_scale = require_scalar(
      catalogue,
      module + (source.global_scale_is_reciprocal ? ".weight_global_scale" : ".weight_scale_2"));
  return source;
}

WeightSource resolve_fp8(const Catalogue& catalogue, const std::string& module,
                         const TensorInfo& weight, std::int64_t rows, std::int64_t cols) {
  check(catalogue, weight, {DType::kF8E4M3}, {rows, cols});
  const TensorInfo& scales = catalogue.require(module + ".weight_scale_inv");
  check(catalogue, scales, {DType::kF32},
        {ceil_div(rows, format::kFp8Tile), ceil_div(cols, format::kFp8Tile)});
  return {WeightFormat::kFp8Block, rows, cols, &weight, &scales, nullptr, false};
}

// A matrix that is never quantised: F32 or BF16.
WeightSource resolve_plain(const Catalogue& catalogue, const TensorInfo& weight, std::int64_t rows,
                           std::int64_t cols) {
  check(catalogue, weight, {DType::kBF16, DType::kF32}, {rows, cols});
  const WeightFormat format =
      weight.dtype == DType::kF32 ? WeightFormat::kF32 : WeightFormat::kBF16;
  return {format, rows, cols, &weight, nullptr, nullptr, false};
}

const TensorInfo* resolve_vector(const Catalogue& catalogue, const std::string& name,
                                 std::int64_t length) {
  const TensorInfo& tensor = catalogue.require(name);
  check(catalogue, tensor, {DType::kBF16, DType::kF32}, {length});
  return &tensor;
}

MlpSource resolve_mlp(const Catalogue& catalogue, const std::string& prefix, std::int64_t hidden,
                      std::int64_t width) {
  return {resolve_weight(catalogue, prefix + ".gate_proj", width, hidden),
          resolve_weight(catalogue, prefix + ".up_proj", width, hidden),
          resolve_weight(catalogue, prefix + ".down_proj", hidden, width)};
}

AttentionSource resolve_attention(const Catalogue& catalogue, const std::string& prefix,
                                  const ModelConfig& config) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t heads = config.num_attention_heads;
  const std::int64_t q_rows = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim);
  AttentionSource source;
  if (config.q_lora_rank == 0) {
    source.q_proj = resolve_weight(catalogue, prefix + ".q_proj", q_rows, hidden);
  } else {
    source.q_a_proj = resolve_weight(catalogue, prefix + ".q_a_proj", config.q_lora_rank, hidden);
    source.q_a_layernorm =
        resolve_vector(catalogue, prefix + ".q_a_layernorm.weight", config.q_lora_rank);
    source.q_b_proj = resolve_weight(catalogue, prefix + ".q_b_proj", q_rows, config.q_lora_rank);
  }
  source.kv_a_proj_with_mqa = resolve_weight(catalogue, prefix + ".kv_a_proj_with_mqa",
                                             config.kv_lora_rank + config.qk_rope_head_dim, hidden);
  source.kv_a_layernorm =
      resolve_vector(catalogue, prefix + ".kv_a_layernorm.weight", config.kv_lora_rank);
  source.kv_b_proj =
      resolve_weight(catalogue, prefix + ".kv_b_proj",
                     heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank);
  source.o_proj = resolve_weight(catalogue, prefix + ".o_proj", hidden, heads * config.v_head_dim);
  const std::string k_scale = prefix + ".k_proj.k_scale";
  if (catalogue.find(k_scale) != nullptr) source.k_scale = require_scalar(catalogue, k_scale);
  return source;
}

void resolve_moe(const Catalogue& catalogue, const std::string& prefix, const ModelConfig& config,
                 LayerSource& layer) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t width = config.moe_intermediate_size;
  layer.gate = resolve_plain(catalogue, catalogue.require(prefix + ".gate.weight"),
                             config.n_routed_experts, hidden);
  if (config.topk_method == TopkMethod::kNoauxTc) {
    layer.e_score_correction_bias = resolve_vector(
        catalogue, prefix + ".gate.e_score_correction_bias", config.n_routed_experts);
  }
  layer.experts.reserve(static_cast<std::size_t>(config.n_routed_experts));
  for (std::int64_t expert = 0; expert < config.n_routed_experts; ++expert) {
    layer.experts.push_back(
        resolve_mlp(catalogue, prefix + ".experts." + std::to_string(expert), hidden, width));
  }
  if (config.n_shared_experts > 0) {
    layer.shared_experts =
        resolve_mlp(catalogue, prefix + ".shared_experts", hidden, width * config.n_shared_experts);
  }
}

LayerSource resolve_layer(const Catalogue& catalogue, std::int64_t index,
                          const ModelConfig& config) {
  const std::string prefix = "model.layers." + std::to_string(index);
  LayerSource layer;
  layer.input_layernorm =
      resolve_vector(catalogue, prefix + ".input_layernorm.weight", config.hidden_size);
  layer.post_attention_layernorm =
      resolve_vector(catalogue, prefix + ".post_attention_layernorm.weight", config.hidden_size);
  layer.self_attn = resolve_attention(catalogue, prefix + ".self_attn", config);
  if (config.is_moe_layer(index)) {
    resolve_moe(catalogue, prefix + ".mlp", config, layer);
  } else {
    layer.mlp =
        resolve_mlp(catalogue, prefix + ".mlp", config.hidden_size, config.intermediate_size);
  }
  return layer;
}

}  // namespace

std::uint64_t WeightSource::bytes() const {
  return (data == nullptr ? 0 : data->bytes) + (scales == nullptr ? 0 : scales->bytes);
}

WeightSource resolve_weight(const Catalogue& catalogue, const std::string& module,
                            std::int64_t rows, std::int64_t cols) {
  const std::string packed_name = module + ".weight_packed";
  const TensorInfo* weight = catalogue.find(module + ".weight");
  const TensorInfo* packed = catalogue.find(packed_name);
  if (weight != nullptr && packed != nullptr) {
    fail(catalogue, *packed, "the same matrix is there as '" + weight->name + "' too");
  }
  if (packed == nullptr && catalogue.in_absent_shard(packed_name)) catalogue.require(packed_name);
  if (packed == nullptr && weight == nullptr) catalogue.require(module + ".weight");
  if (packed != nullptr) return resolve_nvfp4(catalogue, module, *packed, rows, cols);
  switch (weight->dtype) {
    case DType::kU8:
      return resolve_nvfp4(catalogue, module, *weight, rows, cols);
    case DType::kF8E4M3:
      return resolve_fp8(catalogue, module, *weight, rows, cols);
    case DType::kBF16:
    case DType::kF32:
      return resolve_plain(catalogue, *weight, rows, cols);
    default:
      fail(catalogue, *weight,
           "is " + type_text(weight->dtype, weight->shape) +
               "; a weight must be NVFP4 (U8), FP8 (F8_E4M3), BF16 or F32");
  }
}

ModelLayout resolve_layout(const Catalogue& catalogue, const ModelConfig& config) {
  ModelLayout layout;
  layout.embed_tokens = resolve_plain(catalogue, catalogue.require("model.embed_tokens.weight"),
                                      config.vocab_size, config.hidden_size);
  for (std::int64_t i = 0; i < config.num_hidden_layers; ++i) {
    layout.layers.push_back(resolve_layer(catalogue, i, config));
  }
  layout.norm = resolve_vector(catalogue, "model.norm.weight", config.hidden_size);
  layout.lm_head =
      config.tie_word_embeddings
          ? layout.embed_tokens
          : resolve_weight(catalogue, "lm_head", config.vocab_size, config.hidden_size);
  return layout;
}

}  // namespace dsfp4::checkpoint
