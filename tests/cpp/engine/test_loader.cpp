// Scales and other values that are no numbers: found when weights are loaded, and told with file,
// tensor and byte.
#include <string>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "dsfp4/model.h"
#include "engine/loader.h"

namespace dsfp4::testing {
namespace {

// What loading said after `bytes` were put `at` bytes into the data of tensor `name`; the tensor
// and byte of the error are checked.
std::string load_with(TinyKind kind, const std::string& name, std::size_t at,
                      const std::string& bytes) {
  TinyCheckpoint checkpoint = make_tiny_checkpoint(kind);
  std::size_t byte_of_file = 0;
  for (TinyShard& shard : checkpoint.shards) {
    JsonNode* tensor = shard.header.find(name);
    if (tensor == nullptr) continue;
    const std::size_t begin = std::stoul(tensor->find("data_offsets")->members[0].value.token) + at;
    shard.data.replace(begin, bytes.size(), bytes);
    byte_of_file = TinyCheckpoint::file_of(shard).size() - shard.data.size() + begin;
  }
  EXPECT_GT(byte_of_file, 0u) << "no tensor " << name;
  const ScratchFolder folder;
  checkpoint.write(folder.path());
  try {
    LoadOptions options;
    options.threads = 1;
    Model::load(folder.path(), options);
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.tensor(), name);
    EXPECT_EQ(error.offset(), static_cast<std::int64_t>(byte_of_file));
    return error.what();
  }
  return "";
}

constexpr const char* kNumbers[] = {"\x00\x00\xc0\x7f", "\x00\x00\x80\x7f", "\x00\x00\x80\xff",
                                    "\x00\x00\x80\xbf", "\x00\x00\x00\x00", "\x00\x00\x00\x80"};

TEST(LoaderScales, OfWholeTensors) {
  for (const std::string name : {"model.layers.1.mlp.experts.3.up_proj.weight_global_scale",
                                 "model.layers.0.self_attn.k_proj.k_scale"}) {
    for (const char* bytes : kNumbers) {
      EXPECT_NE(load_with(TinyKind::kCompressed, name, 0, std::string(bytes, 4)), "");
    }
    EXPECT_EQ(load_with(TinyKind::kCompressed, name, 0, std::string("\x00\x00\x80\x3f", 4)), "");
  }
  // compressed-tensors stores the reciprocal, and 1 / 2^-149 is infinite.
  EXPECT_NE(
      load_with(TinyKind::kCompressed, "model.layers.1.mlp.experts.3.up_proj.weight_global_scale",
                0, std::string("\x01\x00\x00\x00", 4)),
      "");
}

TEST(LoaderScales, OfBlocks) {
  for (const char* code : {"\x7f", "\xff"}) {
    EXPECT_NE(
        load_with(TinyKind::kNvfp4, "model.layers.1.mlp.experts.2.down_proj.weight_scale", 5, code),
        "");
    EXPECT_NE(
        load_with(TinyKind::kCompressed, "model.layers.0.mlp.gate_proj.weight_scale", 0, code), "");
  }
  EXPECT_EQ(
      load_with(TinyKind::kNvfp4, "model.layers.1.mlp.experts.2.down_proj.weight_scale", 5, "\x7e"),
      "");
  const std::string tiles = "model.layers.0.self_attn.q_a_proj.weight_scale_inv";
  for (const char* bytes : {"\x00\x00\xc0\x7f", "\x00\x00\x80\x7f", "\x00\x00\x80\xff"}) {
    EXPECT_NE(load_with(TinyKind::kNvfp4, tiles, 0, std::string(bytes, 4)), "");
  }
  EXPECT_EQ(load_with(TinyKind::kNvfp4, tiles, 0, std::string("\x00\x00\x80\x3f", 4)), "");
}

// One of them spoils a whole layer, or the choice of experts, and no logit need show it.
TEST(LoaderValues, OfNormsAndRouters) {
  const std::string layer = "model.layers.1.";
  for (const std::string& name :
       {layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight",
        layer + "self_attn.q_a_layernorm.weight", layer + "self_attn.kv_a_layernorm.weight",
        std::string("model.norm.weight"), layer + "mlp.gate.weight"}) {
    for (const char* bytes : {"\xc0\x7f", "\x80\x7f", "\x80\xff"}) {  // NaN, infinity, -infinity
      const std::string message = load_with(TinyKind::kNvfp4, name, 6, std::string(bytes, 2));
      EXPECT_NE(message.find("value 3 of "), std::string::npos) << name << message;
    }
    EXPECT_EQ(load_with(TinyKind::kNvfp4, name, 6, std::string("\x7f\x7f", 2)), "");
  }
  for (const char* bytes : {"\x00\x00\xc0\x7f", "\x00\x00\x80\x7f", "\x00\x00\x80\xff"}) {
    const std::string bias = layer + "mlp.gate.e_score_correction_bias";
    EXPECT_NE(load_with(TinyKind::kNvfp4, bias, 8, std::string(bytes, 4)).find("value 2 of 4"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace dsfp4::testing
