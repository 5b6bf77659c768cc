#include "checkpoint/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <system_error>
#include <utility>

#include "checkpoint/absence.h"
#include "checkpoint/fields.h"
#include "checkpoint/file.h"
#include "checkpoint/json.h"
#include "checkpoint/quantization.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

// Limits far above any model. With them every product that the code forms (rows * cols * 4 bytes,
// cache width * layers * context * 4 bytes) stays below 2^63.
constexpr std::int64_t kMaxDimension = std::int64_t{1} << 24;
constexpr std::int64_t kMaxHeads = std::int64_t{1} << 16;
constexpr std::int64_t kMaxHeadDim = std::int64_t{1} << 16;
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxExperts = 65536;
constexpr std::int64_t kMaxSharedExperts = 1024;

// What a family's configuration means where it leaves a field out, as in Hugging Face's classes.
struct Family {
  std::string_view model_type;
  std::string_view architecture;
  Scoring scoring_func;
  TopkMethod topk_method;
  bool norm_topk_prob;
  std::int64_t n_group, topk_group;
  double routed_scaling_factor;
  std::int64_t n_shared_experts, first_k_dense_replace, max_position_embeddings;
};

constexpr std::int64_t kDefaultQLoraRank = 1536;  // of both families

constexpr std::array<Family, 2> kFamilies = {{
    {"deepseek_v2", "DeepseekV2ForCausalLM", Scoring::kSoftmax, TopkMethod::kGreedy, false, 1, 1,
     1.0, 2, 0, 2048},
    {"deepseek_v3", "DeepseekV3ForCausalLM", Scoring::kSigmoid, TopkMethod::kNoauxTc, true, 8, 4,
     2.5, 1, 3, 4096},
}};

const Family& read_family(const Fields& fields) {
  const std::string model_type = fields.text("model_type");
  const auto* family = std::find_if(kFamilies.begin(), kFamilies.end(), [&](const Family& known) {
    return known.model_type == model_type;
  });
  if (family == kFamilies.end()) {
    fields.unsupported("model_type",
                       "deepseek_v2 and deepseek_v3 are supported (deepseek_v32 and deepseek_v4 "
                       "are not supported yet)");
  }
  if (const JsonValue* architectures = fields.find("architectures")) {
    const JsonValue::Array* names = architectures->array();
    if (names == nullptr) fields.fail("architectures", "must be a list of strings");
    const auto is_ours = [&](const JsonValue& name) {
      const auto* text = std::get_if<std::string>(&name.data);
      if (text == nullptr) fields.fail("architectures", "must be a list of strings");
      return *text == family->architecture;
    };
    if (!names->empty() && std::none_of(names->begin(), names->end(), is_ours)) {
      throw UnsupportedError(fields.file() + ": 'architectures' holds " + describe(names->front()) +
                             "; " + std::string(family->architecture) +
                             " is supported for model_type " + model_type);
    }
  }
  return *family;
}

// Fields whose other values would change the computation.
void check_fixed_fields(const Fields& fields) {
  for (const char* name : {"attention_bias", "mlp_bias"}) {
    if (fields.boolean(name, false)) fields.unsupported(name, "layers have no biases here");
  }
  if (fields.integer("moe_layer_freq", 1, kMaxLayers, 1) != 1) {
    fields.unsupported("moe_layer_freq", "1 is supported");
  }
  if (fields.text("hidden_act", "silu") != "silu") {
    fields.unsupported("hidden_act", "silu is supported");
  }
  if (!fields.boolean("rope_interleave", true)) {
    fields.unsupported("rope_interleave", "true is supported");
  }
}

void read_geometry(const Fields& fields, const Family& family, ModelConfig& config) {
  config.vocab_size = fields.integer("vocab_size", 1, kMaxDimension);
  config.hidden_size = fields.integer("hidden_size", 1, kMaxDimension);
  config.num_hidden_layers = fields.integer("num_hidden_layers", 1, kMaxLayers);
  config.num_attention_heads = fields.integer("num_attention_heads", 1, kMaxHeads);
  config.q_lora_rank = fields.is_null("q_lora_rank")
                           ? 0
                           : fields.integer("q_lora_rank", 1, kMaxDimension, kDefaultQLoraRank);
  config.kv_lora_rank = fields.integer("kv_lora_rank", 1, kMaxDimension);
  config.qk_nope_head_dim = fields.integer("qk_nope_head_dim", 1, kMaxHeadDim);
  config.qk_rope_head_dim = fields.integer("qk_rope_head_dim", 2, kMaxHeadDim);
  if (config.qk_rope_head_dim % 2 != 0) fields.fail("qk_rope_head_dim", "must be even");
  config.v_head_dim = fields.integer("v_head_dim", 1, kMaxHeadDim);
  config.intermediate_size = fields.integer("intermediate_size", 1, kMaxDimension);
  config.max_position_embeddings =
      fields.integer("max_position_embeddings", 1, kMaxDimension, family.max_position_embeddings);
  config.rms_norm_eps = fields.number("rms_norm_eps", 1e-20, 1.0, 1e-6);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", false);
}

