#include "engine/loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/layout.h"
#include "dsfp4/error.h"
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

// Weights that pass through the host are read and uploaded in so many bytes at a time, or more for
// a larger matrix.
constexpr std::size_t kBufferedBytes = 256u << 20;

// Goes over a layout twice with the same code: first to count bytes, then, with an arena, to place
// everything and note what is to be read where.
class Placement {
 public:
  Placement(const Catalogue& catalogue, ops::Backend& backend, const residency::Plan& plan)
      : catalogue_(catalogue), backend_(backend), plan_(plan) {}

  bool experts_in_files() const noexcept { return plan_.tiered; }
  bool layer_in_files(std::size_t layer) const {
    return layer < plan_.streamed.size() && plan_.streamed[layer];
  }

  void use_arena(Arena& arena) { arena_ = &arena; }
  std::size_t arena_bytes() const noexcept { return arena_bytes_; }
  std::uint64_t weight_bytes() const noexcept { return weight_bytes_; }
  /// Of a buffer through which all of it can be read; some whole tensors at a time.
  std::size_t load_buffer() const noexcept {
    return std::min(read_bytes_, std::max(largest_, kBufferedBytes)) + kBufferedBytes;
  }
  /// What is read into the backend's memory, and what into the host's (for finish()).
  const std::vector<storage::Extent>& extents() const noexcept { return extents_; }
  const std::vector<ReadTensor>& tensors() const noexcept { return tensors_; }  // as extents()
  const std::vector<storage::Extent>& staged() const noexcept { return staged_; }
  const std::vector<ReadTensor>& staged_tensors() const noexcept { return staged_tensors_; }
  std::shared_ptr<void> staging() const noexcept { return staging_; }  // what staged() points into

  void place(const WeightSource& source, format::WeightView& view) {
    if (!source.present()) return;
    view.format = source.format;
    view.rows = source.rows;
    view.cols = source.cols;
    view.data = bytes_of(*source.data);
    if (source.scales != nullptr) {
      view.scales = bytes_of(*source.scales);
      if (arena_ != nullptr) tensors_.back().scales_of = &view;
    }
    if (arena_ == nullptr) weight_bytes_ += source.bytes();
    place(source.global_scale, view.global_scale, source.global_scale_is_reciprocal);
  }

  // A router's matrix: where one value is NaN, that expert is chosen or left out in silence.
  void place_router(const WeightSource& source, format::WeightView& view) {
    place(source, view);
    if (source.present() && arena_ != nullptr) tensors_.back().finite = true;
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
    staged_tensors_.back().finite = true;
  }

