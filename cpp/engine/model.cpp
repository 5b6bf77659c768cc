// The public Model is a thin handle around the Engine.
#include "dsfp4/model.h"

#include <unistd.h>
#include <utility>

#include "dsfp4/error.h"
#include "engine/engine.h"
#include "engine/struct_sizes.h"

namespace dsfp4 {

struct Model::Impl {
  Impl(const std::filesystem::path& folder, const LoadOptions& options)  // complete
      : engine(folder, options), device(options.device) {}

  bool forked() const noexcept { return ::getpid() != process; }
  /// For the calls: the engine's threads, and perhaps its locks, stayed with the parent.
  engine::Engine& here() {
    if (forked()) {
      throw Error(
          "this process was forked after the model was loaded, and a model does not survive that; "
          "load it in the child, or start processes with spawn");
    }
    return engine;
  }

  engine::Engine engine;
  std::string device;
  pid_t process = ::getpid();
};

void Model::Destroy::operator()(Impl* impl) const noexcept {
  if (impl == nullptr || impl->forked()) return;  // there are no threads to join in a child
  delete impl;
}

Model Model::load(const std::filesystem::path& folder, const LoadOptions& options) {
  return Model(std::unique_ptr<Impl, Destroy>(new Impl(folder, complete(options))));
}

Model::Model(std::unique_ptr<Impl, Destroy> impl) : impl_(std::move(impl)) {}
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

void Model::set_compute_streams(const ComputeStreams& streams, const KeepGoing& keep_going) {
  impl_->here().set_compute_streams(streams, keep_going);
}

void Model::set_memory_config(const MemoryConfig& config, const KeepGoing& keep_going) {
  impl_->here().set_memory_config(config, keep_going);
}
void Model::set_memory_strategy(const MemoryStrategy& strategy, const KeepGoing& keep_going) {
  impl_->here().set_memory_strategy(strategy, keep_going);
}
void Model::read_stats(ModelStats& stats) const { hand_over(impl_->here().stats(), stats); }

void Model::forward(std::span<const std::int32_t> ids, std::span<float> logits,
                    const ForwardOptions& options) {
  impl_->here().forward(ids, logits, complete(options));
}

void Model::generate_into(GenerationResult& result, std::span<const std::int32_t> prompt,
                          const GenerateOptions& options, const TokenCallback& on_token) {
  hand_over(impl_->here().generate(prompt, complete(options), on_token), result);
}

}  // namespace dsfp4