void read_choice(const Fields& fields, const Family& family, ModelConfig& config) {
  config.scoring_func = family.scoring_func;
  if (fields.find("scoring_func") != nullptr) {
    const std::string scoring = fields.text("scoring_func");
    if (scoring != "softmax" && scoring != "sigmoid") {
      fields.unsupported("scoring_func", "softmax and sigmoid are supported");
    }
    config.scoring_func = scoring == "softmax" ? Scoring::kSoftmax : Scoring::kSigmoid;
  }
  config.topk_method = family.topk_method;
  if (fields.find("topk_method") != nullptr) {
    const std::string wanted = fields.text("topk_method");
    bool known = false;
    for (const TopkMethod method :
         {TopkMethod::kGreedy, TopkMethod::kGroupLimitedGreedy, TopkMethod::kNoauxTc}) {
      if (wanted != topk_method_name(method)) continue;
      config.topk_method = method;
      known = true;
    }
    if (!known) {
      fields.unsupported("topk_method", "greedy, group_limited_greedy and noaux_tc are supported");
    }
  }
  config.norm_topk_prob = fields.boolean("norm_topk_prob", family.norm_topk_prob);
  config.routed_scaling_factor =
      fields.number("routed_scaling_factor", 1e-6, 1e6, family.routed_scaling_factor);
}

void read_groups(const Fields& fields, const Family& family, ModelConfig& config) {
  const std::int64_t experts = config.n_routed_experts;
  config.n_group =
      fields.is_null("n_group") ? 1 : fields.integer("n_group", 1, kMaxExperts, family.n_group);
  if (experts % config.n_group != 0) {
    fields.fail("n_group", "must divide n_routed_experts, " + std::to_string(experts));
  }
  // Without groups there is nothing to choose, and the family's default does not apply.
  std::optional<std::int64_t> topk_group;
  if (config.n_group == 1) {
    topk_group = 1;
  } else if (!fields.is_null("topk_group")) {
    topk_group = std::min(family.topk_group, config.n_group);
  }
  config.topk_group = fields.integer("topk_group", 1, config.n_group, topk_group);
  if (config.topk_method == TopkMethod::kGreedy) return;
  const std::int64_t group_size = experts / config.n_group;
  if (config.num_experts_per_tok > config.topk_group * group_size) {
    fields.fail("num_experts_per_tok", "must be at most the " +
                                           std::to_string(config.topk_group * group_size) +
                                           " experts of topk_group groups");
  }
  if (config.topk_method == TopkMethod::kNoauxTc && config.n_group > 1 && group_size < 2) {
    fields.fail("n_group", "must leave at least two experts a group for topk_method noaux_tc");
  }
}

void read_experts(const Fields& fields, const Family& family, ModelConfig& config) {
  const std::int64_t experts =
      fields.is_null("n_routed_experts") ? 0 : fields.integer("n_routed_experts", 0, kMaxExperts);
  if (experts == 0) return;
  config.n_routed_experts = experts;
  // More dense layers than layers is how Hugging Face's defaults describe a small dense model.
  config.first_k_dense_replace =
      std::min(fields.integer("first_k_dense_replace", 0, kMaxLayers, family.first_k_dense_replace),
               config.num_hidden_layers);
  config.moe_intermediate_size = fields.integer("moe_intermediate_size", 1, kMaxDimension);
  config.n_shared_experts =
      fields.is_null("n_shared_experts")
          ? 0
          : fields.integer("n_shared_experts", 0, kMaxSharedExperts, family.n_shared_experts);
  config.num_experts_per_tok = fields.integer("num_experts_per_tok", 1, experts);
  read_choice(fields, family, config);
  read_groups(fields, family, config);
}

// transformers takes attention_factor in place of the amplitude that follows from mscale,
// DeepSeek's own code does not know it: both must mean the same.
void check_attention_factor(const Fields& rope, const YarnConfig& yarn) {
  constexpr double kRounding = 1e-4;  // of a value that was written in a few digits
  if (rope.find("attention_factor") == nullptr) return;
  const double given = rope.number("attention_factor", 0.0, 1e3);
  const double expected = yarn.amplitude();
  if (std::abs(given - expected) > kRounding * expected) {
    rope.unsupported("attention_factor", "the " + std::to_string(expected) +
                                             " that follows from factor, mscale and "
                                             "mscale_all_dim is supported");
  }
}

YarnConfig read_yarn(const Fields& rope, std::int64_t max_position_embeddings) {
  if (!rope.boolean("truncate", true)) rope.unsupported("truncate", "true is supported");
  YarnConfig yarn;
  yarn.factor = rope.number("factor", 1.0, 1e6);
  yarn.beta_slow = rope.number("beta_slow", 1e-6, 1e6, 1.0);
  yarn.beta_fast = rope.number("beta_fast", yarn.beta_slow, 1e6, std::max(32.0, yarn.beta_slow));
  yarn.mscale = rope.number("mscale", 0.0, 1e3, 0.0);
  yarn.mscale_all_dim = rope.number("mscale_all_dim", 0.0, 1e3, 0.0);
  yarn.original_max_position_embeddings =
      rope.integer("original_max_position_embeddings", 1, kMaxDimension, max_position_embeddings);
  check_attention_factor(rope, yarn);
  return yarn;
}

