#include "checkpoint/published.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>

#include "dsfp4/error.h"
#include "format/dtype.h"
#include "format/weight.h"

namespace dsfp4::checkpoint {
namespace {

using format::DType;
using format::WeightFormat;
using Shape = std::vector<std::int64_t>;

// Formats by role; embedding, head, router and norms are BF16.
struct Formats {
  WeightFormat attention, o_proj, mlp, experts;  // mlp: shared experts, too
};
constexpr Formats kBf16{WeightFormat::kBF16, WeightFormat::kBF16, WeightFormat::kBF16,
                        WeightFormat::kBF16};
constexpr Formats kFp8{WeightFormat::kFp8Block, WeightFormat::kFp8Block, WeightFormat::kFp8Block,
                       WeightFormat::kFp8Block};
constexpr Formats kFp4{WeightFormat::kBF16, WeightFormat::kBF16, WeightFormat::kNvfp4,
                       WeightFormat::kNvfp4};
constexpr Formats kFp4AndOutput{WeightFormat::kBF16, WeightFormat::kNvfp4, WeightFormat::kNvfp4,
                                WeightFormat::kNvfp4};

enum class Family : std::uint8_t { kV2Lite, kV2, kV3 };

struct Entry {
  std::string_view name;
  Family family;
  Formats formats;
  WeightFormat prediction;  // of the layer for multi-token prediction; V3 only
};
constexpr std::array kEntries{
    Entry{"deepseek-r1-fp4", Family::kV3, kFp4, WeightFormat::kBF16},
    Entry{"deepseek-r1-fp4-v2", Family::kV3, kFp4AndOutput, WeightFormat::kBF16},
    Entry{"deepseek-r1-fp8", Family::kV3, kFp8, WeightFormat::kFp8Block},
    Entry{"deepseek-v2", Family::kV2, kBf16, WeightFormat::kBF16},
    Entry{"deepseek-v2-lite", Family::kV2Lite, kBf16, WeightFormat::kBF16},
    Entry{"deepseek-v3-fp4", Family::kV3, kFp4, WeightFormat::kBF16},
    Entry{"deepseek-v3-fp8", Family::kV3, kFp8, WeightFormat::kFp8Block},
    Entry{"deepseek-v3.1-fp4", Family::kV3, kFp4AndOutput, WeightFormat::kBF16},
    Entry{"deepseek-v3.1-fp8", Family::kV3, kFp8, WeightFormat::kFp8Block},
};

YarnConfig yarn(double mscale) {
  return {.factor = 40.0,
          .mscale = mscale,
          .mscale_all_dim = mscale,
          .original_max_position_embeddings = 4096};
}

// The configuration of V2. V2-Lite and V3 start from it and change what differs.
ModelConfig v2_config() {
  ModelConfig config;
  config.model_type = "deepseek_v2";
  config.vocab_size = 102400;
  config.hidden_size = 5120;
  config.num_hidden_layers = 60;
  config.first_k_dense_replace = 1;
  config.num_attention_heads = 128;
  config.q_lora_rank = 1536;
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  config.intermediate_size = 12288;
  config.moe_intermediate_size = 1536;
  config.n_routed_experts = 160;
  config.n_shared_experts = 2;
  config.num_experts_per_tok = 6;
  config.n_group = 8;
  config.topk_group = 3;
  config.topk_method = TopkMethod::kGroupLimitedGreedy;
  config.routed_scaling_factor = 16.0;
  config.yarn = yarn(0.707);
  config.max_position_embeddings = 163840;
  config.bos_token_id = 100000;
  config.eos_token_ids = {100001};
  return config;
}

ModelConfig v2_lite_config() {
  ModelConfig config = v2_config();
  config.hidden_size = 2048;
  config.num_hidden_layers = 27;
  config.num_attention_heads = 16;
  config.q_lora_rank = 0;
  config.intermediate_size = 10944;
  config.moe_intermediate_size = 1408;
  config.n_routed_experts = 64;
  config.n_group = 1;
  config.topk_group = 1;
  config.topk_method = TopkMethod::kGreedy;
  config.routed_scaling_factor = 1.0;
  return config;
}

ModelConfig v3_config() {
  ModelConfig config = v2_config();
  config.model_type = "deepseek_v3";
  config.vocab_size = 129280;
  config.hidden_size = 7168;
  config.num_hidden_layers = 61;
  config.first_k_dense_replace = 3;
  config.intermediate_size = 18432;
  config.moe_intermediate_size = 2048;
  config.n_routed_experts = 256;
  config.n_shared_experts = 1;
  config.num_experts_per_tok = 8;
  config.topk_group = 4;
  config.scoring_func = Scoring::kSigmoid;
  config.topk_method = TopkMethod::kNoauxTc;
  config.norm_topk_prob = true;
  config.routed_scaling_factor = 2.5;
  config.yarn = yarn(1.0);
  config.bos_token_id = 0;
  config.eos_token_ids = {1};
  return config;
}

ModelConfig config_of(Family family) {
  switch (family) {
    case Family::kV2Lite:
      return v2_lite_config();
    case Family::kV2:
      return v2_config();
    case Family::kV3:
      return v3_config();
  }
  throw ParameterError("model", "is of no known family");
}

// Tensors of one shard, as exporters name them.
class Shard {
 public:
  void add(const std::string& name, DType dtype, Shape shape) {
    TensorInfo& tensor = tensors_.emplace_back();
    tensor.name = name;
    tensor.dtype = dtype;
    tensor.shape = std::move(shape);
  }
  void add_linear(const std::string& module, WeightFormat format, std::int64_t rows,
                  std::int64_t cols) {
    const std::string weight = module + ".weight";
    switch (format) {
      case WeightFormat::kBF16:
        add(weight, DType::kBF16, {rows, cols});
        return;
      case WeightFormat::kFp8Block:
        add(weight, DType::kF8E4M3, {rows, cols});
        add(module + ".weight_scale_inv", DType::kF32,
            {(rows + kTile - 1) / kTile, (cols + kTile - 1) / kTile});
        return;
      case WeightFormat::kNvfp4:
        add(weight, DType::kU8, {rows, cols / 2});
        add(module + ".weight_scale", DType::kF8E4M3, {rows, cols / format::kNvfp4Group});
        add(module + ".weight_scale_2", DType::kF32, {});
        add(module + ".input_scale", DType::kF32, {});
        return;
      default:
        throw ParameterError("model", "has weights in a format that nobody publishes");
    }
  }
  void add_mlp(const std::string& prefix, WeightFormat format, std::int64_t hidden,
               std::int64_t width) {
    add_linear(prefix + ".gate_proj", format, width, hidden);
    add_linear(prefix + ".up_proj", format, width, hidden);
    add_linear(prefix + ".down_proj", format, hidden, width);
  }
  std::vector<TensorInfo> take() { return std::move(tensors_); }

