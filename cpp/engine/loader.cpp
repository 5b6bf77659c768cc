#include "engine/loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/layout.h"
#include "dsfp4/error.h"
#include "engine/hash_check.h"
#include "format/scalar.h"
#include "memory/arena.h"
#include "memory/limits.h"
#include "storage/reader.h"

namespace dsfp4::engine {
namespace {

using checkpoint::Catalogue;
using checkpoint::TensorInfo;
using checkpoint::WeightSource;
using memory::Arena;

// Goes over a layout twice with the same code: first to count bytes, then, with an arena, to place
// everything and note what is to be read where.
class Placement {
 public:
  Placement(const Catalogue& catalogue, ops::Backend& backend, bool experts_in_files)
      : catalogue_(catalogue), backend_(backend), experts_in_files_(experts_in_files) {}

  bool experts_in_files() const noexcept { return experts_in_files_; }

  void use_arena(Arena& arena) { arena_ = &arena; }
  std::size_t arena_bytes() const noexcept { return arena_bytes_; }
  std::uint64_t weight_bytes() const noexcept { return weight_bytes_; }
  /// What is read into the backend's memory, and what into the host's (for finish()).
  const std::vector<storage::Extent>& extents() const noexcept { return extents_; }
  const std::vector<ReadTensor>& tensors() const noexcept { return tensors_; }  // as extents()
  const std::vector<storage::Extent>& staged() const noexcept { return staged_; }
  const std::vector<ReadTensor>& staged_tensors() const noexcept { return staged_tensors_; }

  void place(const WeightSource& source, format::WeightView& view) {
    if (!source.present()) return;
    view.format = source.format;
    view.rows = source.rows;
    view.cols = source.cols;
    view.data = bytes_of(*source.data);
    if (source.scales != nullptr) {
      view.scales = bytes_of(*source.scales);
      if (arena_ != nullptr) block_scales_.emplace(source.scales, &view);
    }
    if (arena_ == nullptr) weight_bytes_ += source.bytes();
    place(source.global_scale, view.global_scale, source.global_scale_is_reciprocal);
  }

  // All but the matrix itself, which stays in its file.
  void place_absent(const WeightSource& source, format::WeightView& view) {
    view.format = source.format;
    view.rows = source.rows;
    view.cols = source.cols;
    if (arena_ == nullptr) weight_bytes_ += source.bytes();
    place(source.global_scale, view.global_scale, source.global_scale_is_reciprocal);
  }

  // A scale: a scalar that is positive and finite. Where there is none, `value` stays as it is.
  void place(const TensorInfo* scalar, float& value, bool reciprocal = false) {
    if (scalar == nullptr || arena_ == nullptr) return;
    scales_.push_back({scalar, &value, reciprocal, read_later(*scalar)});
  }

  void place(const TensorInfo* vector, std::span<const float>& view) {
    if (vector == nullptr) return;
    const auto count = static_cast<std::size_t>(vector->shape.at(0));
    arena_bytes_ += Arena::padded(count * sizeof(float));
    if (arena_ == nullptr) return;
    auto* values = arena_->take_array<float>(count);
    view = {values, count};
    vectors_.push_back({vector, values, read_later(*vector)});
  }

  // Block scales that were read to `bytes`; other tensors pass.
  void check_scales(const TensorInfo& tensor, const std::byte* bytes) const {
    const auto found = block_scales_.find(&tensor);
    if (found == block_scales_.end()) return;
    format::WeightView view = *found->second;
    view.scales = bytes;
    if (const auto bad = format::find_bad_scale(view)) {
      throw CheckpointError(catalogue_.file_name(tensor), tensor.name,
                            static_cast<std::int64_t>(tensor.offset + *bad),
                            "this block scale is NaN or infinite; download the file again");
    }
  }

