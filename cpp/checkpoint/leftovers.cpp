#include "checkpoint/leftovers.h"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

using format::DType;

class UsedTensors {
 public:
  UsedTensors(const Catalogue& catalogue, const ModelLayout& layout)
      : catalogue_(catalogue), used_(catalogue.tensors().size()) {
    add(layout.embed_tokens);
    add(layout.lm_head);
    add(layout.norm);
    for (const LayerSource& layer : layout.layers) add(layer);
  }

  bool contains(std::size_t tensor) const { return used_[tensor]; }

 private:
  void add(const TensorInfo* tensor) {
    if (tensor == nullptr) return;
    used_[static_cast<std::size_t>(tensor - catalogue_.tensors().data())] = true;
  }
  void add(const WeightSource& source) {
    add(source.data);
    add(source.scales);
    add(source.global_scale);
  }
  void add(const MlpSource& mlp) {
    add(mlp.gate_proj);
    add(mlp.up_proj);
    add(mlp.down_proj);
  }
  void add(const AttentionSource& attention) {
    for (const WeightSource* matrix :
         {&attention.q_proj, &attention.q_a_proj, &attention.q_b_proj,
          &attention.kv_a_proj_with_mqa, &attention.kv_b_proj, &attention.o_proj}) {
      add(*matrix);
    }
    for (const TensorInfo* vector :
         {attention.q_a_layernorm, attention.kv_a_layernorm, attention.k_scale}) {
      add(vector);
    }
  }
  void add(const LayerSource& layer) {
    add(layer.input_layernorm);
    add(layer.post_attention_layernorm);
    add(layer.self_attn);
    add(layer.mlp);
    add(layer.gate);
    add(layer.e_score_correction_bias);
    for (const MlpSource& expert : layer.experts) add(expert);
    add(layer.shared_experts);
  }

  const Catalogue& catalogue_;
  std::vector<bool> used_;
};

template <std::size_t N>
bool is_one_of(std::string_view name, const std::string_view (&names)[N]) {
  return std::ranges::find(names, name) != std::end(names);
}

// A tensor's name, taken apart: "model.layers.3.mlp.up_proj.weight" is of module
// "model.layers.3.mlp.up_proj", of layer 3, and its part there is "weight".
struct Name {
  explicit Name(std::string_view name) : whole(name) {
    const std::size_t dot = name.rfind('.');
    module = dot == name.npos ? "" : name.substr(0, dot);
    part = dot == name.npos ? name : name.substr(dot + 1);
    constexpr std::string_view kLayers = "model.layers.";
    if (!name.starts_with(kLayers)) return;
    const std::string_view rest = name.substr(kLayers.size());
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
    if (error != std::errc() || end == rest.data() + rest.size() || *end != '.') return;
    layer = number;
    const std::string_view inside = rest.substr(static_cast<std::size_t>(end - rest.data()) + 1);
    in_layer = inside.substr(0, inside.find('.'));
  }

  std::string_view whole, module, part;
  std::int64_t layer = -1;    // -1: of none
  std::string_view in_layer;  // "self_attn", "mlp", "eh_proj", ...
};

// Beside the layers: drafters and images, as "mtp.0.norm.weight" or "model.vision.patch.weight".
bool is_outside_the_decoder(std::string_view name) {
  constexpr std::string_view kModel = "model.";
  if (name.starts_with(kModel)) name.remove_prefix(kModel.size());
  const std::string_view first = name.substr(0, name.find('.'));
  constexpr std::string_view kParts[] = {"mtp",          "mtp_layers",   "vision",
                                         "vision_model", "vision_tower", "visual",
                                         "aligner",      "projector",    "multi_modal_projector"};
  return is_one_of(first, kParts) || first.starts_with("image_");
}

// Of the scales of the KV cache, layers take k_proj's.
bool is_activation_or_cache_scale(const Name& name) {
  constexpr std::string_view kActivations[] = {"input_scale", "input_global_scale"};
  constexpr std::string_view kCache[] = {"q_scale", "k_scale", "v_scale"};
  return is_one_of(name.part, kActivations) ||
         (is_one_of(name.part, kCache) && name.in_layer == "self_attn" &&
          !name.whole.ends_with(".self_attn.k_proj.k_scale"));
}

// Tensors that decoding does not need, by name. All names of the checkpoint are shown first: a
// layer beyond the last is an MTP layer by its parts.
class NamesWithoutUse {
 public:
  explicit NamesWithoutUse(std::int64_t layers) : layers_(layers) {}

  void show(const Name& name) {
    constexpr std::string_view kMtp[] = {"eh_proj", "enorm", "hnorm", "shared_head"};
    if (is_beyond(name) && is_one_of(name.in_layer, kMtp)) mtp_layers_.insert(name.layer);
  }

  bool contains(const Name& name) const {
    if (is_beyond(name)) return mtp_layers_.contains(name.layer);
    return is_outside_the_decoder(name.whole) || name.whole.ends_with("rotary_emb.inv_freq") ||
           is_activation_or_cache_scale(name);
  }

  bool is_beyond(const Name& name) const { return name.layer >= layers_; }

  std::string describe_beyond() const {
    return "is of a layer beyond num_hidden_layers, " + std::to_string(layers_) +
           " in config.json, that is no MTP layer (it has no eh_proj)";
  }