 private:
  static constexpr std::int64_t kTile = 128;

  std::vector<TensorInfo> tensors_;
};

void add_attention(const ModelConfig& config, const Formats& formats, const std::string& prefix,
                   Shard& shard) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t heads = config.num_attention_heads;
  const std::int64_t q_rows = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim);
  const WeightFormat format = formats.attention;
  if (config.q_lora_rank == 0) {
    shard.add_linear(prefix + ".q_proj", format, q_rows, hidden);
  } else {
    shard.add_linear(prefix + ".q_a_proj", format, config.q_lora_rank, hidden);
    shard.add(prefix + ".q_a_layernorm.weight", DType::kBF16, {config.q_lora_rank});
    shard.add_linear(prefix + ".q_b_proj", format, q_rows, config.q_lora_rank);
  }
  shard.add_linear(prefix + ".kv_a_proj_with_mqa", format,
                   config.kv_lora_rank + config.qk_rope_head_dim, hidden);
  shard.add(prefix + ".kv_a_layernorm.weight", DType::kBF16, {config.kv_lora_rank});
  shard.add_linear(prefix + ".kv_b_proj", format,
                   heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank);
  shard.add_linear(prefix + ".o_proj", formats.o_proj, hidden, heads * config.v_head_dim);
}

Shard layer_shard(const ModelConfig& config, const Formats& formats, std::int64_t layer) {
  const std::string prefix = "model.layers." + std::to_string(layer);
  const std::int64_t hidden = config.hidden_size;
  Shard shard;
  shard.add(prefix + ".input_layernorm.weight", DType::kBF16, {hidden});
  shard.add(prefix + ".post_attention_layernorm.weight", DType::kBF16, {hidden});
  add_attention(config, formats, prefix + ".self_attn", shard);
  if (!config.is_moe_layer(layer)) {
    shard.add_mlp(prefix + ".mlp", formats.mlp, hidden, config.intermediate_size);
    return shard;
  }
  shard.add(prefix + ".mlp.gate.weight", DType::kBF16, {config.n_routed_experts, hidden});
  if (config.topk_method == TopkMethod::kNoauxTc) {
    shard.add(prefix + ".mlp.gate.e_score_correction_bias", DType::kF32, {config.n_routed_experts});
  }
  const std::int64_t width = config.moe_intermediate_size;
  for (std::int64_t expert = 0; expert < config.n_routed_experts; ++expert) {
    shard.add_mlp(prefix + ".mlp.experts." + std::to_string(expert), formats.experts, hidden,
                  width);
  }
  shard.add_mlp(prefix + ".mlp.shared_experts", formats.mlp, hidden,
                config.n_shared_experts * width);
  return shard;
}

