// A backend that records steps as a GPU does, as far as its caller can see.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "ops/backend.h"

namespace dsfp4::model {

/// Computes with the reference backend. `answer` is what begin_recorded() says.
class RecordingBackend final : public ops::Backend {
 public:
  using Batch = std::span<const ops::SequenceRows>;
  using Floats = std::span<const float>;
  using Matrix = ops::Matrix;
  using ConstMatrix = ops::ConstMatrix;
  using Weight = format::WeightView;
  using Shape = ops::MlaShape;

  StepRecording answer = StepRecording::kBegun;
  int begun = 0;
  int ended = 0;
  int embedded = 0;

  StepRecording begin_recorded(std::span<const std::int32_t>, Batch) override {
    ++begun;
    return answer;
  }
  void end_recorded() override { ++ended; }

  std::string_view name() const override { return "recording"; }
  ops::KvFormat default_kv_format() const override { return ops::KvFormat::kF32; }
  void embed(const Weight& table, std::span<const std::int32_t> ids, Matrix out) override {
    ++embedded;
    inner_->embed(table, ids, out);
  }
  void rms_norm(ConstMatrix x, Floats weight, float eps, Matrix y) override {
    inner_->rms_norm(x, weight, eps, y);
  }
  void linear(const Weight& weight, ConstMatrix x, Matrix y, ops::Inputs inputs) override {
    inner_->linear(weight, x, y, inputs);
  }
  void silu_mul(Matrix gate, ConstMatrix up) override { inner_->silu_mul(gate, up); }
  void zero(Matrix y) override { inner_->zero(y); }
  void add(ConstMatrix x, Matrix y) override { inner_->add(x, y); }
  void rope(Matrix x, std::int64_t heads, std::int64_t stride, ConstMatrix cos_sin) override {
    inner_->rope(x, heads, stride, cos_sin);
  }
  void kv_append(Batch batch, ConstMatrix x) override { inner_->kv_append(batch, x); }
  void prefill_attention(const Shape& shape, const Weight& kv_b_proj, Batch batch, ConstMatrix q,
                         Matrix out) override {
    inner_->prefill_attention(shape, kv_b_proj, batch, q, out);
  }
  void absorb_query(const Shape& shape, const Weight& kv_b_proj, ConstMatrix q,
                    Matrix q_abs) override {
    inner_->absorb_query(shape, kv_b_proj, q, q_abs);
  }
  void latent_attention(const Shape& shape, Batch batch, ConstMatrix q_abs, ConstMatrix q,
                        Matrix out) override {
    inner_->latent_attention(shape, batch, q_abs, q, out);
  }
  void expand_value(const Shape& shape, const Weight& kv_b_proj, ConstMatrix attended,
                    Matrix out) override {
    inner_->expand_value(shape, kv_b_proj, attended, out);
  }
  void route(const ops::RouterSpec& spec, ConstMatrix logits, Floats bias,
             std::span<const std::int32_t> forced, ops::Routing out) override {
    inner_->route(spec, logits, bias, forced, out);
  }
  void experts(std::span<const ops::ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
               Matrix hidden, Matrix out) override {
    inner_->experts(tasks, top_k, x, hidden, out);
  }
  void combine(ConstMatrix pairs, Floats weights, std::int64_t top_k, Matrix y) override {
    inner_->combine(pairs, weights, top_k, y);
  }

 private:
  std::unique_ptr<ops::Backend> inner_ = ops::make_reference_backend(1);
};

}  // namespace dsfp4::model
