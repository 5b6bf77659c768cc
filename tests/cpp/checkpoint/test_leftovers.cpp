// Tensors that no role takes: those of published checkpoints pass, any other is named.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "checkpoint/leftovers.h"
#include "checkpoint/malformed.h"
#include "checkpoint/shard_index.h"

namespace dsfp4::testing {
namespace {

// Its names in no index, so that tensors may be added and renamed.
TinyCheckpoint without_index(TinyKind kind) {
  TinyCheckpoint checkpoint = make_tiny_checkpoint(kind);
  checkpoint.index = JsonNode::raw("");
  return checkpoint;
}

class Leftovers : public Malformed {
 protected:
  Leftovers() { sound_ = without_index(TinyKind::kNvfp4); }

  TinyCheckpoint with(const std::string& tensor, const char* dtype = "BF16",
                      const std::vector<std::int64_t>& shape = {1}) const {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.shards.back().add(tensor, dtype, shape);
    return checkpoint;
  }

  const std::string mlp_ = "model.layers.0.mlp.down_proj";             // NVFP4
  const std::string attention_ = "model.layers.0.self_attn.q_a_proj";  // FP8
};

std::string join(const std::string& module, const std::string& part) { return module + "." + part; }

TEST_F(Leftovers, KnownToHaveNoEffect) {
  for (const std::string name :
       {"mtp.0.norm.weight", "model.mtp.eh_proj.weight", "vision.patch_embed.proj.weight",
        "model.vision_tower.blocks.0.norm.weight", "aligner.w1.weight", "image_newline",
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.v_proj.v_scale", "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.v_scale", "model.layers.0.self_attn.q_scale"}) {
    EXPECT_EQ(open(with(name)).message, "");
  }
  for (const std::string& module : {mlp_, attention_, std::string("lm_head")}) {
    EXPECT_EQ(open(with(module + ".input_scale")).message, "");
    EXPECT_EQ(open(with(module + ".input_global_scale")).message, "");
  }
  for (const std::string scale :
       {"weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"}) {
    EXPECT_EQ(open(with("lm_head." + scale)).message, "");  // beside a BF16 matrix
    EXPECT_EQ(open(with("model.layers.1.mlp.gate." + scale)).message, "");
  }
}

TEST_F(Leftovers, AnyOtherIsNamed) {
  const struct {
    std::string name, words;
  } others[] = {{mlp_ + ".pre_quant_scale", "NVFP4 without AWQ is"},
                {attention_ + ".pre_quant_scale", "NVFP4 without AWQ is"},
                {"lm_head.pre_quant_scale", "NVFP4 without AWQ is"},
                {mlp_ + ".weight_quantizer._svdquant_lora_a", "NVFP4 without SVDQuant is"},
                {mlp_ + ".svdquant_lora_b", "NVFP4 without SVDQuant is"},
                {attention_ + ".v_input.weight", "export the model without transforms"},
                {attention_ + ".R1_output.weight", "export the model without transforms"},
                {mlp_ + ".lora_A.weight", "merge it"},
                {attention_ + ".bias", "layers have none"},
                {"model.layers.0.self_attn.indexer.wk.weight", "indexer"},
                {mlp_ + ".weight_zero_point", "is not used here"},
                {mlp_ + ".weight_g_idx", "is not used here"},
                {mlp_ + ".weight_scale_inv", "is not used here"},    // beside NVFP4
                {attention_ + ".weight_scale", "is not used here"},  // beside FP8
                {"model.layers.0.mlp.k_scale", "is not used here"},  // no KV cache there
                {"model.layers.0.self_attn.q_proj.weight", "is not used here"},
                {"model.layers.1.mlp.experts.4.up_proj.weight", "is not used here"},
                {"model.layers.01.mlp.up_proj.weight", "is not used here"},
                {"model.layers.0.mlp.gate.e_score_correction_bias", "is not used here"},
                {"mtpx.weight", "is not used here"},
                {"weight", "is not used here"}};
  for (const auto& [name, words] : others) expect_unsupported(with(name), kShard, name, words);
}

TEST_F(Leftovers, OfTheConfiguration) {
  TinyCheckpoint tied = without_index(TinyKind::kBf16);
  tied.shards[0].add("lm_head.weight", "BF16", {32, 32});
  expect_unsupported(tied, "model.safetensors", "lm_head.weight", "tie_word_embeddings");
  tied = without_index(TinyKind::kBf16);  // its router is V2's, which knows no bias
  const std::string bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  tied.shards[0].add(bias, "F32", {4});
  expect_unsupported(tied, "model.safetensors", bias, "is not used here");
}

TEST_F(Leftovers, LayersBeyondTheLastAreMtpOrAnError) {
  const std::string beyond = "model.layers.2.mlp.up_proj.weight";
  expect_refused(with(beyond), kShard, beyond, "beyond num_hidden_layers, 2");
  for (const char* mark : {"eh_proj.weight", "enorm.weight", "shared_head.norm.weight"}) {
    TinyCheckpoint mtp = with(beyond);
    mtp.shards.front().add(std::string("model.layers.2.") + mark, "BF16", {1});
    EXPECT_EQ(open(mtp).message, "");
    mtp.shards.front().add("model.layers.3.mlp.up_proj.weight", "BF16", {1});
    expect_refused(mtp, sound_.shards.front().name, "model.layers.3.mlp.up_proj.weight");
  }
  TinyCheckpoint shorter = sound_;
  shorter.config.set("num_hidden_layers", JsonNode::number(1));
  expect_refused(shorter, kShard, "model.layers.1.input_layernorm.weight", "beyond");
}

TEST_F(Leftovers, InShardsThatAreNotThere) {
  const auto elsewhere = [](const std::string& tensor) {
    TinyCheckpoint checkpoint = make_tiny_checkpoint(TinyKind::kNvfp4);
    checkpoint.index.find("weight_map")->set(tensor, JsonNode::text("model-3.safetensors"));
    return checkpoint;
  };
  for (const std::string& name : {mlp_ + ".pre_quant_scale", attention_ + ".weight_zero_point",
                                  std::string("model.layers.0.self_attn.k_proj.k_scale")}) {
    expect_refused(elsewhere(name), "model-3.safetensors", name, "download it");
  }
  for (const std::string& name : {mlp_ + ".input_scale", std::string("mtp.0.norm.weight"),
                                  std::string("model.layers.2.eh_proj.weight")}) {
    EXPECT_EQ(open(elsewhere(name)).message, "");
  }
}

TEST_F(Leftovers, AdaptersOfTheirOwn) {
  TinyShard adapter{"adapter_model.safetensors", JsonNode::object({}), ""};
  adapter.add("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "F32", {1, 4});
  TinyCheckpoint checkpoint = sound_;
  checkpoint.shards.push_back(adapter);
  EXPECT_EQ(open(checkpoint).message, "");
  checkpoint.shards.back().name = "other.safetensors";
  std::filesystem::remove(folder_.path() / adapter.name);
  expect_unsupported(checkpoint, "other.safetensors",
                     "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "merge it");
}

// ---- by the names of an index alone -------------------------------------------------------------

class NeededShards : public Malformed {
 protected:
  // An index that has the sound checkpoint's names and these besides, each in a shard of its own
  // that is not there, as no other shard is.
  std::vector<std::string> needed(const std::vector<std::string>& others) {
    TinyCheckpoint checkpoint = make_tiny_checkpoint(TinyKind::kNvfp4);
    checkpoint.shards.clear();
    int number = 3;
    for (const std::string& name : others) {
      const std::string shard = "model-0000" + std::to_string(number++) + ".safetensors";
      checkpoint.index.find("weight_map")->set(name, JsonNode::text(shard));
    }
    checkpoint.write(folder_.path());
    const auto config = checkpoint::read_config(folder_.path());
    const auto index = checkpoint::read_shard_index(folder_.path());
    if (!index) throw std::logic_error("the checkpoint was written without its index");
    return checkpoint::needed_shards(*index, config);
  }

  const std::string first_ = "model-00001-of-00002.safetensors";
};

TEST_F(NeededShards, HoldATensorThatMayBeUsed) {
  const std::vector<std::string> sound = {first_, kShard};
  EXPECT_EQ(needed({}), sound);
  // One shard of the MTP layer has none of the parts that mark it.
  EXPECT_EQ(needed({"model.layers.2.mlp.experts.0.up_proj.weight", "model.layers.2.eh_proj.weight",
                    "mtp.0.norm.weight", "vision.patch_embed.proj.weight"}),
            sound);
  EXPECT_EQ(needed({"model.layers.0.mlp.down_proj.input_scale", "model.rotary_emb.inv_freq",
                    "model.layers.0.self_attn.v_proj.v_scale"}),
            sound);
  // Layers take the first; only the dtype of its neighbour tells of the second.
  for (const char* name :
       {"model.layers.0.self_attn.k_proj.k_scale", "lm_head.weight_scale", "lm_head.other"}) {
    const std::vector<std::string> more = {first_, kShard, "model-00003.safetensors"};
    EXPECT_EQ(needed({name}), more) << name;
  }
}

TEST_F(NeededShards, OfWhatCannotBeRunAreNone) {
  const auto refusal = [&](const std::string& name) -> std::string {
    try {
      needed({name});
    } catch (const UnsupportedError& error) {
      return error.what();
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.tensor(), name);
      return error.what();
    }
    return "accepted";
  };
  const struct {
    std::string name, words;
  } names[] = {{"model.layers.0.self_attn.indexer.wk.weight", "indexer"},
               {"model.layers.0.mlp.down_proj.pre_quant_scale", "NVFP4 without AWQ is"},
               {"model.layers.0.self_attn.q_a_proj.bias", "layers have none"},
               {"model.layers.2.mlp.up_proj.weight", "beyond num_hidden_layers, 2"}};
  for (const auto& [name, words] : names) {
    EXPECT_NE(refusal(name).find(words), std::string::npos) << refusal(name);
    EXPECT_NE(refusal(name).find(kIndex), std::string::npos) << refusal(name);
  }
}

// ---- published checkpoints ----------------------------------------------------------------------

// The published MTP layer; `scales` are the parts that its quantised matrices have besides.
void add_mtp_layer(TinyShard& shard, const std::vector<std::string>& scales) {
  const std::string layer = "model.layers.2";
  for (const char* part : {"embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.head",
                           "shared_head.norm", "input_layernorm", "post_attention_layernorm",
                           "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "mlp.gate"}) {
    shard.add(join(join(layer, part), "weight"), "BF16", {1});
  }
  shard.add(layer + ".mlp.gate.e_score_correction_bias", "F32", {1});
  for (const char* part :
       {"self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.experts.0.gate_proj",
        "mlp.experts.0.up_proj", "mlp.experts.0.down_proj", "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"}) {
    shard.add(join(join(layer, part), "weight"), "F8_E4M3", {1});
    for (const std::string& scale : scales) {
      shard.add(join(join(layer, part), scale), "F32", {1});
    }
  }
}

void add_beside_nvfp4(TinyCheckpoint& checkpoint, const std::string& part) {
  constexpr std::string_view kGlobal = ".weight_scale_2\"";
  for (TinyShard& shard : checkpoint.shards) {
    std::vector<std::string> modules;
    for (const JsonNode::Member& member : shard.header.members) {
      if (member.key.ends_with(kGlobal)) {
        modules.push_back(member.key.substr(1, member.key.size() - 1 - kGlobal.size()));
      }
    }
    ASSERT_FALSE(modules.empty());
    for (const std::string& module : modules) shard.add(join(module, part), "F32", {});
  }
}

// DeepSeek-V3, R1, V3.1: FP8 with an FP8 MTP layer; R1-FP4, V3-0324-FP4: input_scale and a BF16 MTP
// layer; V3.1-NVFP4: scales of an FP8 cache as well.
TEST_F(Leftovers, NamesOfPublishedCheckpoints) {
  TinyCheckpoint fp8 = sound_;
  add_mtp_layer(fp8.shards.back(), {"weight_scale_inv"});
  EXPECT_EQ(open(fp8).message, "");

  TinyCheckpoint nvfp4 = sound_;
  add_beside_nvfp4(nvfp4, "input_scale");
  TinyCheckpoint v31 = nvfp4;
  add_mtp_layer(nvfp4.shards.back(), {});
  EXPECT_EQ(open(nvfp4).message, "");

  add_mtp_layer(v31.shards.back(), {"weight_scale", "weight_scale_2", "input_scale"});
  for (const char* layer : {"model.layers.0", "model.layers.1", "model.layers.2"}) {
    for (const char* part : {"self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"}) {
      v31.shards.back().add(join(layer, part), "F32", {});
    }
  }
  EXPECT_EQ(open(v31).message, "");
}

TEST_F(Leftovers, NamesOfPublishedV2) {
  EXPECT_EQ(open(without_index(TinyKind::kBf16)).message, "");
}

}  // namespace
}  // namespace dsfp4::testing
