#include "checkpoint/quantization.h"

#include <optional>
#include <string>

#include "checkpoint/config.h"
#include "checkpoint/file.h"
#include "checkpoint/json.h"
#include "format/weight.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::int64_t kAnySize = std::int64_t{1} << 24;

void check_group_size(const Fields& scheme) {
  if (scheme.find("group_size") == nullptr) return;
  if (scheme.integer("group_size", -1, kAnySize) != format::kNvfp4Group) {
    scheme.unsupported("group_size", "NVFP4 is supported in groups of 16");
  }
}

// ModelOpt: {"quant_algo": "NVFP4", "group_size": 16}, also one a layer in "quantized_layers".
void check_modelopt(const Fields& quantization) {
  if (quantization.text("quant_algo", "") == "NVFP4") check_group_size(quantization);
  const auto layers = quantization.object("quantized_layers");
  if (!layers) return;
  for (const JsonMember& layer : *quantization.find("quantized_layers")->object()) {
    const Fields scheme(layer.value, quantization.file(), layers->full_name(layer.name));
    if (scheme.text("quant_algo", "") == "NVFP4") check_group_size(scheme);
  }
}

// {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}}
void check_config_groups(const Fields& quantization) {
  const auto groups = quantization.object("config_groups");
  if (!groups) return;
  for (const JsonMember& member : *quantization.find("config_groups")->object()) {
    const Fields group(member.value, quantization.file(), groups->full_name(member.name));
    const auto weights = group.object("weights");
    if (!weights || weights->integer("num_bits", 1, 64, 0) != 4) continue;
    if (weights->text("type", "") == "float") check_group_size(*weights);
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

}  // namespace

void check_quantization(const std::filesystem::path& folder, const Fields& config) {
  if (const auto quantization = config.object("quantization_config")) {
    check_modelopt(*quantization);
    check_config_groups(*quantization);
    check_fp8(*quantization);
  }
  const std::filesystem::path path = folder / "hf_quant_config.json";
  if (const auto text = read_file_if_exists(path, kMaxConfigBytes)) {
    const JsonValue root = parse_json_tree(*text, path.string());
    const Fields fields(root, path.string());
    if (const auto quantization = fields.object("quantization")) check_modelopt(*quantization);
  }
}

}  // namespace dsfp4::checkpoint