  // Once the extents are read: what is kept as FP32 is converted.
  void finish() {
    for (const Vector& vector : vectors_) {
      std::vector<float> values(static_cast<std::size_t>(vector.tensor->shape.at(0)));
      to_floats(*vector.tensor, staging_[vector.staged].data(), values.data(), values.size());
      backend_.upload(values.data(), vector.values, values.size() * sizeof(float));
    }
    for (const Scale& scale : scales_) {
      const TensorInfo& tensor = *scale.tensor;
      float value = 0.0f;
      to_floats(tensor, staging_[scale.staged].data(), &value, 1);
      const float inverse = 1.0f / value;  // infinite for the smallest
      if (!std::isfinite(value) || value <= 0.0f || (scale.reciprocal && !std::isfinite(inverse))) {
        throw CheckpointError(
            catalogue_.file_name(tensor), tensor.name, static_cast<std::int64_t>(tensor.offset),
            "the scale is " + std::to_string(value) + "; it must be positive and finite" +
                (scale.reciprocal ? ", and so must its reciprocal" : ""));
      }
      *scale.value = scale.reciprocal ? inverse : value;
    }
  }

 private:
  struct Vector {
    const TensorInfo* tensor;
    float* values;
    std::size_t staged;
  };
  struct Scale {
    const TensorInfo* tensor;
    float* value;
    bool reciprocal;
    std::size_t staged;
  };

  const std::byte* bytes_of(const TensorInfo& tensor) {
    arena_bytes_ += Arena::padded(tensor.bytes);
    if (arena_ == nullptr) return nullptr;
    std::byte* destination = arena_->take(tensor.bytes);
    extents_.push_back({tensor.file, tensor.offset, tensor.bytes, destination});
    tensors_.push_back({&tensor, destination});
    return destination;
  }

  std::size_t read_later(const TensorInfo& tensor) {
    staging_.emplace_back(tensor.bytes);
    staged_.push_back({tensor.file, tensor.offset, tensor.bytes, staging_.back().data()});
    staged_tensors_.push_back({&tensor, staging_.back().data()});
    return staging_.size() - 1;
  }

  static void to_floats(const TensorInfo& tensor, const std::byte* bytes, float* out,
                        std::size_t count) {
    if (tensor.dtype == format::DType::kF32) {
      std::memcpy(out, bytes, count * sizeof(float));
      return;
    }
    for (std::size_t i = 0; i < count; ++i) {  // the layout admits F32 and BF16 only
      std::uint16_t code = 0;
      std::memcpy(&code, bytes + i * sizeof(code), sizeof(code));
      out[i] = format::bf16_to_float(code);
    }
  }

