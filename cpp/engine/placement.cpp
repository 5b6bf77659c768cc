#include "engine/placement.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "dsfp4/error.h"
#include "engine/weight_convert.h"
#include "format/scalar.h"

namespace dsfp4::engine {
namespace {

using checkpoint::TensorInfo;
using checkpoint::WeightSource;
using memory::Arena;
using residency::DenseFormats;
using residency::DenseRole;
using residency::FileMatrix;

// Weights that pass through the host are read and uploaded in so many bytes at a time, or more for
// a larger group.
constexpr std::size_t kBufferedBytes = 256u << 20;

void add_mlp(const checkpoint::MlpSource& from, model::MlpWeights& to,
             std::optional<DenseRole> role, std::vector<FileMatrix>& all) {
  all.push_back({&from.gate_proj, &to.gate_proj, {}, role});
  all.push_back({&from.up_proj, &to.up_proj, {}, role});
  all.push_back({&from.down_proj, &to.down_proj, {}, role});
}

// The part of a layer that may be streamed: all that each token needs, but the router, which is
// used ahead of its layer.
std::vector<FileMatrix> dense_matrices(const checkpoint::LayerSource& source,
                                       model::LayerWeights& weights) {
  const checkpoint::AttentionSource& from = source.self_attn;
  model::AttentionWeights& to = weights.self_attn;
  constexpr DenseRole kAttention = DenseRole::kAttention;
  std::vector<FileMatrix> all = {{&from.q_proj, &to.q_proj, {}, kAttention},
                                 {&from.q_a_proj, &to.q_a_proj, {}, kAttention},
                                 {&from.q_b_proj, &to.q_b_proj, {}, kAttention},
                                 {&from.kv_a_proj_with_mqa, &to.kv_a_proj_with_mqa, {}, kAttention},
                                 {&from.kv_b_proj, &to.kv_b_proj, {}, kAttention},
                                 {&from.o_proj, &to.o_proj, {}, DenseRole::kOProj}};
  add_mlp(source.mlp, weights.mlp, DenseRole::kMlp, all);
  add_mlp(source.shared_experts, weights.shared_experts, DenseRole::kSharedExperts, all);
  return all;
}

bool is_converted(const residency::FileGroup& group, const DenseFormats& formats) {
  return std::ranges::any_of(group.matrices, [&](const FileMatrix& matrix) {
    return matrix.format_in(formats) != matrix.source->format;
  });
}

std::size_t matrix_bytes(const FileMatrix& matrix, const DenseFormats& formats) {
  const auto [format, rows, cols] =
      std::tuple(matrix.format_in(formats), matrix.source->rows, matrix.source->cols);
  return Arena::padded(format::data_bytes(format, rows, cols)) +
         Arena::padded(format::scale_bytes(format, rows, cols));
}

// Bytes that a group takes of an arena.
std::size_t arena_bytes(const residency::FileGroup& group, const DenseFormats& formats,
                        bool as_in_files) {
  if (as_in_files && !is_converted(group, formats)) return group.files.slot_bytes;
  std::size_t bytes = 0;
  for (const FileMatrix& matrix : group.matrices) bytes += matrix_bytes(matrix, formats);
  return bytes;
}

std::size_t vector_bytes(const TensorInfo& tensor) {
  return Arena::padded(static_cast<std::size_t>(tensor.shape.at(0)) * sizeof(float));
}

// Routers are left out, as their inputs stay FP32.
ops::WidestWeights widest_of(const checkpoint::ModelLayout& layout,
                             std::span<const DenseFormats> formats) {
  ops::WidestWeights widest;
  const auto note_as = [](auto& widths, const WeightSource& source, format::WeightFormat format) {
    if (!source.present()) return;
    std::int64_t& width = widths.at(static_cast<std::size_t>(format));
    width = std::max(width, source.cols);
  };
  const auto note = [&](auto& widths, const WeightSource& source) {
    note_as(widths, source, source.format);
  };
  const auto note_all = [&](const FileMatrix& matrix) {
    note(widest.all, *matrix.source);
    for (const DenseFormats& some : formats) {
      note_as(widest.all, *matrix.source, matrix.format_in(some));
    }
  };
  model::LayerWeights unused;
  note_all({&layout.lm_head, nullptr, {}, DenseRole::kLmHead});
  for (const checkpoint::LayerSource& layer : layout.layers) {
    for (const FileMatrix& matrix : dense_matrices(layer, unused)) note_all(matrix);
    for (const checkpoint::MlpSource& expert : layer.experts) {
      note(widest.all, expert.gate_proj);
      note(widest.all, expert.up_proj);
      note(widest.expert_down, expert.down_proj);
    }
  }
  return widest;
}

void to_floats(const TensorInfo& tensor, const std::byte* bytes, float* out, std::size_t count) {
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

}  // namespace

Placement::Placement(const checkpoint::Catalogue& catalogue, const checkpoint::ModelLayout& layout,
                     model::ModelWeights& weights)
    : catalogue_(catalogue), layout_(layout), weights_(weights) {
  weights.layers.resize(layout.layers.size());
  add({{&layout.embed_tokens, &weights.embed_tokens, {}}});
  for (std::size_t i = 0; i < layout.layers.size(); ++i) {
    add_layer(static_cast<std::int64_t>(i), layout.layers[i], weights.layers[i]);
  }
  add(layout.norm, weights.norm);
  if (!tied()) add({{&layout.lm_head, &weights.lm_head, {}, DenseRole::kLmHead}});
}

void Placement::add_layer(std::int64_t number, const checkpoint::LayerSource& source,
                          model::LayerWeights& weights) {
  add(source.input_layernorm, weights.input_layernorm);
  add(source.post_attention_layernorm, weights.post_attention_layernorm);
  add(source.self_attn.q_a_layernorm, weights.self_attn.q_a_layernorm);
  add(source.self_attn.kv_a_layernorm, weights.self_attn.kv_a_layernorm);
  add(source.self_attn.k_scale, weights.self_attn.k_scale);
  add(dense_matrices(source, weights)).layer = number;
  // A router with one NaN chooses that expert, or leaves it out, in silence.
  if (source.gate.present()) add({{&source.gate, &weights.gate, {}}}).finite = true;
  add(source.e_score_correction_bias, weights.e_score_correction_bias);
  weights.experts.resize(source.experts.size());
  for (std::size_t e = 0; e < source.experts.size(); ++e) {
    std::vector<FileMatrix> matrices;
    add_mlp(source.experts[e], weights.experts[e], std::nullopt, matrices);
    Group& expert = add(std::move(matrices));
    expert.layer = number;
    expert.expert = true;
  }
}

Placement::Group& Placement::add(std::vector<FileMatrix> matrices) {
  std::erase_if(matrices, [](const FileMatrix& matrix) { return !matrix.source->present(); });
  for (const FileMatrix& matrix : matrices) {
    const WeightSource& source = *matrix.source;
    weight_bytes_ += source.bytes();
    *matrix.view = {source.format, source.rows, source.cols, nullptr, nullptr, 1.0f};
    add(source.global_scale, matrix.view->global_scale, source.global_scale_is_reciprocal);
  }
  Group& group = groups_.emplace_back();
  group.from = residency::file_group(std::move(matrices));
  return group;
}

// A scale: a scalar that is positive and finite. Where there is none, `value` stays as it is.
void Placement::add(const TensorInfo* scalar, float& value, bool reciprocal) {
  if (scalar != nullptr) scales_.push_back({scalar, &value, reciprocal, read_later(*scalar)});
}

void Placement::add(const TensorInfo* vector, DeviceSpan<const float>& view) {
  if (vector != nullptr) vectors_.push_back({vector, &view, nullptr, read_later(*vector)});
}

std::size_t Placement::read_later(const TensorInfo& tensor) {
  std::byte* bytes = staging_->emplace_back(tensor.bytes).data();
  staged_.push_back({tensor.file, tensor.offset, tensor.bytes, bytes});
  staged_tensors_.push_back(&tensor);
  return staging_->size() - 1;
}

residency::ModelBytes::Converted Placement::dense_in(const DenseFormats& formats,
                                                     bool as_in_files) const {
  residency::ModelBytes::Converted sizes;
  sizes.formats = formats;
  sizes.layers.resize(weights_.layers.size());
  for (const Vector& vector : vectors_) sizes.dense += vector_bytes(*vector.tensor);
  for (const Group& group : groups_) {
    if (group.expert) continue;
    const std::size_t bytes = arena_bytes(group.from, formats, as_in_files);
    sizes.dense += bytes;
    if (group.layer >= 0) sizes.layers[static_cast<std::size_t>(group.layer)] = bytes;
  }
  return sizes;
}

std::vector<Placement::DenseShare> Placement::dense_shares(const DenseFormats& formats) const {
  std::vector<DenseShare> shares;
  for (const Group& group : groups_) {
    if (group.expert) continue;
    for (const FileMatrix& matrix : group.from.matrices) {
      std::string_view role = is_embedding(group) ? "embedding" : "router";
      if (matrix.role) role = residency::dense_role_name(*matrix.role);
      shares.push_back(
          {role, group.layer, matrix.format_in(formats), matrix_bytes(matrix, formats)});
    }
  }
  return shares;
}

WeightSizes Placement::sizes(bool host_visible, std::span<const DenseFormats> formats,
                             int threads) const {
  WeightSizes sizes;
  auto [first, dense, layers] = dense_in(formats.front(), host_visible);
  sizes.formats = first;
  sizes.dense_bytes = dense;
  sizes.layer_bytes = std::move(layers);
  std::uint64_t least = dense;
  for (const DenseFormats& other : formats.subspan(1)) {
    const auto& converted = sizes.converted.emplace_back(dense_in(other, host_visible));
    if (converted.dense < least) {
      least = converted.dense;
    } else {
      sizes.converted.pop_back();
    }
  }
  std::size_t slots = 0;
  std::size_t largest = kBufferedBytes;
  std::int64_t cols = 0;
  for (const Group& group : groups_) {
    const std::size_t bytes = arena_bytes(group.from, {}, host_visible);
    const std::size_t slot = group.from.files.slot_bytes;
    slots += slot;
    largest = std::max(largest, slot);
    if (group.expert) {
      sizes.expert_bytes += bytes;
      sizes.slot_bytes = std::max(sizes.slot_bytes, slot);
      sizes.device_slot_bytes =
          std::max(sizes.device_slot_bytes, arena_bytes(group.from, {}, false));
      ++sizes.experts;
      continue;
    }
    if (is_embedding(group) && !tied()) {
      sizes.embedding_bytes = bytes;
      sizes.embedding_host_bytes = slot;
    }
    if (group.layer >= 0) sizes.layer_slot_bytes = std::max(sizes.layer_slot_bytes, slot);
    for (const FileMatrix& matrix : group.from.matrices) {
      if (matrix.role) cols = std::max(cols, matrix.source->cols);
    }
  }
  sizes.widest = widest_of(layout_, formats);
  sizes.load_buffer = std::min(slots, largest);
  if (first.any() || !sizes.converted.empty()) sizes.conversion = conversion_bytes(threads, cols);
  if (!weights_.layers.empty()) sizes.layer_experts = weights_.layers.back().experts;
  return sizes;
}

bool Placement::stays_in_files(const Group& group) const {
  if (group.layer < 0) return false;
  return group.expert ? plan_.tiered : is_streamed(group) && plan_.staged_bytes == 0;
}

bool Placement::is_streamed(const Group& group) const {
  const auto layer = static_cast<std::size_t>(group.layer);
  return group.layer >= 0 && !group.expert && layer < plan_.streamed.size() &&
         plan_.streamed[layer];
}

void Placement::take_slot(Group& group, Arena& arena, memory::MemorySource& source) {
  group.slot = memory::on_host(source, arena.take(group.from.files.slot_bytes));
  group.from.point(group.slot);
}

void Placement::take_matrices(Group& group, Arena& arena) {
  for (const FileMatrix& matrix : group.from.matrices) {
    WeightPlace& to = group.to.emplace_back();
    to.format = matrix.format_in(plan_.formats);
    to.rows = matrix.source->rows;
    to.cols = matrix.source->cols;
    to.data = arena.take(format::data_bytes(to.format, to.rows, to.cols));
    const std::size_t scales = format::scale_bytes(to.format, to.rows, to.cols);
    if (scales > 0) to.scales = arena.take(scales);
    *matrix.view = to;
    weight_bytes_ += format::stored_bytes(to.format, to.rows, to.cols) - matrix.source->bytes();
  }
}

Placement::Arenas Placement::take(const residency::Plan& plan, ops::Device& device) {
  plan_ = plan;
  const bool in_host = device.host_visible();
  Arenas arenas;
  std::size_t bytes = 0;
  for (Group& group : groups_) {
    if (stays_in_files(group)) continue;
    loaded_.push_back(&group);
    if (plan.embedding_in_ram && is_embedding(group)) {
      arenas.host = std::make_shared<Arena>(group.from.files.slot_bytes, "the embedding");
      take_slot(group, *arenas.host, memory::host_memory());
    } else if (is_streamed(group)) {
      group.staged = true;
    } else {
      bytes += arena_bytes(group.from, plan.formats, in_host);
    }
  }
  if (plan.staged_bytes > 0) bytes += plan.layer_buffers * plan.layer_buffer_bytes;
  for (const Vector& vector : vectors_) bytes += vector_bytes(*vector.tensor);
  arenas.device = std::make_shared<Arena>(bytes, "the weights", device.memory());
  for (Group& group : groups_) {  // first, as slots are multiples of a block and begin at one
    if (stays_in_files(group) || group.slot != nullptr || group.staged) continue;
    if (in_host && !is_converted(group.from, plan.formats)) {
      take_slot(group, *arenas.device, device.memory());
    } else {
      take_matrices(group, *arenas.device);
    }
  }
  for (Vector& vector : vectors_) {
    const auto count = static_cast<std::size_t>(vector.tensor->shape.at(0));
    vector.values = arenas.device->take_array<float>(count);
    *vector.view = {vector.values, count};
  }
  if (plan.staged_bytes > 0) take_staged_layers(arenas, device);
  return arenas;
}

// In staging memory as in a buffer of the device's, to which the views point.
void Placement::take_staged_layers(Arenas& arenas, ops::Device& device) {
  arenas.staging = std::make_shared<Arena>(
      plan_.staged_bytes, "the dense weights that are copied for each step", device.staging());
  std::vector<DevicePtr<std::byte>> buffers(plan_.layer_buffers);
  for (DevicePtr<std::byte>& buffer : buffers) {
    buffer = arenas.device->take(plan_.layer_buffer_bytes);
  }
  for (Group& group : groups_) {
    if (!group.staged) continue;
    const std::size_t before = arenas.staging->used();
    const DevicePtr<std::byte> from = arenas.staging->take(0);
    take_matrices(group, *arenas.staging);
    const DevicePtr<std::byte> to = buffers[layers_.size() % buffers.size()];
    for (std::size_t i = 0; i < group.to.size(); ++i) {
      ops::WeightView& view = *group.from.matrices[i].view;
      view.data = to + (group.to[i].data - from);
      if (group.to[i].scales) view.scales = to + (group.to[i].scales - from);
    }
    layers_.push_back({group.layer, memory::on_host(device.staging(), from), to,
                       arenas.staging->used() - before});
  }
}

std::uint64_t Placement::loaded_bytes() const noexcept {
  std::uint64_t bytes = 0;
  for (const Group* group : loaded_) bytes += group->from.files.bytes();
  return bytes;
}

std::vector<ReadTensor> Placement::staged_tensors() const {
  std::vector<ReadTensor> tensors;
  tensors.reserve(staged_.size());
  for (std::size_t i = 0; i < staged_.size(); ++i) {
    tensors.push_back({staged_tensors_[i], bytes_at(i)});
  }
  for (const Vector& vector : vectors_) tensors[vector.staged].finite = true;
  return tensors;
}

void Placement::convert_staged(ops::Device& device) {
  for (const Vector& vector : vectors_) {
    std::vector<float> values(static_cast<std::size_t>(vector.tensor->shape.at(0)));
    to_floats(*vector.tensor, bytes_at(vector.staged), values.data(), values.size());
    device.upload(values.data(), vector.values, values.size() * sizeof(float));
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
  if (tied()) weights_.lm_head = weights_.embed_tokens;
}

std::uint64_t Placement::expert_read_bytes() const noexcept {
  const auto last = std::ranges::find(groups_.rbegin(), groups_.rend(), true, &Group::expert);
  return last == groups_.rend() ? 0 : last->from.files.bytes();
}

std::vector<residency::ExpertImage> Placement::images() const {
  std::vector<residency::ExpertImage> images;
  for (std::size_t i = 0; plan_.tiered && i < layout_.layers.size(); ++i) {
    for (std::size_t e = 0; e < layout_.layers[i].experts.size(); ++e) {
      images.push_back(
          residency::expert_image(layout_.layers[i].experts[e], weights_.layers[i].experts[e]));
    }
  }
  return images;
}

std::vector<residency::StreamedLayer> Placement::streamed() const {
  std::vector<residency::StreamedLayer> layers;
  for (const Group& group : groups_) {
    if (!group.expert && stays_in_files(group)) layers.push_back({group.layer, group.from});
  }
  return layers;
}

}  // namespace dsfp4::engine
