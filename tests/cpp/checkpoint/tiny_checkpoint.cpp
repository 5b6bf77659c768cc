#include "checkpoint/tiny_checkpoint.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "format/dtype.h"

namespace dsfp4::testing {
namespace {

constexpr std::int64_t kVocab = 32;
constexpr std::int64_t kHidden = 32;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kQLora = 16;
constexpr std::int64_t kKvLora = 16;
constexpr std::int64_t kNope = 8;
constexpr std::int64_t kRope = 4;
constexpr std::int64_t kValue = 8;
constexpr std::int64_t kDense = 32;
constexpr std::int64_t kExpert = 16;

using Shape = std::vector<std::int64_t>;

std::string in_quotes(std::string_view text) { return '"' + std::string(text) + '"'; }

// Appends tensors to shards with values that keep a forward pass finite.
class Writer {
 public:
  Writer(TinyCheckpoint& checkpoint, TinyKind kind) : checkpoint_(checkpoint), kind_(kind) {}

  void begin_shard(const std::string& name) {
    checkpoint_.shards.push_back({name, JsonNode::object({}), ""});
    checkpoint_.shards.back().header.set("__metadata__",
                                         JsonNode::object({{"format", JsonNode::text("pt")}}));
  }

  void matrix(const std::string& module, std::int64_t rows, std::int64_t cols,
              std::string_view format) {
    if (kind_ == TinyKind::kBf16 || format == "bf16") {
      tensor(module + ".weight", "BF16", {rows, cols});
    } else if (format == "fp8") {
      tensor(module + ".weight", "F8_E4M3", {rows, cols});
      tensor(module + ".weight_scale_inv", "F32", {1, 1});
    } else {
      const bool compressed = kind_ == TinyKind::kCompressed;
      tensor(module + (compressed ? ".weight_packed" : ".weight"), "U8", {rows, cols / 2});
      tensor(module + ".weight_scale", "F8_E4M3", {rows, cols / 16});
      tensor(module + (compressed ? ".weight_global_scale" : ".weight_scale_2"), "F32",
             compressed ? Shape{1} : Shape{});
    }
  }

  void vector(const std::string& name, std::int64_t length) {
    tensor(name + ".weight", "BF16", {length});
  }

  void tensor(const std::string& name, std::string_view dtype, const Shape& shape) {
    TinyShard& shard = checkpoint_.shards.back();
    std::int64_t values = 1;
    for (const std::int64_t dimension : shape) values *= dimension;
    const std::size_t begin = shard.data.size();
    for (std::int64_t i = 0; i < values; ++i) shard.data += value(dtype);
    shard.header.set(name, JsonNode::object({{"dtype", JsonNode::text(dtype)},
                                             {"shape", JsonNode::array(shape)},
                                             {"data_offsets", offsets(begin, shard.data.size())}}));
  }

 private:
  static JsonNode offsets(std::size_t begin, std::size_t end) {
    return JsonNode::array({static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end)});
  }

  // One value, little endian, of a magnitude near 1/8 (F32: 1/64, as F32 tensors are scales).
  std::string value(std::string_view dtype) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const auto random = static_cast<unsigned>(state_ >> 56);
    const auto sign = static_cast<char>((random & 1u) << 7);
    if (dtype == "F32") return std::string("\x00\x00\x80\x3c", 4);
    if (dtype == "BF16") return {static_cast<char>(random), static_cast<char>(sign | 0x3e)};
    if (dtype == "F8_E4M3") return {static_cast<char>(0x20 | (random & 15u))};
    return {static_cast<char>(random)};
  }

  TinyCheckpoint& checkpoint_;
  TinyKind kind_;
  std::uint64_t state_ = 1;
};