  // Once the extents are read: what is kept as FP32 is converted.
  void finish() {
    for (const Vector& vector : vectors_) {
      std::vector<float> values(static_cast<std::size_t>(vector.tensor->shape.at(0)));
      to_floats(*vector.tensor, bytes_at(vector.staged), values.data(), values.size());
      backend_.upload(values.data(), vector.values, values.size() * sizeof(float));
    }
    for (const Scale& scale : scales_) {
      const TensorInfo& tensor = *scale.tensor;
      float value = 0.0f;
      to_floats(tensor, bytes_at(scale.staged), &value, 1);
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
    read_bytes_ += tensor.bytes;
    largest_ = std::max<std::size_t>(largest_, tensor.bytes);
    if (arena_ == nullptr) return nullptr;
    std::byte* destination = arena_->take(tensor.bytes);
    extents_.push_back({tensor.file, tensor.offset, tensor.bytes, destination});
    tensors_.push_back({&tensor, destination});
    return destination;
  }

  std::size_t read_later(const TensorInfo& tensor) {
    std::byte* bytes = staging_->emplace_back(tensor.bytes).data();
    staged_.push_back({tensor.file, tensor.offset, tensor.bytes, bytes});
    staged_tensors_.push_back({&tensor, bytes});
    return staging_->size() - 1;
  }
  const std::byte* bytes_at(std::size_t staged) const { return (*staging_)[staged].data(); }

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
  const residency::Plan& plan_;
  Arena* arena_ = nullptr;
  std::size_t arena_bytes_ = 0;
  std::size_t read_bytes_ = 0;
  std::size_t largest_ = 0;  // of the tensors
  std::uint64_t weight_bytes_ = 0;
  std::vector<storage::Extent> extents_;
  std::vector<storage::Extent> staged_;
  std::vector<ReadTensor> tensors_;
  std::vector<ReadTensor> staged_tensors_;
  using Staging = std::vector<std::vector<std::byte>>;
  std::shared_ptr<Staging> staging_ = std::make_shared<Staging>();
  std::vector<Vector> vectors_;
  std::vector<Scale> scales_;
};

struct Matrix {
  const WeightSource* source;
  format::WeightView* view;
};

void add_mlp(const checkpoint::MlpSource& from, model::MlpWeights& to, std::vector<Matrix>& all) {
  all.push_back({&from.gate_proj, &to.gate_proj});
  all.push_back({&from.up_proj, &to.up_proj});
  all.push_back({&from.down_proj, &to.down_proj});
}

// What is streamed of a layer, if it is: all that each token needs, but the router, which is used
// ahead of its layer.
std::vector<Matrix> dense_matrices(const checkpoint::LayerSource& source,
                                   model::LayerWeights& weights) {
  const checkpoint::AttentionSource& from = source.self_attn;
  model::AttentionWeights& to = weights.self_attn;
  std::vector<Matrix> all = {
      {&from.q_proj, &to.q_proj},       {&from.q_a_proj, &to.q_a_proj},
      {&from.q_b_proj, &to.q_b_proj},   {&from.kv_a_proj_with_mqa, &to.kv_a_proj_with_mqa},
      {&from.kv_b_proj, &to.kv_b_proj}, {&from.o_proj, &to.o_proj}};
  add_mlp(source.mlp, weights.mlp, all);
  add_mlp(source.shared_experts, weights.shared_experts, all);
  std::erase_if(all, [](const Matrix& matrix) { return !matrix.source->present(); });
  return all;
}

void place_all(Placement& placement, const std::vector<Matrix>& matrices, bool in_files) {
  for (const auto& [source, view] : matrices) {
    if (in_files) {
      placement.place_absent(*source, *view);
    } else {
      placement.place(*source, *view);
    }
  }
}

void place_layer(Placement& placement, const checkpoint::LayerSource& source, bool in_files,
                 model::LayerWeights& weights) {
  placement.place(source.input_layernorm, weights.input_layernorm);
  placement.place(source.post_attention_layernorm, weights.post_attention_layernorm);
  placement.place(source.self_attn.q_a_layernorm, weights.self_attn.q_a_layernorm);
  placement.place(source.self_attn.kv_a_layernorm, weights.self_attn.kv_a_layernorm);
  placement.place(source.self_attn.k_scale, weights.self_attn.k_scale);
  place_all(placement, dense_matrices(source, weights), in_files);
  placement.place_router(source.gate, weights.gate);
  placement.place(source.e_score_correction_bias, weights.e_score_correction_bias);
  weights.experts.resize(source.experts.size());
  std::vector<Matrix> experts;
  for (std::size_t e = 0; e < source.experts.size(); ++e) {
    add_mlp(source.experts[e], weights.experts[e], experts);
  }
  place_all(placement, experts, placement.experts_in_files());
}

void place_model(Placement& placement, const checkpoint::ModelLayout& layout,
                 model::ModelWeights& weights) {
  placement.place(layout.embed_tokens, weights.embed_tokens);
  weights.layers.resize(layout.layers.size());
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    place_layer(placement, layout.layers[i], placement.layer_in_files(i), weights.layers[i]);
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
void read_through_host(const Placement& placement, ops::Backend& backend, WeightCheck& check,
                       const Read& read) {
  const auto buffer = std::make_shared<Arena>(placement.load_buffer(), "the weights on their way");
  const auto& extents = placement.extents();
  for (std::size_t first = 0; first < extents.size();) {
    std::vector<storage::Extent> here;
    std::vector<ReadTensor> tensors;
    std::size_t next = first;
    buffer->release(0);
    for (; next < extents.size(); ++next) {
      const storage::Extent& extent = extents[next];
      if (next > first && buffer->used() + Arena::padded(extent.bytes) > kBufferedBytes) {
        break;
      }
      std::byte* to = buffer->take(extent.bytes);
      here.push_back({extent.file, extent.offset, extent.bytes, to});
      tensors.push_back(placement.tensors()[next]);
      tensors.back().bytes = to;
    }
    read(here, buffer);
    check.check(tensors);
    for (std::size_t i = 0; i < here.size(); ++i) {
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

residency::StreamedLayer streamed_layer(std::size_t number, const std::vector<Matrix>& matrices) {
  residency::StreamedLayer layer;
  layer.layer = static_cast<std::int64_t>(number);
  std::vector<const WeightSource*> sources;
  sources.reserve(matrices.size());
  for (const Matrix& matrix : matrices) sources.push_back(matrix.source);
  std::vector<residency::MatrixPlace> places(matrices.size());
  layer.files = residency::file_image(sources, places);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    layer.matrices.push_back({matrices[i].source, places[i], matrices[i].view});
  }
  return layer;
}

ops::WidestWeights widest_of(const checkpoint::ModelLayout& layout) {
  ops::WidestWeights widest;
  const auto note = [](auto& widths, const WeightSource& source) {
    if (!source.present()) return;
    std::int64_t& width = widths.at(static_cast<std::size_t>(source.format));
    width = std::max(width, source.cols);
  };
  note(widest.all, layout.lm_head);
  model::LayerWeights unused;
  for (const checkpoint::LayerSource& layer : layout.layers) {
    for (const Matrix& matrix : dense_matrices(layer, unused)) note(widest.all, *matrix.source);
    for (const checkpoint::MlpSource& expert : layer.experts) {
      note(widest.all, expert.gate_proj);
      note(widest.all, expert.up_proj);
      note(widest.expert_down, expert.down_proj);
    }
  }
  return widest;
}

WeightSizes sizes_of(const Catalogue& catalogue, const checkpoint::ModelLayout& layout,
                     ops::Backend& backend) {
  model::ModelWeights weights;
  const residency::Plan everything;
  Placement all(catalogue, backend, everything);
  place_model(all, layout, weights);
  model::ModelWeights dense_weights;
  residency::Plan no_experts;
  no_experts.tiered = true;
  Placement dense(catalogue, backend, no_experts);
  place_model(dense, layout, dense_weights);

  WeightSizes sizes;
  sizes.widest = widest_of(layout);
  if (!dense_weights.layers.empty()) sizes.layer_experts = dense_weights.layers.back().experts;
  sizes.load_buffer = all.load_buffer();
  sizes.dense_bytes = dense.arena_bytes();
  sizes.expert_bytes = all.arena_bytes() - dense.arena_bytes();
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    const checkpoint::LayerSource& layer = layout.layers[i];
    for (const checkpoint::MlpSource& expert : layer.experts) {
      const residency::ExpertImage image = residency::expert_image(expert, {});
      sizes.slot_bytes = std::max<std::size_t>(sizes.slot_bytes, image.files.slot_bytes);
      ++sizes.experts;
    }
    const std::vector<Matrix> matrices = dense_matrices(layer, dense_weights.layers[i]);
    Placement alone(catalogue, backend, everything);
    place_all(alone, matrices, false);
    sizes.layer_bytes.push_back(alone.arena_bytes());
    sizes.layer_slot_bytes =
        std::max<std::size_t>(sizes.layer_slot_bytes, streamed_layer(i, matrices).files.slot_bytes);
  }
  return sizes;
}

// What stays in the files, for those who read it later.
void describe_files(const checkpoint::ModelLayout& layout, const Placement& placement,
                    LoadedWeights& loaded) {
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    const checkpoint::LayerSource& layer = layout.layers[i];
    model::LayerWeights& weights = loaded.weights.layers[i];
    if (placement.layer_in_files(i)) {
      loaded.streamed.push_back(streamed_layer(i, dense_matrices(layer, weights)));
    }
    for (std::size_t e = 0; placement.experts_in_files() && e < layer.experts.size(); ++e) {
      loaded.images.push_back(residency::expert_image(layer.experts[e], weights.experts[e]));
    }
  }
}

}  // namespace

LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Backend& backend,
                           const LoadWeightsOptions& options) {
  auto check = std::make_unique<WeightCheck>(Catalogue::open(folder), options.threads);
  const Catalogue& catalogue = check->catalogue();
  checkpoint::ModelLayout layout = checkpoint::resolve_layout(catalogue, config);
  storage::ReaderOptions reading = options.reader;
  reading.expected = catalogue.identities();
  std::unique_ptr<storage::Reader> reader = storage::make_reader(catalogue.files(), reading);

  WeightSizes sizes = sizes_of(catalogue, layout, backend);
  sizes.staging = reader->staging_bytes();
  const residency::Plan plan = options.plan ? options.plan(sizes) : residency::Plan();

  model::ModelWeights weights;
  Placement counted(catalogue, backend, plan);
  place_model(counted, layout, weights);
  auto arena = std::make_shared<Arena>(counted.arena_bytes(), "the weights", backend.memory());
  Placement placement(catalogue, backend, plan);
  placement.use_arena(*arena);
  place_model(placement, layout, weights);

  const std::uint64_t total = bytes_of(placement.extents()) + bytes_of(placement.staged());
  std::uint64_t before = 0;
  const auto read = [&](const std::vector<storage::Extent>& extents,
                        const std::shared_ptr<void>& owner) {
    reader->read(
        extents, owner,
        [&](std::uint64_t done) {
          if (options.progress) options.progress(before + done, total);
        },
        options.poll);
    before += bytes_of(extents);
  };
  if (backend.host_visible()) {
    using Owners = std::pair<std::shared_ptr<void>, std::shared_ptr<void>>;
    std::vector<storage::Extent> all = placement.extents();
    all.insert(all.end(), placement.staged().begin(), placement.staged().end());
    read(all, std::make_shared<Owners>(arena, placement.staging()));
    check->check(placement.tensors(), options.poll);
  } else {
    read_through_host(placement, backend, *check, read);
    read(placement.staged(), placement.staging());
  }
  check->check(placement.staged_tensors());
  placement.finish();
  LoadedWeights loaded{std::move(arena),
                       std::move(weights),
                       counted.weight_bytes(),
                       std::move(sizes),
                       {},
                       {},
                       {},
                       nullptr,
                       nullptr};
  describe_files(layout, placement, loaded);
  if (loaded.images.empty() && loaded.streamed.empty()) return loaded;
  loaded.fingerprint = fingerprint(catalogue);
  loaded.layout = std::move(layout);
  loaded.check = std::move(check);
  loaded.reader = std::move(reader);
  return loaded;
}

}  // namespace dsfp4::engine
