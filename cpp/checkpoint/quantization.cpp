#include "checkpoint/quantization.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "checkpoint/config.h"
#include "checkpoint/file.h"
#include "checkpoint/json.h"
#include "dsfp4/error.h"
#include "format/weight.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::int64_t kAnySize = std::int64_t{1} << 24;

constexpr std::string_view kMethods[] = {"auto-round",       "compressed-tensors", "fp8",
                                         "intel/auto-round", "modelopt",           "modelopt_fp4"};

// Of ModelOpt. The tensors show which of these formats a matrix has. AWQ's scales are folded into
// the norm before, or are tensors, which leftovers.h refuses.
constexpr std::string_view kAlgorithms[] = {"FP8",
                                            "FP8_PB_WO",
                                            "FP8_PER_CHANNEL_PER_TOKEN",
                                            "MIXED_PRECISION",
                                            "MXFP4",
                                            "MXFP8",
                                            "NVFP4",
                                            "NVFP4_AWQ",
                                            "W4A16_NVFP4",
                                            "W4A8_MXFP4_FP8",
                                            "W4A8_NVFP4_FP8",
                                            "fp8_pb_real",
                                            "fp8_pb_wo",
                                            "mxfp4"};

// Keys that leave w * x as the tensors show it: which modules, which tool and how it calibrated,
// activations (they are not quantised here) and the KV cache. Sorted.
constexpr std::string_view kWithoutEffect[] = {"act_bits",
                                               "act_data_type",
                                               "act_dynamic",
                                               "act_group_size",
                                               "act_sym",
                                               "activation_scheme",
                                               "amp",
                                               "attention_input_activations",
                                               "autoround_version",
                                               "batch_size",
                                               "bits",
                                               "block_name_to_quantize",
                                               "block_structure",
                                               "data_type",
                                               "dynamic",
                                               "enable_minmax_tuning",
                                               "enable_norm_bias_tuning",
                                               "enable_quanted_input",
                                               "exclude_modules",
                                               "fmt",
                                               "format",
                                               "global_compression_ratio",
                                               "gradient_accumulate_steps",
                                               "ignore",
                                               "ignored_layers",
                                               "input_activations",
                                               "iters",
                                               "kv_cache_quant_algo",
                                               "kv_cache_scheme",
                                               "low_gpu_mem_usage",
                                               "lr",
                                               "minmax_lr",
                                               "modules_to_not_convert",
                                               "moe_quant_algo",
                                               "nsamples",
                                               "num_bits",
                                               "observer",
                                               "observer_kwargs",
                                               "output_activations",
                                               "packing_format",
                                               "pre_quant_scale",
                                               "producer",
                                               "provider",
                                               "quantization_status",
                                               "run_compressed",
                                               "scale_dtype",
                                               "scale_fmt",
                                               "seqlen",
                                               "static_attention_dtype",
                                               "static_attention_granularity",
                                               "static_kv_dtype",
                                               "static_kv_granularity",
                                               "strategy",
                                               "super_bits",
                                               "super_group_size",
                                               "sym",
                                               "targets",
                                               "to_quant_block_names",
                                               "type",
                                               "version",
                                               "zp_dtype"};

// Keys that are read below.
constexpr std::string_view kRead[] = {"actorder",     "config_groups",     "extra_config",
                                      "group_size",   "quant_algo",        "quant_method",
                                      "quantization", "quantized_layers",  "sparsity_config",
                                      "symmetric",    "weight_block_size", "weights"};

// Keys whose meaning is known and not supported, unless their value says nothing.
struct RefusedKey {
  std::string_view name;
  const char* supported;
};
constexpr RefusedKey kRefused[] = {
    {"has_zero_point", "weights without zero points are supported"},
    {"lora_rank", "SVDQuant is not supported; NVFP4 without it is"},
    {"moe_sparsity_config", "the same number of experts in every layer is supported"},
    {"rotation_config", "rotations are not supported; export the model without them"},
    {"transform_config",
     "rotations and other transforms are not supported; export the model "
     "without them"},
};

template <std::size_t N>
bool is_one_of(std::string_view name, const std::string_view (&names)[N]) {
  return std::ranges::find(names, name) != std::end(names);
}

// null, false, 0, "", [] and {}, and an object of nothing but these.
bool says_nothing(const JsonValue& value) {
  if (const auto* flag = std::get_if<bool>(&value.data)) return !*flag;
  if (const auto* number = std::get_if<std::int64_t>(&value.data)) return *number == 0;
  if (const auto* text = std::get_if<std::string>(&value.data)) return text->empty();
  if (value.array() != nullptr) return value.array()->empty();
  if (value.object() == nullptr) return value.is_null();
  return std::ranges::all_of(*value.object(),
                             [](const JsonMember& member) { return says_nothing(member.value); });
}

void check_keys(const Fields& fields) {
  for (const JsonMember& member : fields.members()) {
    if (says_nothing(member.value) || is_one_of(member.name, kWithoutEffect) ||
        is_one_of(member.name, kRead)) {
      continue;
    }
    for (const RefusedKey& refused : kRefused) {
      if (member.name == refused.name) fields.unsupported(member.name, refused.supported);
    }
    fields.unsupported(member.name,
                       "this key is not known and may change what is computed; remove it if it "
                       "does not");
  }
}