void write_attention(Writer& writer, const std::string& prefix, TinyKind kind) {
  constexpr std::int64_t kQueryRows = kHeads * (kNope + kRope);
  if (kind == TinyKind::kBf16) {
    writer.matrix(prefix + "q_proj", kQueryRows, kHidden, "bf16");
  } else {
    writer.matrix(prefix + "q_a_proj", kQLora, kHidden, "fp8");
    writer.vector(prefix + "q_a_layernorm", kQLora);
    writer.matrix(prefix + "q_b_proj", kQueryRows, kQLora, "fp8");
  }
  writer.matrix(prefix + "kv_a_proj_with_mqa", kKvLora + kRope, kHidden, "fp8");
  writer.vector(prefix + "kv_a_layernorm", kKvLora);
  writer.matrix(prefix + "kv_b_proj", kHeads * (kNope + kValue), kKvLora, "fp8");
  writer.matrix(prefix + "o_proj", kHidden, kHeads * kValue, "nvfp4");
  if (kind == TinyKind::kCompressed) writer.tensor(prefix + "k_proj.k_scale", "F32", {});
}

void write_mlp(Writer& writer, const std::string& prefix, std::int64_t width,
               std::string_view format = "nvfp4") {
  writer.matrix(prefix + "gate_proj", width, kHidden, format);
  writer.matrix(prefix + "up_proj", width, kHidden, format);
  writer.matrix(prefix + "down_proj", kHidden, width, format);
}

void write_layer(Writer& writer, std::int64_t layer, TinyKind kind, std::int64_t experts) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  writer.vector(prefix + "input_layernorm", kHidden);
  writer.vector(prefix + "post_attention_layernorm", kHidden);
  write_attention(writer, prefix + "self_attn.", kind);
  if (layer == 0) {
    write_mlp(writer, prefix + "mlp.", kDense);
    return;
  }
  writer.matrix(prefix + "mlp.gate", experts, kHidden, "bf16");
  if (kind != TinyKind::kBf16) {
    writer.tensor(prefix + "mlp.gate.e_score_correction_bias", "F32", {experts});
  }
  const bool fp8 = kind == TinyKind::kMixed && layer % 2 == 0;
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    write_mlp(writer, prefix + "mlp.experts." + std::to_string(expert) + ".", kExpert,
              fp8 ? "fp8" : "nvfp4");
  }
  write_mlp(writer, prefix + "mlp.shared_experts.", kExpert);
}

JsonNode make_config(TinyKind kind, std::int64_t layers, std::int64_t experts) {
  const bool v2 = kind == TinyKind::kBf16;
  const auto number = [](std::int64_t value) { return JsonNode::number(value); };
  JsonNode config = JsonNode::object({
      {"model_type", JsonNode::text(v2 ? "deepseek_v2" : "deepseek_v3")},
      {"attention_bias", JsonNode::raw("false")},
      {"hidden_act", JsonNode::text("silu")},
      {"moe_layer_freq", number(1)},
      {"vocab_size", number(kVocab)},
      {"hidden_size", number(kHidden)},
      {"num_hidden_layers", number(layers)},
      {"first_k_dense_replace", number(1)},
      {"num_attention_heads", number(kHeads)},
      {"q_lora_rank", v2 ? JsonNode::raw("null") : number(kQLora)},
      {"kv_lora_rank", number(kKvLora)},
      {"qk_nope_head_dim", number(kNope)},
      {"qk_rope_head_dim", number(kRope)},
      {"v_head_dim", number(kValue)},
      {"intermediate_size", number(kDense)},
      {"moe_intermediate_size", number(kExpert)},
      {"n_routed_experts", number(experts)},
      {"n_shared_experts", number(1)},
      {"num_experts_per_tok", number(2)},
      {"n_group", number(v2 ? 1 : 2)},
      {"topk_group", number(1)},
      {"scoring_func", JsonNode::text(v2 ? "softmax" : "sigmoid")},
      {"topk_method", JsonNode::text(v2 ? "greedy" : "noaux_tc")},
      {"norm_topk_prob", JsonNode::raw(v2 ? "false" : "true")},
      {"routed_scaling_factor", JsonNode::raw("1.5")},
      {"rms_norm_eps", JsonNode::raw("1e-6")},
      {"rope_theta", JsonNode::raw("10000.0")},
      {"max_position_embeddings", number(64)},
      {"tie_word_embeddings", JsonNode::raw(v2 ? "true" : "false")},
      {"bos_token_id", number(0)},
      {"eos_token_id", JsonNode::array({1, 2})},
  });
  const JsonNode architectures =
      JsonNode::raw(v2 ? "[\"DeepseekV2ForCausalLM\"]" : "[\"DeepseekV3ForCausalLM\"]");
  config.set("architectures", architectures);
  config.set("rope_scaling", JsonNode::object({{"type", JsonNode::text("yarn")},
                                               {"factor", number(4)},
                                               {"original_max_position_embeddings", number(16)},
                                               {"beta_fast", number(32)},
                                               {"beta_slow", number(1)},
                                               {"mscale", JsonNode::raw("0.7")},
                                               {"mscale_all_dim", JsonNode::raw("0.7")}}));
  return config;
}