  const Catalogue& catalogue_;
  ops::Backend& backend_;
  bool experts_in_files_;
  Arena* arena_ = nullptr;
  std::size_t arena_bytes_ = 0;
  std::uint64_t weight_bytes_ = 0;
  std::vector<storage::Extent> extents_;
  std::vector<storage::Extent> staged_;
  std::vector<ReadTensor> tensors_;
  std::vector<ReadTensor> staged_tensors_;
  std::vector<std::vector<std::byte>> staging_;
  std::vector<Vector> vectors_;
  std::vector<Scale> scales_;
  std::unordered_map<const TensorInfo*, const format::WeightView*> block_scales_;
};

void place_mlp(Placement& placement, const checkpoint::MlpSource& source,
               model::MlpWeights& weights) {
  placement.place(source.gate_proj, weights.gate_proj);
  placement.place(source.up_proj, weights.up_proj);
  placement.place(source.down_proj, weights.down_proj);
}

void place_layer(Placement& placement, const checkpoint::LayerSource& source,
                 model::LayerWeights& weights) {
  placement.place(source.input_layernorm, weights.input_layernorm);
  placement.place(source.post_attention_layernorm, weights.post_attention_layernorm);
  const checkpoint::AttentionSource& from = source.self_attn;
  model::AttentionWeights& to = weights.self_attn;
  placement.place(from.q_proj, to.q_proj);
  placement.place(from.q_a_proj, to.q_a_proj);
  placement.place(from.q_a_layernorm, to.q_a_layernorm);
  placement.place(from.q_b_proj, to.q_b_proj);
  placement.place(from.kv_a_proj_with_mqa, to.kv_a_proj_with_mqa);
  placement.place(from.kv_a_layernorm, to.kv_a_layernorm);
  placement.place(from.kv_b_proj, to.kv_b_proj);
  placement.place(from.o_proj, to.o_proj);
  placement.place(from.k_scale, to.k_scale);
  place_mlp(placement, source.mlp, weights.mlp);
  placement.place(source.gate, weights.gate);
  placement.place(source.e_score_correction_bias, weights.e_score_correction_bias);
  weights.experts.resize(source.experts.size());
  for (std::size_t e = 0; e < source.experts.size(); ++e) {
    if (placement.experts_in_files()) {
      placement.place_absent(source.experts[e].gate_proj, weights.experts[e].gate_proj);
      placement.place_absent(source.experts[e].up_proj, weights.experts[e].up_proj);
      placement.place_absent(source.experts[e].down_proj, weights.experts[e].down_proj);
    } else {
      place_mlp(placement, source.experts[e], weights.experts[e]);
    }
  }
  place_mlp(placement, source.shared_experts, weights.shared_experts);
}

void place_model(Placement& placement, const checkpoint::ModelLayout& layout,
                 model::ModelWeights& weights) {
  placement.place(layout.embed_tokens, weights.embed_tokens);
  weights.layers.resize(layout.layers.size());
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    place_layer(placement, layout.layers[i], weights.layers[i]);
  }
  placement.place(layout.norm, weights.norm);
  if (layout.lm_head.data == layout.embed_tokens.data) {
    weights.lm_head = weights.embed_tokens;  // tied
  } else {
    placement.place(layout.lm_head, weights.lm_head);
  }
}

std::uint64_t bytes_of(const std::vector<storage::Extent>& extents) {
  std::uint64_t bytes = 0;
  for (const storage::Extent& extent : extents) bytes += extent.bytes;
  return bytes;
}

// Reads what goes to memory that the host cannot touch, by way of a buffer: some whole tensors at a
// time, which are checked there.
template <typename Read>
void read_through_host(const Catalogue& catalogue, const Placement& placement,
                       ops::Backend& backend, int threads, const Read& read) {
  constexpr std::size_t kBuffer = 256u << 20;
  std::size_t largest = kBuffer;
  for (const storage::Extent& extent : placement.extents()) {
    largest = std::max<std::size_t>(largest, extent.bytes);
  }
  Arena buffer(std::min<std::size_t>(bytes_of(placement.extents()) + kBuffer, largest + kBuffer),
               "the weights on their way");
  const auto& extents = placement.extents();
  for (std::size_t first = 0; first < extents.size();) {
    std::vector<storage::Extent> here;
    std::vector<ReadTensor> tensors;
    std::size_t next = first;
    buffer.release(0);
    for (; next < extents.size(); ++next) {
      const storage::Extent& extent = extents[next];
      if (next > first && buffer.used() + Arena::padded(extent.bytes) > kBuffer) break;
      std::byte* to = buffer.take(extent.bytes);
      here.push_back({extent.file, extent.offset, extent.bytes, to});
      tensors.push_back({placement.tensors()[next].tensor, to});
    }
    read(here);
    check_hashes(catalogue, tensors, threads);
    for (std::size_t i = 0; i < here.size(); ++i) {
      placement.check_scales(*tensors[i].tensor, tensors[i].bytes);
      backend.upload(tensors[i].bytes, extents[first + i].destination, here[i].bytes);
    }
    first = next;
  }
}

// FNV-1a over what the headers say: tells checkpoints apart, not bytes.
std::uint64_t fingerprint(const Catalogue& catalogue) {
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&](std::uint64_t value) {
    for (int i = 0; i < 8; ++i) hash = (hash ^ (value >> (8 * i) & 0xFF)) * 0x100000001b3;
  };
  for (const TensorInfo& tensor : catalogue.tensors()) {
    for (const char c : tensor.name) mix(static_cast<unsigned char>(c));
    mix(tensor.file);
    mix(tensor.offset);
    mix(tensor.bytes);
  }
  return hash;
}

