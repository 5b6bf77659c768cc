// One MoE layer, op by op, in the order of model/: what each op costs at a real layer's widths.
#include <algorithm>
#include <deque>
#include <functional>
#include <numeric>

#include "ops/measure/kernel_bench.h"
#include "ops/measure/random_data.h"
#include "ops/measure/timing.h"

namespace dsfp4::ops::measure {
namespace {

using format::WeightFormat;

double bytes_of(const WeightView& weight) {
  return static_cast<double>(format::stored_bytes(weight.format, weight.rows, weight.cols));
}

double multiply_adds(const WeightView& weight) {
  return 2.0 * static_cast<double>(weight.rows) * static_cast<double>(weight.cols);
}

/// The layer's weights, activations and cache, and the steps that use them.
class Layer {
 public:
  Layer(Ops& ops, ThreadPool& pool, const LayerShape& shape, std::int64_t position,
        std::int64_t rows, bool decode)
      : ops_(ops),
        pool_(pool),
        shape_(shape),
        phase_(decode ? Phase::kDecode : Phase::kPrefill),
        rows_(rows),
        cache_(position + rows, shape.mla.cache_width(), ops.default_kv_format(), 1),
        sequence_{0, rows, position, cache_.view(0)} {
    fill_cache();
    norm_.assign(static_cast<std::size_t>(shape.hidden), 1.0f);
    for (std::int64_t e = 0; e < shape.expert_slots; ++e) experts_.push_back(expert());
    shared_ = expert();
    const auto pairs = static_cast<std::size_t>(rows * shape.top_k);
    own_.resize(pairs);
    used_.resize(pairs);
    mixing_.resize(pairs);
    spec_ = {shape.experts,
             shape.top_k,
             8,
             4,
             RouterSpec::Scoring::kSigmoid,
             RouterSpec::GroupScore::kSumOfTop2,
             true,
             2.5f};
  }

  std::vector<ProfiledOp> run(int runs) {
    const std::int64_t hidden = shape_.hidden;
    const Matrix x = matrix(hidden);
    const Matrix normed = matrix(hidden);
    const Matrix block = matrix(hidden);
    add_norm("input_layernorm", x, normed);
    attention(normed, block);
    add("add", 0, 0, [=, this] { ops_.add(block, x); });
    add_norm("post_attention_layernorm", x, normed);
    experts(normed, block);
    add("add", 0, 0, [=, this] { ops_.add(block, x); });
    for (int run = -1; run < runs; ++run) {
      for (std::size_t i = 0; i < steps_.size(); ++i) {
        const double took = seconds_of(steps_[i]);
        if (run >= 0) profile_[i].seconds.push_back(took);
      }
    }
    return profile_;
  }

 private:
  template <typename Step>
  void add(const char* name, double bytes, double flops, Step step) {
    profile_.push_back({name, bytes, flops, {}});
    steps_.emplace_back(std::move(step));
  }
  Matrix matrix(std::int64_t cols, std::int64_t rows = 0) {
    if (rows == 0) rows = rows_;
    values_.push_back(random_floats(rows * cols, values_.size()));
    return {values_.back().data(), rows, cols, cols};
  }
  WeightView weight(WeightFormat format, std::int64_t rows, std::int64_t cols) {
    weights_.push_back(random_weight(pool_, format, rows, cols, weights_.size()));
    return weights_.back().view();
  }
  ExpertView expert() {
    const std::int64_t width = shape_.moe_intermediate;
    return {weight(shape_.expert, width, shape_.hidden),
            weight(shape_.expert, width, shape_.hidden),
            weight(shape_.expert, shape_.hidden, width)};
  }
  void fill_cache() {
    const std::int64_t width = shape_.mla.cache_width();
    const std::int64_t tokens = sequence_.length();
    std::vector<float> latents = random_floats(tokens * width, 5);
    const SequenceRows all{0, tokens, 0, cache_.view(0)};
    ops_.kv_append({&all, 1}, {latents.data(), tokens, width, width});
  }