bool has_modelopt_names(TinyKind kind) {
  return kind == TinyKind::kNvfp4 || kind == TinyKind::kMixed;
}

JsonNode make_quantization_config(TinyKind kind) {
  if (has_modelopt_names(kind)) {
    const JsonNode scheme = JsonNode::object(
        {{"quant_algo", JsonNode::text("NVFP4")}, {"group_size", JsonNode::number(16)}});
    return JsonNode::object({{"quant_method", JsonNode::text("modelopt")},
                             {"quant_algo", JsonNode::text("MIXED_PRECISION")},
                             {"weight_block_size", JsonNode::array({128, 128})},
                             {"quantized_layers", JsonNode::object({{"layers.0.mlp", scheme}})}});
  }
  const JsonNode weights = JsonNode::object({{"num_bits", JsonNode::number(4)},
                                             {"type", JsonNode::text("float")},
                                             {"group_size", JsonNode::number(16)}});
  return JsonNode::object(
      {{"quant_method", JsonNode::text("compressed-tensors")},
       {"config_groups",
        JsonNode::object({{"group_0", JsonNode::object({{"weights", weights}})}})}});
}

JsonNode make_index(const TinyCheckpoint& checkpoint) {
  JsonNode map = JsonNode::object({});
  std::size_t bytes = 0;
  for (const TinyShard& shard : checkpoint.shards) {
    bytes += shard.data.size();
    for (const JsonNode::Member& member : shard.header.members) {
      if (member.key == "\"__metadata__\"") continue;
      map.members.push_back({member.key, JsonNode::text(shard.name)});
    }
  }
  const auto size = static_cast<std::int64_t>(bytes);
  return JsonNode::object({{"metadata", JsonNode::object({{"total_size", JsonNode::number(size)}})},
                           {"weight_map", map}});
}

bool absent(const JsonNode& node) {
  return node.kind == JsonNode::Kind::kToken && node.token.empty();
}

}  // namespace

JsonNode JsonNode::raw(std::string token) { return {Kind::kToken, std::move(token), {}}; }

JsonNode JsonNode::text(std::string_view value) { return raw(in_quotes(value)); }

JsonNode JsonNode::number(std::int64_t value) { return raw(std::to_string(value)); }

JsonNode JsonNode::array(const std::vector<std::int64_t>& values) {
  JsonNode node{Kind::kArray, "", {}};
  for (const std::int64_t value : values) node.members.push_back({"", number(value)});
  return node;
}

JsonNode JsonNode::object(std::vector<std::pair<std::string, JsonNode>> members) {
  JsonNode node{Kind::kObject, "", {}};
  for (auto& [name, value] : members) node.members.push_back({in_quotes(name), std::move(value)});
  return node;
}

JsonNode* JsonNode::find(std::string_view name) {
  const auto found = std::find_if(members.begin(), members.end(), [&](const Member& member) {
    return member.key == in_quotes(name);
  });
  return found == members.end() ? nullptr : &found->value;
}

void JsonNode::set(std::string_view name, JsonNode value) {
  if (JsonNode* known = find(name)) {
    *known = std::move(value);
  } else {
    members.push_back({in_quotes(name), std::move(value)});
  }
}

void JsonNode::remove(std::string_view name) {
  std::erase_if(members, [&](const Member& member) { return member.key == in_quotes(name); });
}