 private:
  std::int64_t layers_;
  std::set<std::int64_t> mtp_layers_;
};

// A weight that was converted back to BF16 and kept its scales.
bool is_stale_weight_scale(const Catalogue& catalogue, const Name& name) {
  constexpr std::string_view kScales[] = {"weight_scale", "weight_scale_inv", "weight_scale_2",
                                          "weight_global_scale"};
  if (!is_one_of(name.part, kScales)) return false;
  const TensorInfo* weight = catalogue.find(std::string(name.module) + ".weight");
  return weight != nullptr && (weight->dtype == DType::kBF16 || weight->dtype == DType::kF32);
}

// Says what a tensor of that name is that no role takes; empty if only its neighbours can tell.
std::string_view describe_unsupported(const Name& name) {
  const auto has = [&](std::string_view text) { return name.whole.find(text) != name.whole.npos; };
  if (name.part == "pre_quant_scale" || name.part == "_pre_quant_scale") {
    return "scales what its matrix is multiplied with (AWQ, as in ModelOpt's NVFP4_AWQ), which is "
           "not supported; NVFP4 without AWQ is";
  }
  if (has("svdquant_lora")) {
    return "is a low-rank matrix that is added to its own (SVDQuant), which is not supported; "
           "NVFP4 without SVDQuant is";
  }
  if (has("lora_A") || has("lora_B")) {
    return "is of a LoRA adapter among the model's own weights, which is not supported; merge it "
           "into them";
  }
  const bool transform = name.module.ends_with("_input") || name.module.ends_with("_output");
  if ((transform && name.part == "weight") || has("rotation") || has("hadamard")) {
    return "is a rotation or another transform beside its matrix (transform_config), which is not "
           "supported; export the model without transforms";
  }
  if (name.part == "bias") return "is a bias; layers have none here";
  if (has(".indexer.")) return "is of sparse attention's indexer, which is not supported";
  return "";
}

std::string describe_leftover(const Name& name) {
  const std::string_view known = describe_unsupported(name);
  if (!known.empty()) return std::string(known);
  return "is not used here and not known to be without effect; a model that needs it is not "
         "supported";
}

class LeftoverCheck {
 public:
  LeftoverCheck(const Catalogue& catalogue, const ModelConfig& config)
      : catalogue_(catalogue), unused_(config.num_hidden_layers) {
    for (const TensorInfo& tensor : catalogue.tensors()) unused_.show(Name(tensor.name));
    for (const std::string_view name : catalogue.absent_tensors()) unused_.show(Name(name));
  }

  void check(const TensorInfo& tensor) const {
    const Name name(tensor.name);
    if (is_known(name) || is_in_adapter(tensor)) return;
    if (unused_.is_beyond(name)) catalogue_.fail(tensor, unused_.describe_beyond());
    if (tensor.name == "lm_head.weight") {
      catalogue_.unsupported(tensor,
                             "is a head of its own beside tie_word_embeddings in "
                             "config.json; set it to false if this is the head");
    }
    catalogue_.unsupported(tensor, describe_leftover(name));
  }

  void check_absent(std::string_view absent) const {
    if (!is_known(Name(absent))) catalogue_.require(absent);
  }

 private:
  bool is_known(const Name& name) const {
    if (unused_.is_beyond(name)) return unused_.contains(name);
    return unused_.contains(name) || is_stale_weight_scale(catalogue_, name);
  }

  // PEFT's files, whose names its loaders fix.
  bool is_in_adapter(const TensorInfo& tensor) const {
    return catalogue_.files().at(tensor.file).filename().string().starts_with("adapter_model");
  }

  const Catalogue& catalogue_;
  NamesWithoutUse unused_;
};

}  // namespace

void check_leftovers(const Catalogue& catalogue, const ModelConfig& config,
                     const ModelLayout& layout) {
  const UsedTensors used(catalogue, layout);
  const LeftoverCheck leftover(catalogue, config);
  const std::vector<TensorInfo>& tensors = catalogue.tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!used.contains(i)) leftover.check(tensors[i]);
  }
  for (const std::string_view absent : catalogue.absent_tensors()) leftover.check_absent(absent);
}

std::vector<std::string> needed_shards(const ShardIndex& index, const ModelConfig& config) {
  NamesWithoutUse unused(config.num_hidden_layers);
  for (const ShardIndex::Entry& entry : index.entries) unused.show(Name(index.name(entry)));
  std::vector<bool> needed(index.shards.size());
  for (const ShardIndex::Entry& entry : index.entries) {
    const Name name(index.name(entry));
    if (unused.contains(name)) continue;
    if (unused.is_beyond(name)) {
      throw CheckpointError(index.file, std::string(name.whole), entry.at,
                            unused.describe_beyond());
    }
    if (const std::string_view problem = describe_unsupported(name); !problem.empty()) {
      throw UnsupportedError(index.file + ": '" + std::string(name.whole) + "' at byte " +
                             std::to_string(entry.at) + ": " + std::string(problem));
    }
    needed[entry.shard] = true;
  }
  std::vector<std::string> shards;
  shards.reserve(index.shards.size());
  for (std::size_t i = 0; i < index.shards.size(); ++i) {
    if (needed[i]) shards.push_back(index.shards[i]);
  }
  std::ranges::sort(shards);
  return shards;
}

}  // namespace dsfp4::checkpoint
