// quantization_config and hf_quant_config.json: what exporters write is read, what changes the
// arithmetic is refused by name.
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/malformed.h"

namespace dsfp4::testing {
namespace {

class Quantization : public Malformed {
 protected:
  // The NVFP4 checkpoint under the configuration `json`.
  TinyCheckpoint with(const std::string& json) const {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.config.set("quantization_config", JsonNode::raw(json));
    return checkpoint;
  }
  TinyCheckpoint with_hf(const std::string& json) const {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.quantization = JsonNode::raw(json);
    return checkpoint;
  }
};

TEST_F(Quantization, OfRealExporters) {
  const std::string deepseek = R"({"activation_scheme": "dynamic", "fmt": "e4m3",
      "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]})";
  const std::string modelopt = R"({"config_groups": {"group_0": {
      "input_activations": {"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16},
      "weights": {"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16},
      "targets": ["Linear"]}}, "ignore": ["lm_head"], "quant_algo": "NVFP4",
      "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"},
      "producer": {"name": "modelopt", "version": "0.47.0"}, "quant_method": "modelopt"})";
  const std::string awq_folded_into_norms = R"({"quant_algo": "MIXED_PRECISION",
      "quantized_layers": {"a": {"quant_algo": "NVFP4_AWQ", "group_size": 16,
      "has_zero_point": false, "pre_quant_scale": true}, "b": {"quant_algo": "FP8"}}})";
  const std::string llm_compressor = R"({"config_groups": {"group_0": {
      "format": "nvfp4-pack-quantized", "input_activations": {"dynamic": "local"},
      "output_activations": null, "targets": ["Linear"], "weights": {"actorder": null,
      "block_structure": null, "dynamic": false, "group_size": 16, "num_bits": 4,
      "observer": "memoryless_minmax", "observer_kwargs": {}, "zp_dtype": null,
      "scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group", "symmetric": true,
      "type": "float"}}}, "format": "nvfp4-pack-quantized", "global_compression_ratio": null,
      "ignore": ["lm_head"], "kv_cache_scheme": null, "quant_method": "compressed-tensors",
      "quantization_status": "compressed", "sparsity_config": {},
      "transform_config": {"config_groups": {}}, "version": "0.19.0"})";
  const std::string gptq_order = R"({"quant_method": "compressed-tensors",
      "sparsity_config": {"format": "dense", "targets": []},
      "config_groups": {"a": {"weights": {"actorder": "weight"}}}})";
  const std::string autoround = R"({"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs",
      "act_dynamic": true, "act_group_size": 16, "act_sym": true, "autoround_version": "0.9.0",
      "batch_size": 4, "bits": 4, "block_name_to_quantize": "model.layers", "data_type": "nv_fp",
      "enable_quanted_input": false, "extra_config": {"lm_head": {"bits": 16}}, "group_size": 16,
      "iters": 0, "lr": 0.005, "nsamples": 512, "packing_format": "auto_round:llm_compressor",
      "quant_method": "auto-round", "seqlen": 512, "sym": true})";
  for (const std::string& json :
       {deepseek, modelopt, awq_folded_into_norms, llm_compressor, gptq_order, autoround}) {
    EXPECT_EQ(open(with(json)).message, "");
  }
  const std::string modelopt_file = R"({"producer": {"name": "modelopt", "version": "0.23.0"},
      "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
      "exclude_modules": ["lm_head"]}})";
  EXPECT_EQ(open(with_hf(modelopt_file)).message, "");
}

TEST_F(Quantization, KeysThatSayNothing) {
  for (const char* value : {"null", "false", "0", "\"\"", "[]", "{}", R"({"a":{"b":[]}})"}) {
    EXPECT_EQ(open(with(std::string(R"({"new_key":)") + value + "}")).message, "");
  }
}

TEST_F(Quantization, ChangesOfTheArithmetic) {
  const std::string groups = "config_groups.a.weights.";
  const struct {
    std::string json, field, words;
  } others[] = {
      {R"({"transform_config":{"config_groups":{"R1":{"type":"hadamard"}}}})", "transform_config",
       "export the model without them"},
      {R"({"rotation_config":{"hadamard_type":"hadamard"}})", "rotation_config", "rotations"},
      {R"({"extra_config":{"x":{"rotation_config":{"a":1}}}})", "extra_config.x.rotation_config",
       "rotations"},
      {R"({"sparsity_config":{"format":"sparse-24-bitmask"}})", "sparsity_config.format",
       "dense weights are supported"},
      {R"({"moe_sparsity_config":{"method":"prune"}})", "moe_sparsity_config", "same number"},
      {R"({"quant_algo":"NVFP4_SVD"})", "quant_algo", "svdquant_lora_a"},
      {R"({"quant_algo":"NVFP4_SVDQUANT"})", "quant_algo", "svdquant_lora_a"},
      {R"({"quant_algo":"W4A8_AWQ"})", "quant_algo", "NVFP4, FP8 and BF16 are supported"},
      {R"({"quantized_layers":{"x":{"quant_algo":"W4A16_AWQ"}}})", "quantized_layers.x.quant_algo",
       "NVFP4, FP8 and BF16 are supported"},
      {R"({"config_groups":{"a":{"quant_algo":"W8A16"}}})", "config_groups.a.quant_algo",
       "NVFP4, FP8 and BF16 are supported"},
      {R"({"config_groups":{"a":{"lora_rank":32}}})", "config_groups.a.lora_rank", "SVDQuant"},
      {R"({"has_zero_point":true})", "has_zero_point", "without zero points"},
      {R"({"config_groups":{"a":{"weights":{"symmetric":false}}}})", groups + "symmetric",
       "without zero points"},
      {R"({"config_groups":{"a":{"weights":{"actorder":"group"}}}})", groups + "actorder",
       "weight and static"},
      {R"({"config_groups":{"a":{"weights":{"actorder":true}}}})", groups + "actorder",
       "weight and static"},
      {R"({"config_groups":{"a":{"weights":{"num_bits":4,"type":"float","group_size":64}}}})",
       groups + "group_size", "groups of 16"},
      {R"({"quant_algo":"W4A16_NVFP4","group_size":32})", "group_size", "groups of 16"},
      {R"({"quant_method":"gptq"})", "quant_method", "compressed-tensors, fp8 and modelopt"},
      {R"({"hadamard":"online"})", "hadamard", "this key is not known"},
      {R"({"quantized_layers":{"x":{"smooth":0.5}}})", "quantized_layers.x.smooth",
       "this key is not known"}};
  for (const auto& [json, field, words] : others) {
    expect_unsupported(with(json), "config.json", "quantization_config." + field, words);
    if (field.starts_with("extra_config") || field.starts_with("quant_method")) continue;
    expect_unsupported(with_hf(R"({"quantization":)" + json + "}"), "hf_quant_config.json",
                       "quantization." + field, words);
  }
  expect_unsupported(with_hf(R"({"rotate":true})"), "hf_quant_config.json", "rotate", "not known");
}

}  // namespace
}  // namespace dsfp4::testing
