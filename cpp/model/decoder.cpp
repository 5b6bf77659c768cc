#include "model/decoder.h"

#include <algorithm>

#include "ops/host_routing.h"
#include "ops/mlp.h"

namespace dsfp4::model {

namespace {

constexpr std::int64_t kEmbeddedRows = 64;  // that go to a device together

}  // namespace

HostEmbedding::HostEmbedding(ops::Ops& host, std::int64_t hidden_size)
    : host_(host),
      arena_(bytes(hidden_size), "the rows of the embedding"),
      rows_(ops::scratch_matrix(arena_, kEmbeddedRows, hidden_size)) {}

std::size_t HostEmbedding::bytes(std::int64_t hidden_size) {
  return ops::scratch_bytes(kEmbeddedRows * hidden_size);
}

void HostEmbedding::embed(const WeightView& table, std::span<const std::int32_t> ids,
                          ops::Device& device, ops::Matrix x) {
  for (std::int64_t at = 0; at < x.rows; at += kEmbeddedRows) {
    const std::int64_t rows = std::min(kEmbeddedRows, x.rows - at);
    host_.embed(table, ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows)),
                rows_.slice(0, rows));
    device.upload(host_.device().on_host(rows_.data), x.row(at),
                  static_cast<std::size_t>(rows * x.cols) * sizeof(float));
  }
}

void Decoder::head(ops::ConstMatrix hidden, ops::Matrix logits, Phase phase) const {
  ops_.linear(weights_.lm_head, hidden, logits, phase);
}

std::size_t scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase) {
  const std::int64_t piece = phase == Phase::kPrefill ? std::min(rows, kDenseRows) : rows;
  const std::size_t stream = 2 * ops::scratch_bytes(rows * spec.hidden_size) +
                             ops::scratch_bytes(piece * spec.hidden_size) +
                             ops::scratch_bytes(rows * spec.mla.qk_rope_head_dim);
  const std::size_t attention = mla_scratch_bytes(spec, piece, phase);
  const std::size_t dense =
      std::max(attention, ops::mlp_scratch_bytes(spec.intermediate_size, piece));
  if (spec.moe_layers() == 0) return stream + dense;
  const std::size_t shared = ops::mlp_scratch_bytes(spec.shared_intermediate_size, piece);
  const std::size_t moe = ops::routing_bytes(rows, spec.router) +
                          std::max({attention, shared, experts_scratch_bytes(spec, rows, phase)});
  return stream + std::max(dense, moe);
}

std::size_t kv_layer_bytes(const ModelSpec& spec, ops::KvFormat format) {
  return static_cast<std::size_t>(ops::kKvBlockTokens * spec.mla.cache_width()) *
         ops::kv_value_bytes(format);
}

}  // namespace dsfp4::model