std::string JsonNode::write() const {
  if (kind == Kind::kToken) return token;
  std::string out(1, kind == Kind::kArray ? '[' : '{');
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (i > 0) out += ',';
    if (kind == Kind::kObject) out += members[i].key + ':';
    out += members[i].value.write();
  }
  return out + (kind == Kind::kArray ? ']' : '}');
}

void TinyShard::add(const std::string& tensor, std::string_view dtype,
                    const std::vector<std::int64_t>& shape) {
  const auto type = format::parse_dtype(dtype);
  if (!type) throw std::runtime_error("there is no type " + std::string(dtype));
  std::size_t bytes = format::dtype_size(*type);
  for (const std::int64_t dimension : shape) bytes *= static_cast<std::size_t>(dimension);
  const auto begin = static_cast<std::int64_t>(data.size());
  data.append(bytes, '\0');
  header.set(
      tensor,
      JsonNode::object(
          {{"dtype", JsonNode::text(dtype)},
           {"shape", JsonNode::array(shape)},
           {"data_offsets", JsonNode::array({begin, static_cast<std::int64_t>(data.size())})}}));
}

void TinyShard::rename(std::string_view tensor, const std::string& to) {
  for (JsonNode::Member& member : header.members) {
    if (member.key == in_quotes(tensor)) {
      member.key = in_quotes(to);
      return;
    }
  }
  throw std::runtime_error("there is no tensor " + std::string(tensor));
}

std::string TinyCheckpoint::file_of(const TinyShard& shard) {
  const std::string header = shard.header.write();
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
  return file + header + shard.data;
}

std::vector<std::pair<std::string, std::string>> TinyCheckpoint::files() const {
  std::vector<std::pair<std::string, std::string>> files;
  const auto add_json = [&](const char* name, const JsonNode& node) {
    if (!absent(node)) files.emplace_back(name, node.write());
  };
  add_json("config.json", config);
  add_json("generation_config.json", generation);
  add_json("hf_quant_config.json", quantization);
  add_json("model.safetensors.index.json", index);
  for (const TinyShard& shard : shards) files.emplace_back(shard.name, file_of(shard));
  return files;
}

void TinyCheckpoint::write(const std::filesystem::path& folder) const {
  for (const auto& [name, bytes] : files()) write_file(folder / name, bytes);
}

TinyCheckpoint make_tiny_checkpoint(TinyKind kind, std::int64_t layers, std::int64_t experts) {
  TinyCheckpoint checkpoint;
  Writer writer(checkpoint, kind);
  const bool two_shards = has_modelopt_names(kind);
  writer.begin_shard(two_shards ? "model-00001-of-00002.safetensors" : "model.safetensors");
  writer.matrix("model.embed_tokens", kVocab, kHidden, "bf16");
  write_layer(writer, 0, kind, experts);
  if (two_shards) writer.begin_shard("model-00002-of-00002.safetensors");
  for (std::int64_t layer = 1; layer < layers; ++layer) write_layer(writer, layer, kind, experts);
  writer.vector("model.norm", kHidden);
  if (kind != TinyKind::kBf16) writer.matrix("lm_head", kVocab, kHidden, "bf16");

  checkpoint.config = make_config(kind, layers, experts);
  checkpoint.generation = JsonNode::object({{"eos_token_id", JsonNode::array({1})}});
  const JsonNode none = JsonNode::raw("");
  if (kind != TinyKind::kBf16) {
    checkpoint.config.set("quantization_config", make_quantization_config(kind));
  }
  checkpoint.quantization =
      !has_modelopt_names(kind)
          ? none
          : JsonNode::object(
                {{"quantization", JsonNode::object({{"quant_algo", JsonNode::text("NVFP4")},
                                                    {"group_size", JsonNode::number(16)}})}});
  checkpoint.index = kind == TinyKind::kCompressed ? none : make_index(checkpoint);
  return checkpoint;
}

void write_file(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

ScratchFolder::ScratchFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "dsfp4-test-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
  path_ = name;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;  // a destructor cannot report that the system keeps a temporary file
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace dsfp4::testing