  void add_norm(const char* name, Matrix x, Matrix y) {
    add(name, 0, 0, [=, this] {
      ops_.rms_norm(x, std::span(norm_).first(static_cast<std::size_t>(x.cols)), 1e-6f, y);
    });
  }
  void add_linear(const char* name, const WeightView& w, Matrix x, Matrix y,
                  Inputs inputs = Inputs::kBf16) {
    add(name, bytes_of(w), static_cast<double>(rows_) * multiply_adds(w),
        [=, this] { ops_.linear(w, x, y, phase_, inputs); });
  }

  void attention(Matrix x, Matrix out) {
    const MlaShape& mla = shape_.mla;
    const WeightFormat format = shape_.attention;
    const Matrix compressed = matrix(shape_.q_lora_rank);
    const Matrix q = matrix(mla.heads * mla.qk_head_dim());
    const Matrix kv = matrix(mla.cache_width());
    const Matrix latent = kv.columns(0, mla.kv_lora_rank);
    const Matrix heads = matrix(mla.heads * mla.v_head_dim);
    const Matrix cos_sin = matrix(mla.qk_rope_head_dim);
    add_linear("q_a_proj", weight(format, shape_.q_lora_rank, shape_.hidden), x, compressed);
    add_norm("q_a_layernorm", compressed, compressed);
    add_linear("q_b_proj", weight(format, q.cols, shape_.q_lora_rank), compressed, q);
    add("rope", 0, 0, [=, this] {
      ops_.rope(q.columns(mla.qk_nope_head_dim, q.cols - mla.qk_nope_head_dim), mla.heads,
                mla.qk_head_dim(), cos_sin);
    });
    add_linear("kv_a_proj", weight(format, kv.cols, shape_.hidden), x, kv);
    add_norm("kv_a_layernorm", latent, latent);
    add("kv_append", 0, 0, [=, this] { ops_.kv_append({&sequence_, 1}, kv); });
    const WeightView kv_b =
        weight(format, mla.heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank);
    phase_ == Phase::kDecode ? absorbed(kv_b, q, heads) : expanded(kv_b, q, heads);
    add_linear("o_proj", weight(format, shape_.hidden, heads.cols), heads, out);
  }

  void absorbed(const WeightView& kv_b, Matrix q, Matrix heads) {
    const MlaShape& mla = shape_.mla;
    const Matrix q_abs = matrix(mla.heads * mla.kv_lora_rank);
    const Matrix attended = matrix(mla.heads * mla.kv_lora_rank);
    const auto rows = static_cast<double>(rows_);
    const double part = static_cast<double>(mla.qk_nope_head_dim) /
                        static_cast<double>(mla.qk_nope_head_dim + mla.v_head_dim);
    add("absorb_query", part * bytes_of(kv_b), rows * part * multiply_adds(kv_b),
        [=, this] { ops_.absorb_query(mla, kv_b, q, q_abs); });
    const double keys = rows * static_cast<double>(sequence_.length());
    add("latent_attention", cached_bytes(),
        keys * static_cast<double>(2 * mla.heads * (mla.kv_lora_rank + mla.cache_width())),
        [=, this] { ops_.latent_attention(mla, {&sequence_, 1}, q_abs, q, attended); });
    add("expand_value", (1 - part) * bytes_of(kv_b), rows * (1 - part) * multiply_adds(kv_b),
        [=, this] { ops_.expand_value(mla, kv_b, attended, heads); });
  }

  void expanded(const WeightView& kv_b, Matrix q, Matrix heads) {
    const MlaShape& mla = shape_.mla;
    const auto rows = static_cast<double>(rows_);
    const double keys =
        rows * (static_cast<double>(sequence_.position) + (rows + 1.0) / 2.0);  // seen in all
    const double flops =
        static_cast<double>(sequence_.length()) * multiply_adds(kv_b) +
        keys * static_cast<double>(2 * mla.heads * (mla.qk_head_dim() + mla.v_head_dim));
    add("prefill_attention", bytes_of(kv_b) + cached_bytes(), flops,
        [=, this] { ops_.prefill_attention(mla, kv_b, {&sequence_, 1}, q, heads); });
  }

