// Malformed and unsupported configurations: every numeric field with every bad kind of value, and
// what the fields say of one another and of the tensors.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/malformed.h"

namespace dsfp4::testing {
namespace {

struct NumberField {
  const char* name;
  bool integer;
};

class ConfigNumbers : public Malformed, public ::testing::WithParamInterface<NumberField> {};

TEST_P(ConfigNumbers, OfNoUseAreRefusedByName) {
  const auto [name, integer] = GetParam();
  std::vector<std::string> values = {"-1",
                                     "-9223372036854775808",
                                     "9223372036854775807",
                                     "9223372036854775808",
                                     "18446744073709551616",
                                     "1e308",
                                     "-1e308",
                                     "\"4\"",
                                     "\"\"",
                                     "true",
                                     "[]",
                                     "[1]",
                                     "{}"};
  if (integer) values.insert(values.end(), {"1.5", "1.0", "1e1"});
  const std::string path = name;
  const std::size_t dot = path.find('.');
  for (const std::string& value : values) {
    SCOPED_TRACE(path + " = " + value);
    TinyCheckpoint checkpoint = sound_;
    JsonNode* object = &checkpoint.config;
    if (dot != std::string::npos) object = object->find(path.substr(0, dot));
    object->set(dot == std::string::npos ? path : path.substr(dot + 1), JsonNode::raw(value));
    const Refusal refusal = open(checkpoint);
    EXPECT_EQ(refusal.file, "config.json");
    EXPECT_EQ(refusal.tensor, path);
    EXPECT_GT(refusal.offset, 0) << refusal.message;
  }
}

constexpr NumberField kNumberFields[] = {{"vocab_size", true},
                                         {"hidden_size", true},
                                         {"num_hidden_layers", true},
                                         {"first_k_dense_replace", true},
                                         {"num_attention_heads", true},
                                         {"q_lora_rank", true},
                                         {"kv_lora_rank", true},
                                         {"qk_nope_head_dim", true},
                                         {"qk_rope_head_dim", true},
                                         {"v_head_dim", true},
                                         {"intermediate_size", true},
                                         {"moe_intermediate_size", true},
                                         {"n_routed_experts", true},
                                         {"n_shared_experts", true},
                                         {"num_experts_per_tok", true},
                                         {"n_group", true},
                                         {"topk_group", true},
                                         {"moe_layer_freq", true},
                                         {"max_position_embeddings", true},
                                         {"bos_token_id", true},
                                         {"routed_scaling_factor", false},
                                         {"rms_norm_eps", false},
                                         {"rope_theta", false},
                                         {"rope_scaling.factor", false},
                                         {"rope_scaling.beta_fast", false},
                                         {"rope_scaling.beta_slow", false},
                                         {"rope_scaling.mscale", false},
                                         {"rope_scaling.mscale_all_dim", false},
                                         {"rope_scaling.original_max_position_embeddings", true},
                                         {"rope_scaling.rope_theta", false},
                                         {"partial_rotary_factor", false}};

INSTANTIATE_TEST_SUITE_P(Fields, ConfigNumbers, ::testing::ValuesIn(kNumberFields),
                         [](const ::testing::TestParamInfo<NumberField>& info) {
                           std::string name = info.param.name;
                           for (char& c : name) c = c == '.' ? '_' : c;
                           return name;
                         });

TEST_F(Malformed, TypesOfOtherFields) {
  for (const char* name : {"model_type", "hidden_act", "scoring_func", "topk_method"}) {
    for (const char* value : {"1", "true", "[]", "{}"}) {
      TinyCheckpoint checkpoint = sound_;
      checkpoint.config.set(name, JsonNode::raw(value));
      expect_refused(checkpoint, "config.json", name, "must be a string");
    }
  }
  for (const char* name :
       {"attention_bias", "mlp_bias", "norm_topk_prob", "tie_word_embeddings", "rope_interleave"}) {
    for (const char* value : {"1", "0", "\"true\"", "[]", "{}"}) {
      TinyCheckpoint checkpoint = sound_;
      checkpoint.config.set(name, JsonNode::raw(value));
      expect_refused(checkpoint, "config.json", name, "true or false");
    }
  }
  for (const char* name : {"rope_scaling", "quantization_config"}) {
    for (const char* value : {"1", "\"yarn\"", "[]", "true"}) {
      TinyCheckpoint checkpoint = sound_;
      checkpoint.config.set(name, JsonNode::raw(value));
      expect_refused(checkpoint, "config.json", name, "must be an object");
    }
  }
  for (const char* value : {"1", "\"DeepseekV3ForCausalLM\"", "[1]", "{}"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.set("architectures", JsonNode::raw(value));
    expect_refused(checkpoint, "config.json", "architectures", "list of strings");
  }
}

TEST_F(Malformed, EndTokens) {
  for (const char* value : {"-1", "32", "9223372036854775808", "[32]", "[-1]", "[1.0]", "[[1]]",
                            "[null]", "\"1\"", "{}"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.set("eos_token_id", JsonNode::raw(value));
    expect_refused(checkpoint, "config.json", "eos_token_id");
    checkpoint = sound_;
    checkpoint.generation.set("eos_token_id", JsonNode::raw(value));
    expect_refused(checkpoint, "generation_config.json", "eos_token_id");
  }
}

TEST_F(Malformed, ExpertsAndGroups) {
  const auto with = [&](const char* name, std::int64_t value) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.set(name, JsonNode::number(value));
    return checkpoint;
  };
  expect_refused(with("n_group", 3), "config.json", "n_group", "divide");
  expect_refused(with("n_group", 4), "config.json", "num_experts_per_tok", "at most the 1");
  expect_refused(with("topk_group", 3), "config.json", "topk_group");
  expect_refused(with("num_experts_per_tok", 3), "config.json", "num_experts_per_tok");
  TinyCheckpoint single = with("n_group", 4);
  single.config.set("topk_group", JsonNode::number(2));
  expect_refused(single, "config.json", "n_group", "two experts a group");
  // Sound numbers that the tensors contradict.
  expect_refused(with("n_routed_experts", 6), kShard, "model.layers.1.mlp.gate.weight", "[6, 32]");
  expect_refused(with("moe_intermediate_size", 32), kShard,
                 "model.layers.1.mlp.experts.0.gate_proj.weight", "[32, 16]");
  expect_refused(with("first_k_dense_replace", 2), folder_.path().filename().string(),
                 "model.layers.1.mlp.gate_proj.weight", "missing");
}

TEST_F(Malformed, QuantizationOfBothFiles) {
  for (const char* value : {"[128]", "[128, 128, 128]", "128", "[128, 128.0]", "[\"128\", 128]"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.find("quantization_config")->set("weight_block_size", JsonNode::raw(value));
    expect_refused(checkpoint, "config.json", "quantization_config.weight_block_size");
  }
  for (const char* value : {"-2", "16.0", "\"16\"", "9223372036854775807"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.quantization.find("quantization")->set("group_size", JsonNode::raw(value));
    expect_refused(checkpoint, "hf_quant_config.json", "quantization.group_size");
    checkpoint = make_tiny_checkpoint(TinyKind::kCompressed);
    checkpoint.config.find("quantization_config")
        ->find("config_groups")
        ->find("group_0")
        ->find("weights")
        ->set("group_size", JsonNode::raw(value));
    expect_refused(checkpoint, "config.json",
                   "quantization_config.config_groups.group_0.weights.group_size");
  }
  for (const char* value : {"1", "[]", "{\"a\":1}"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.find("quantization_config")->set("quantized_layers", JsonNode::raw(value));
    const std::string field = "quantization_config.quantized_layers";
    expect_refused(checkpoint, "config.json", value[0] == '{' ? field + ".a" : field);
  }
  // Sound, but of another kind than is run here.
  TinyCheckpoint tiles = sound_;
  tiles.config.find("quantization_config")->set("weight_block_size", JsonNode::array({64, 64}));
  TinyCheckpoint groups = sound_;
  groups.quantization.find("quantization")->set("group_size", JsonNode::number(32));
  for (const TinyCheckpoint* checkpoint : {&tiles, &groups}) {
    checkpoint->write(folder_.path());
    EXPECT_THROW(checkpoint::read_config(folder_.path()), UnsupportedError);
  }
}

TEST_F(Malformed, SoundConfigsOfOtherModels) {
  const std::vector<std::pair<std::string, std::string>> fields = {
      {"model_type", "\"llama\""},
      {"architectures", "[\"LlamaForCausalLM\"]"},
      {"attention_bias", "true"},
      {"mlp_bias", "true"},
      {"moe_layer_freq", "2"},
      {"hidden_act", "\"gelu\""},
      {"rope_interleave", "false"},
      {"scoring_func", "\"relu\""},
      {"topk_method", "\"random\""},
      {"partial_rotary_factor", "0.5"},
      {"rope_scaling", "{\"type\":\"linear\"}"},
      {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"truncate\":false}"},
      {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"attention_factor\":1}"}};
  for (const auto& [name, value] : fields) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.set(name, JsonNode::raw(value));
    checkpoint.write(folder_.path());
    try {
      checkpoint::read_config(folder_.path());
      ADD_FAILURE() << name << " = " << value;
    } catch (const UnsupportedError& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

// A given attention_factor must be the amplitude that follows anyway: 1 for DeepSeek's two equal
// mscales, 1 + ln(4) / 10 for none.
TEST_F(Malformed, AttentionFactorsThatChangeNothing) {
  for (const char* rope :
       {R"({"type":"yarn","factor":40,"mscale":1,"mscale_all_dim":1,"attention_factor":1.0})",
        R"({"type":"yarn","factor":40,"mscale":1,"mscale_all_dim":1,"attention_factor":null})",
        R"({"type":"yarn","factor":4,"attention_factor":1.1386294361119891})",
        R"({"rope_type":"yarn","factor":4,"attention_factor":1.13863})"}) {
    sound_.config.set("rope_scaling", JsonNode::raw(rope));
    EXPECT_EQ(open(sound_).message, "") << rope;
  }
}

TEST_F(Malformed, BothFormsOfRope) {
  constexpr const char* kYarn = R"({"rope_type":"yarn","factor":4,"rope_theta":500})";
  const auto read = [&](const char* scaling, const char* parameters) {
    sound_.config.set("rope_scaling", JsonNode::raw(scaling));
    sound_.config.set("rope_parameters", JsonNode::raw(parameters));
    sound_.write(folder_.path());
    return checkpoint::read_config(folder_.path());
  };
  for (const char* nothing : {"null", "{}"}) {  // transformers takes the other form for both
    const auto config = read(nothing, kYarn);
    ASSERT_TRUE(config.yarn) << nothing;
    EXPECT_EQ(config.yarn->factor, 4.0);
    EXPECT_EQ(config.rope_theta, 500.0);
  }
  EXPECT_EQ(read(kYarn, R"({"rope_type":"yarn","factor":8,"rope_theta":7})").yarn->factor, 4.0);
  EXPECT_EQ(read(kYarn, R"({"rope_type":"yarn","factor":8,"rope_theta":7})").rope_theta, 500.0);
  EXPECT_FALSE(read("{}", "{}").yarn);
}

}  // namespace
}  // namespace dsfp4::testing