// ModelOpt: {"quant_algo": "NVFP4", "group_size": 16}
void check_algorithm(const Fields& fields) {
  const std::string algorithm = fields.text("quant_algo", "");
  if (algorithm.starts_with("NVFP4_SVD")) {
    fields.unsupported("quant_algo",
                       "SVDQuant adds low-rank matrices (svdquant_lora_a, svdquant_lora_b), which "
                       "is not supported; NVFP4 without it is");
  }
  if (!algorithm.empty() && !is_one_of(algorithm, kAlgorithms)) {
    fields.unsupported("quant_algo", "weights in NVFP4, FP8 and BF16 are supported");
  }
}

// compressed-tensors: columns in the order of their activations need an index (weight_g_idx), those
// that were only quantised in that order do not.
void check_order(const Fields& scheme) {
  const JsonValue* order = scheme.find("actorder");
  if (order == nullptr || says_nothing(*order)) return;
  const auto* text = std::get_if<std::string>(&order->data);
  if (text == nullptr || (*text != "weight" && *text != "static")) {
    scheme.unsupported("actorder", "weight and static are supported");
  }
}

void check_group_size(const Fields& scheme) {
  if (scheme.find("group_size") == nullptr) return;
  if (scheme.integer("group_size", -1, kAnySize) != format::kNvfp4Group) {
    scheme.unsupported("group_size", "NVFP4 is supported in groups of 16");
  }
}

// How some matrices are stored: {"quant_algo": "NVFP4", "group_size": 16}
void check_scheme(const Fields& scheme) {
  check_keys(scheme);
  check_algorithm(scheme);
  check_order(scheme);
  if (scheme.text("quant_algo", "").find("NVFP4") != std::string::npos) check_group_size(scheme);
  if (!scheme.boolean("symmetric", true)) {
    scheme.unsupported("symmetric", "weights without zero points are supported");
  }
}

// Each member of the object `name`, if there is one, is a scheme.
template <typename Check>
void check_each(const Fields& quantization, const char* name, const Check& check) {
  const auto schemes = quantization.object(name);
  if (!schemes) return;
  for (const JsonMember& member : schemes->members()) {
    check(Fields(member.value, quantization.file(), schemes->full_name(member.name)));
  }
}

// {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}
void check_config_group(const Fields& group) {
  check_scheme(group);
  const auto weights = group.object("weights");
  if (!weights) return;
  check_scheme(*weights);
  if (weights->integer("num_bits", 1, 64, 0) != 4 || weights->text("type", "") != "float") return;
  if (weights->find("group_size") == nullptr) return;
  // The tensors show that it is MXFP4.
  if (weights->integer("group_size", -1, kAnySize) != format::kMxfp4Group) {
    check_group_size(*weights);
  }
}

// DeepSeek: {"quant_method": "fp8", "weight_block_size": [128, 128]}
void check_fp8(const Fields& quantization) {
  const JsonValue* size = quantization.find("weight_block_size");
  if (size == nullptr) return;
  const JsonValue::Array* sides = size->array();
  if (sides == nullptr || sides->size() != 2) {
    quantization.fail("weight_block_size", "must be a list of two integers");
  }
  for (const JsonValue& side : *sides) {
    const auto* length = std::get_if<std::int64_t>(&side.data);
    if (length == nullptr) {
      quantization.fail("weight_block_size", "must be a list of two integers");
    }
    if (*length != format::kFp8Tile) {
      quantization.unsupported("weight_block_size", "FP8 is supported in tiles of [128, 128]");
    }
  }
}

void check_sparsity(const Fields& quantization) {
  const auto sparsity = quantization.object("sparsity_config");
  if (sparsity && sparsity->text("format", "dense") != "dense") {
    sparsity->unsupported("format", "dense weights are supported");
  }
}

void check_whole(const Fields& quantization) {
  const std::string method = quantization.text("quant_method", "");
  if (!method.empty() && !is_one_of(method, kMethods)) {
    quantization.unsupported("quant_method",
                             "auto-round, compressed-tensors, fp8 and modelopt are supported");
  }
  check_scheme(quantization);
  check_each(quantization, "quantized_layers", check_scheme);
  check_each(quantization, "extra_config", check_scheme);
  check_each(quantization, "config_groups", check_config_group);
  check_fp8(quantization);
  check_sparsity(quantization);
}

}  // namespace

void check_quantization(const std::filesystem::path& folder, const Fields& config) {
  if (const auto quantization = config.object("quantization_config")) check_whole(*quantization);
  const std::filesystem::path path = folder / "hf_quant_config.json";
  if (const auto text = read_file_if_exists(path, kMaxConfigBytes)) {
    const JsonValue root = parse_json_tree(*text, path.string());
    const Fields fields(root, path.string());
    check_keys(fields);
    if (const auto quantization = fields.object("quantization")) check_whole(*quantization);
  }
}

}  // namespace dsfp4::checkpoint