void check_all_dims_rotate(const Fields& fields) {
  if (fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0) {
    fields.unsupported("partial_rotary_factor", "1 is supported");
  }
}

// Theta lies beside rope_scaling in DeepSeek's own form, and inside rope_parameters in the form
// that transformers 5 saves. Where both objects are given, rope_scaling counts, as in transformers,
// unless it is empty.
void read_rope(const Fields& fields, ModelConfig& config) {
  constexpr double kMinTheta = 1.0 + 1e-6;  // a logarithm of it is divided by
  constexpr double kMaxTheta = 1e15;
  config.rope_theta = fields.number("rope_theta", kMinTheta, kMaxTheta, 10000.0);
  check_all_dims_rotate(fields);
  auto rope = fields.object("rope_scaling");
  if (!rope || rope->members().empty()) rope = fields.object("rope_parameters");
  if (!rope) return;
  check_all_dims_rotate(*rope);
  config.rope_theta = rope->number("rope_theta", kMinTheta, kMaxTheta, config.rope_theta);
  const char* type_field = rope->find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = rope->text(type_field, "default");
  if (type == "yarn") {
    config.yarn = read_yarn(*rope, config.max_position_embeddings);
  } else if (type != "default") {
    rope->unsupported(type_field, "yarn and default are supported");
  }
}

// A token id, or a list of them; empty if the field is missing or null.
std::vector<std::int64_t> read_token_ids(const Fields& fields, const char* name,
                                         std::int64_t vocab_size) {
  const JsonValue* value = fields.find(name);
  if (value == nullptr) return {};
  if (value->array() == nullptr) return {fields.integer(name, 0, vocab_size - 1)};
  std::vector<std::int64_t> ids;
  for (const JsonValue& entry : *value->array()) {
    const auto* id = std::get_if<std::int64_t>(&entry.data);
    if (id == nullptr || *id < 0 || *id >= vocab_size) {
      fields.fail(name, "must hold integers from 0 to " + std::to_string(vocab_size - 1));
    }
    ids.push_back(*id);
  }
  return ids;
}

void read_special_tokens(const std::filesystem::path& folder, const Fields& fields,
                         ModelConfig& config) {
  if (fields.find("bos_token_id") != nullptr) {
    config.bos_token_id = fields.integer("bos_token_id", 0, config.vocab_size - 1);
  }
  config.eos_token_ids = read_token_ids(fields, "eos_token_id", config.vocab_size);
  const std::filesystem::path path = folder / "generation_config.json";
  const auto text = read_file_if_exists(path, kMaxConfigBytes);
  if (!text) return;
  const JsonValue root = parse_json_tree(*text, path.string());
  const Fields generation(root, path.string());
  if (generation.find("eos_token_id") != nullptr) {
    config.eos_token_ids = read_token_ids(generation, "eos_token_id", config.vocab_size);
  }
}

[[noreturn]] void refuse_without_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  std::error_code ignored;  // then it is no such folder
  if (std::filesystem::is_directory(folder / "snapshots", ignored)) {
    throw CheckpointError(folder.string(), "", -1,
                          "is a repository in the Hub's cache; give the folder of one of its "
                          "commits, in 'snapshots'");
  }
  std::string why = describe_absence(path);
  if (why.empty()) {
    why = "is missing; give the folder of a checkpoint as Hugging Face publishes it";
  }
  throw CheckpointError(path.string(), "", -1, why);
}

}  // namespace

double yarn_mscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double YarnConfig::amplitude() const {
  return mscale != 0.0 && mscale_all_dim != 0.0
             ? yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
             : yarn_mscale(factor, 1.0);
}

std::string_view scoring_name(Scoring scoring) {
  return scoring == Scoring::kSoftmax ? "softmax" : "sigmoid";
}

std::string_view topk_method_name(TopkMethod method) {
  switch (method) {
    case TopkMethod::kGreedy:
      return "greedy";
    case TopkMethod::kGroupLimitedGreedy:
      return "group_limited_greedy";
    case TopkMethod::kNoauxTc:
      return "noaux_tc";
  }
  return "";
}

ModelConfig read_config(const std::filesystem::path& folder) {
  if (folder.empty()) throw ParameterError("folder", "is empty; give the folder of a checkpoint");
  const std::filesystem::path path = folder / "config.json";
  const auto text = read_file_if_exists(path, kMaxConfigBytes);
  if (!text) refuse_without_config(folder);
  const JsonValue root = parse_json_tree(*text, path.string());
  const Fields fields(root, path.string());
  const Family& family = read_family(fields);
  ModelConfig config;
  config.model_type = family.model_type;
  check_fixed_fields(fields);
  read_geometry(fields, family, config);
  read_experts(fields, family, config);
  read_rope(fields, config);
  read_special_tokens(folder, fields, config);
  check_quantization(folder, fields);
  return config;
}

}  // namespace dsfp4::checkpoint
