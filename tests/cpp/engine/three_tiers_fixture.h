// A model whose experts lie on the emulated device, in RAM and in files, and what the same model
// says that lies in RAM.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "emulated/emulated_ops.h"
#include "engine/engine.h"

namespace dsfp4::engine {

using ops::testing::EmulatedDevice;
using ops::testing::EmulatedOps;
using Floats = std::vector<float>;
using Ids = std::vector<std::int32_t>;

inline constexpr std::int64_t kModelLayers = 4;
/// VRAM that a plan leaves for the rounding of blocks.
inline constexpr std::uint64_t kRounding = std::uint64_t{48} << 20;

inline LoadOptions load_options() {
  LoadOptions options;
  options.threads = 1;
  options.max_context = 64;
  options.device = "reference";
  return options;
}

// The answers of a model.
struct Says {
  Floats prompt, decode;
  Ids text;

  bool operator==(const Says&) const = default;
};

inline Says ask(Engine& engine) {
  const Ids ids = {3, 10, 17, 24, 1, 8, 15, 22, 29, 6, 13, 20, 27, 4, 11, 18, 25, 2, 9, 16};
  Says says;
  says.prompt.resize(ids.size() * static_cast<std::size_t>(engine.spec().vocab_size));
  says.decode.resize(says.prompt.size());
  ForwardOptions forward;
  engine.forward(ids, says.prompt, forward);
  forward.decode = true;
  engine.forward(ids, says.decode, forward);
  GenerateOptions options;
  options.max_tokens = 12;
  options.stop_ids.emplace();
  says.text = engine.generate(Ids{5, 3, 9}, options, {}).tokens;
  return says;
}

/// Bytes of dense layers that so many decode steps copy to the device.
inline std::uint64_t layers_copied(Engine& engine, std::int64_t tokens) {
  const std::uint64_t before = engine.stats().layer_upload_bytes;
  const Ids ids(static_cast<std::size_t>(tokens), 5);
  ForwardOptions forward;
  forward.decode = true;
  engine.forward(ids, {}, forward);
  return engine.stats().layer_upload_bytes - before;
}

class ThreeTiersFixture : public ::testing::TestWithParam<dsfp4::testing::TinyKind> {
 protected:
  ThreeTiersFixture() {
    dsfp4::testing::make_tiny_checkpoint(GetParam(), kModelLayers).write(folder_.path());
    Engine right(folder_.path(), load_options());
    right_ = ask(right);
  }
  std::unique_ptr<Engine> load(const LoadOptions& options,
                               const ops::testing::EmulatedOptions& device = {}) {
    Machine machine;
    machine.reading = reading_;
    machine.make_ops = [&] {
      auto made = std::make_unique<EmulatedOps>(device);
      device_ = made->emulated();
      return made;
    };
    return std::make_unique<Engine>(folder_.path(), options, machine);
  }
  static ops::testing::EmulatedOptions as_a_gpu() { return {.routed_experts = true}; }
  // Bytes of VRAM from which on the model loads with these options, but for the rounding.
  std::uint64_t least_vram(const LoadOptions& options) {
    ops::testing::EmulatedOptions device = as_a_gpu();
    device.memory_limit = kRounding + 1;
    try {
      load(options, device);
    } catch (const MemoryLimitError& error) {
      return error.needed();
    }
    ADD_FAILURE() << "it takes no VRAM at all";
    return 0;
  }

  dsfp4::testing::ScratchFolder folder_;
  storage::ReaderOptions reading_;  // of the next load()
  std::shared_ptr<EmulatedDevice> device_;
  Says right_;
};

}  // namespace dsfp4::engine