Shard ends_shard(const ModelConfig& config) {
  Shard shard;
  const Shape table{config.vocab_size, config.hidden_size};
  shard.add("model.embed_tokens.weight", DType::kBF16, table);
  shard.add("lm_head.weight", DType::kBF16, table);
  shard.add("model.norm.weight", DType::kBF16, {config.hidden_size});
  return shard;
}

std::uint64_t bytes_of(const std::vector<TensorInfo>& tensors) {
  std::uint64_t bytes = 0;
  for (const TensorInfo& tensor : tensors) {
    std::uint64_t count = 1;
    for (const std::int64_t extent : tensor.shape) count *= static_cast<std::uint64_t>(extent);
    bytes += count * format::dtype_size(tensor.dtype);
  }
  return bytes;
}

// V3's layer 61: one more, with an embedding, a head and a projection of two streams of its own.
std::uint64_t prediction_bytes(const ModelConfig& config, WeightFormat format) {
  Shard layer = layer_shard(config, {format, format, format, format}, config.num_hidden_layers - 1);
  layer.add_linear("eh_proj", format, config.hidden_size, 2 * config.hidden_size);
  return bytes_of(layer.take()) + bytes_of(ends_shard(config).take());
}

}  // namespace

std::vector<std::string_view> published_names() {
  std::vector<std::string_view> names(kEntries.size());
  std::ranges::transform(kEntries, names.begin(), &Entry::name);
  return names;
}

PublishedModel published_model(std::string_view name) {
  const auto* const entry = std::ranges::find(kEntries, name, &Entry::name);
  if (entry == kEntries.end()) {
    std::string known;
    for (const Entry& other : kEntries) {
      known += (known.empty() ? "" : ", ") + std::string(other.name);
    }
    throw ParameterError("model", "'" + std::string(name) + "' is not one of " + known);
  }
  ModelConfig config = config_of(entry->family);
  std::vector<std::vector<TensorInfo>> shards{ends_shard(config).take()};
  for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    shards.push_back(layer_shard(config, entry->formats, layer).take());
  }
  const std::uint64_t unneeded =
      entry->family == Family::kV3 ? prediction_bytes(config, entry->prediction) : 0;
  return {std::move(config), Catalogue::described(entry->name, std::move(shards)), unneeded};
}

}  // namespace dsfp4::checkpoint