  double cached_bytes() const {
    return static_cast<double>(sequence_.length() * shape_.mla.cache_width()) *
           static_cast<double>(kv_value_bytes(sequence_.kv.format));
  }

  void experts(Matrix x, Matrix out) {
    const Matrix logits = matrix(shape_.experts);
    add_linear("router gate", weight(WeightFormat::kF32, shape_.experts, shape_.hidden), x, logits,
               Inputs::kF32);
    add("route", 0, 0,
        [=, this] { ops_.route(spec_, logits, {}, {}, {own_, used_, mixing_, {}}); });
    const Matrix hidden = matrix(shape_.moe_intermediate, rows_ * shape_.top_k);
    const Matrix routed = matrix(shape_.hidden, rows_ * shape_.top_k);
    const double one =
        bytes_of(shared_.gate_proj) + bytes_of(shared_.up_proj) + bytes_of(shared_.down_proj);
    const auto pairs = static_cast<double>(rows_ * shape_.top_k);
    // Every run other experts, in turn: as many different ones as the tokens can choose.
    const std::int64_t distinct = std::min(rows_ * shape_.top_k, shape_.experts);
    add("experts", static_cast<double>(distinct) * one,
        pairs * 3 * multiply_adds(shared_.gate_proj),
        [=, this] { ops_.experts(next_tasks(distinct), shape_.top_k, x, hidden, routed, phase_); });
    const Matrix gate = matrix(shape_.moe_intermediate);
    const Matrix up = matrix(shape_.moe_intermediate);
    add_linear("shared gate_proj", shared_.gate_proj, x, gate);
    add_linear("shared up_proj", shared_.up_proj, x, up);
    add("silu_mul", 0, 0, [=, this] { ops_.silu_mul(gate, up); });
    add_linear("shared down_proj", shared_.down_proj, gate, out);
    add("combine", 0, 0, [=, this] { ops_.combine(routed, mixing_, shape_.top_k, out); });
  }

  std::span<const ExpertTask> next_tasks(std::int64_t distinct) {
    const std::int64_t pairs = rows_ * shape_.top_k;
    pairs_.resize(static_cast<std::size_t>(pairs));
    tasks_.clear();
    std::size_t at = 0;
    for (std::int64_t e = 0; e < distinct; ++e) {
      const std::size_t first = at;
      for (std::int64_t p = e; p < pairs; p += distinct) {
        pairs_[at++] = static_cast<std::int32_t>(p);
      }
      tasks_.push_back({&experts_[static_cast<std::size_t>(next_slot_++) % experts_.size()],
                        std::span(pairs_).subspan(first, at - first)});
    }
    return tasks_;
  }

  Ops& ops_;
  ThreadPool& pool_;
  LayerShape shape_;
  Phase phase_;
  std::int64_t rows_;
  CacheCopies cache_;
  SequenceRows sequence_;
  RouterSpec spec_;
  std::deque<std::vector<float>> values_;
  std::deque<format::EncodedMatrix> weights_;
  std::vector<float> norm_;
  std::vector<ExpertView> experts_;
  ExpertView shared_;
  std::vector<std::int32_t> own_, used_, pairs_;
  std::vector<float> mixing_;
  std::vector<ExpertTask> tasks_;
  std::int64_t next_slot_ = 0;
  std::vector<ProfiledOp> profile_;
  std::vector<std::function<void()>> steps_;
};

}  // namespace

std::vector<ProfiledOp> KernelBench::layer(const LayerShape& shape, std::int64_t position,
                                           std::int64_t rows, bool decode, int runs) {
  return Layer(*ops_, pool_, shape, position, rows, decode).run(runs);
}

}  // namespace dsfp4::ops::measure