WeightSizes sizes_of(const Catalogue& catalogue, const checkpoint::ModelLayout& layout,
                     ops::Backend& backend) {
  model::ModelWeights weights;
  Placement all(catalogue, backend, false);
  place_model(all, layout, weights);
  model::ModelWeights dense_weights;
  Placement dense(catalogue, backend, true);
  place_model(dense, layout, dense_weights);

  WeightSizes sizes;
  sizes.dense_bytes = dense.arena_bytes();
  sizes.expert_bytes = all.arena_bytes() - dense.arena_bytes();
  for (const checkpoint::LayerSource& layer : layout.layers) {
    for (const checkpoint::MlpSource& expert : layer.experts) {
      sizes.slot_bytes =
          std::max<std::size_t>(sizes.slot_bytes, slot_bytes(residency::expert_image(expert, {})));
      ++sizes.experts;
    }
  }
  return sizes;
}

}  // namespace

LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Backend& backend,
                           const LoadWeightsOptions& options) {
  const Catalogue catalogue = Catalogue::open(folder);
  const checkpoint::ModelLayout layout = checkpoint::resolve_layout(catalogue, config);
  std::unique_ptr<storage::Reader> reader = storage::make_reader(catalogue.files(), options.reader);

  WeightSizes sizes = sizes_of(catalogue, layout, backend);
  sizes.staging = reader->staging_bytes();
  const bool experts_stay = options.experts_stay && options.experts_stay(sizes);

  model::ModelWeights weights;
  Placement counted(catalogue, backend, experts_stay);
  place_model(counted, layout, weights);
  Arena arena(counted.arena_bytes(), "the weights", backend.memory());
  Placement placement(catalogue, backend, experts_stay);
  placement.use_arena(arena);
  place_model(placement, layout, weights);

  const std::uint64_t total = bytes_of(placement.extents()) + bytes_of(placement.staged());
  std::uint64_t before = 0;
  const auto read = [&](const std::vector<storage::Extent>& extents) {
    reader->read(extents, [&](std::uint64_t done) {
      if (options.progress) options.progress(before + done, total);
    });
    before += bytes_of(extents);
  };
  if (backend.host_visible()) {
    std::vector<storage::Extent> all = placement.extents();
    all.insert(all.end(), placement.staged().begin(), placement.staged().end());
    read(all);
    check_hashes(catalogue, placement.tensors(), options.threads);
    for (const ReadTensor& read_tensor : placement.tensors()) {
      placement.check_scales(*read_tensor.tensor, read_tensor.bytes);
    }
  } else {
    read_through_host(catalogue, placement, backend, options.threads, read);
    read(placement.staged());
  }
  check_hashes(catalogue, placement.staged_tensors(), options.threads);
  placement.finish();
  LoadedWeights loaded{std::move(arena), std::move(weights), counted.weight_bytes(), {}, nullptr};
  if (!experts_stay) return loaded;
  std::vector<residency::ExpertImage>& images = loaded.images;
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    for (std::size_t e = 0; e < layout.layers[i].experts.size(); ++e) {
      images.push_back(residency::expert_image(layout.layers[i].experts[e],
                                               loaded.weights.layers[i].experts[e]));
    }
  }
  loaded.experts = images.size();
  loaded.fingerprint = fingerprint(catalogue);
  loaded.reader = std::move(reader);
  return loaded;
}

}  // namespace dsfp4::engine
