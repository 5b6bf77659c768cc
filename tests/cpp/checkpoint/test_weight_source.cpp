// Matrices whose scales are missing or of another kind: the error says which format was recognised
// and what there is to do.
#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/malformed.h"

namespace dsfp4::testing {
namespace {

using Shape = std::vector<std::int64_t>;

class WeightSources : public Malformed {
 protected:
  WeightSources() { sound_.index = JsonNode::raw(""); }

  // `part` of a matrix out of the way.
  TinyCheckpoint without(const std::string& tensor) const {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.shards.back().rename(tensor, "mtp.0." + tensor);
    return checkpoint;
  }

  TinyCheckpoint with(const std::string& old, const std::string& tensor, const char* dtype,
                      const Shape& shape) const {
    TinyCheckpoint checkpoint = without(old);
    checkpoint.shards.back().add(tensor, dtype, shape);
    return checkpoint;
  }

  // Matrices of [16, 32].
  const std::string fp8_ = "model.layers.1.self_attn.q_a_proj";
  const std::string nvfp4_ = "model.layers.1.mlp.experts.3.gate_proj";
  const std::string packed_ = "model.layers.1.mlp.shared_experts.up_proj";  // of kCompressed
};

TEST_F(WeightSources, ScalesThatAreMissing) {
  expect_refused(without(fp8_ + ".weight_scale_inv"), kShard, fp8_ + ".weight_scale_inv",
                 "is missing: '" + fp8_ + ".weight' is F8_E4M3 [16, 32], so FP8, which needs it");
  expect_refused(without(nvfp4_ + ".weight_scale"), kShard, nvfp4_ + ".weight_scale",
                 "is U8 [16, 16], so FP4 (two values a byte), which needs it");
  expect_refused(without(nvfp4_ + ".weight_scale_2"), kShard, nvfp4_ + ".weight_scale_2",
                 "so NVFP4, which needs it");
  // compressed-tensors' name of the global scale beside ModelOpt's name of the weight
  expect_refused(with(nvfp4_ + ".weight_scale_2", nvfp4_ + ".weight_global_scale", "F32", {1}),
                 kShard, nvfp4_ + ".weight_scale_2", "so NVFP4, which needs it");
}

TEST_F(WeightSources, ScalesInAShardThatIsNotThere) {
  for (const std::string& name : {fp8_ + ".weight_scale_inv", nvfp4_ + ".weight_scale"}) {
    TinyCheckpoint checkpoint = without(name);
    checkpoint.index = JsonNode::object(
        {{"weight_map", JsonNode::object({{"lm_head.weight", JsonNode::text(kShard)},
                                          {"model.norm.weight",
                                           JsonNode::text("model-00001-of-00002.safetensors")},
                                          {name, JsonNode::text("model-3.safetensors")}})}});
    expect_refused(checkpoint, "model-3.safetensors", name, "download it");
  }
}

TEST_F(WeightSources, Fp8WithScalesOfOtherKinds) {
  const std::string inverse = fp8_ + ".weight_scale_inv", plain = fp8_ + ".weight_scale";
  const std::string works = "FP8 is supported with weight_scale_inv, F32 [1, 1]";
  const struct {
    std::string tensor;
    const char* dtype;
    Shape shape;
    std::string words;
  } kinds[] = {{plain, "F32", {}, "is F32 [], one FP8 scale for the whole matrix; " + works},
               {plain, "F32", {1}, "one FP8 scale for the whole matrix"},
               {plain, "BF16", {16, 1}, "an FP8 scale for each row; " + works},
               {plain, "F32", {16}, "an FP8 scale for each row"},
               {plain, "BF16", {1, 1}, "FP8 scales of tiles under another name; " + works},
               {plain, "F32", {16, 2}, "FP8 scales of no known kind; " + works},
               {inverse, "BF16", {1, 1}, "is BF16 [1, 1], the scales of an FP8 matrix; " + works},
               {inverse, "F8_E8M0", {1, 1}, "the scales of an FP8 matrix"},
               {inverse, "U8", {1, 1}, "the scales of an FP8 matrix"}};
  for (const auto& [tensor, dtype, shape, words] : kinds) {
    expect_unsupported(with(inverse, tensor, dtype, shape), kShard, tensor, words);
  }
  expect_refused(with(inverse, inverse, "F32", {2, 1}), kShard, inverse,
                 "it must be F32 [1, 1], the scales of the FP8 matrix '" + fp8_ + ".weight'");
}

TEST_F(WeightSources, Fp4OfOtherKinds) {
  const std::string scales = nvfp4_ + ".weight_scale";
  for (const char* dtype : {"U8", "F8_E8M0"}) {
    expect_unsupported(with(scales, scales, dtype, {16, 1}), kShard, scales,
                       "[16, 1], so MXFP4, a power of two for 32 columns; NVFP4 is supported: "
                       "F8_E4M3 [16, 2]");
  }
  expect_refused(with(scales, scales, "U8", {16, 2}), kShard, scales,
                 "it must be F8_E4M3 [16, 2], the block scales of the NVFP4 matrix");
  expect_refused(with(nvfp4_ + ".weight", nvfp4_ + ".weight", "U8", {16, 32}), kShard,
                 nvfp4_ + ".weight", "it must be U8 [16, 16], two FP4 values a byte");
}

TEST_F(WeightSources, PackedFp4OfOtherKinds) {
  sound_ = make_tiny_checkpoint(TinyKind::kCompressed);
  const std::string packed = packed_ + ".weight_packed";
  expect_refused(with(packed, packed, "I32", {16, 4}), "model.safetensors", packed,
                 "it must be U8 [16, 16], two FP4 values a byte");
  expect_unsupported(with(packed_ + ".weight_scale", packed_ + ".weight_scale", "U8", {16, 1}),
                     "model.safetensors", packed_ + ".weight_scale", "MXFP4");
  expect_refused(without(packed_ + ".weight_global_scale"), "model.safetensors",
                 packed_ + ".weight_global_scale", "so NVFP4, which needs it");
}

TEST_F(WeightSources, ModulesWithoutAWeight) {
  TinyCheckpoint gptq = with(fp8_ + ".weight", fp8_ + ".qweight", "I32", {4, 16});
  gptq.shards.back().add(fp8_ + ".qzeros", "I32", {1, 2});
  expect_refused(gptq, kShard, fp8_ + ".weight",
                 "no format that is known here: weight_scale_inv (F32), qweight (I32), qzeros "
                 "(I32); NVFP4, FP8, BF16 and F32 are");
  for (int i = 0; i < 1000; ++i) {
    gptq.shards.back().add(fp8_ + ".part" + std::to_string(i), "U8", {1});
  }
  const Refusal many = open(gptq);
  EXPECT_NE(many.message.find("part4 (U8), ...; NVFP4"), std::string::npos) << many.message;
}

}  // namespace
}  // namespace dsfp4::testing
