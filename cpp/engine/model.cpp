// The public Model is a thin handle around the Engine.
#include "dsfp4/model.h"

#include <utility>

#include "engine/engine.h"

namespace dsfp4 {

struct Model::Impl {
  Impl(const std::filesystem::path& folder, const LoadOptions& options)
      : engine(folder, options), device(options.device) {}

  engine::Engine engine;
  std::string device;
};

Model Model::load(const std::filesystem::path& folder, const LoadOptions& options) {
  return Model(std::make_unique<Impl>(folder, options));
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

std::int64_t Model::vocab_size() const noexcept { return impl_->engine.spec().vocab_size; }
std::int64_t Model::moe_layers() const noexcept { return impl_->engine.spec().moe_layers(); }
std::int64_t Model::num_experts_per_tok() const noexcept {
  return impl_->engine.spec().router.top_k;
}
std::int64_t Model::num_experts() const noexcept { return impl_->engine.spec().router.experts; }
std::int64_t Model::max_context() const noexcept { return impl_->engine.max_context(); }
std::uint64_t Model::weight_bytes() const noexcept { return impl_->engine.weight_bytes(); }
const std::string& Model::device() const noexcept { return impl_->device; }

void Model::set_memory_config(const MemoryConfig& config) {
  impl_->engine.set_memory_config(config);
}
void Model::set_memory_strategy(const MemoryStrategy& strategy) {
  impl_->engine.set_memory_strategy(strategy);
}
ModelStats Model::stats() const { return impl_->engine.stats(); }

void Model::forward(std::span<const std::int32_t> ids, std::span<float> logits,
                    const ForwardOptions& options) {
  impl_->engine.forward(ids, logits, options);
}

GenerationResult Model::generate(std::span<const std::int32_t> prompt,
                                 const GenerateOptions& options, const TokenCallback& on_token) {
  return impl_->engine.generate(prompt, options, on_token);
}

}  // namespace dsfp4
