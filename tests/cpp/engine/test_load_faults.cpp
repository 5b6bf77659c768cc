// Every read of a load fails once, in every way.
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/loader.h"
#include "storage/faults.h"

namespace dsfp4::engine {
namespace {

using storage::Fault;
using storage::FaultAt;
using storage::ReaderFiles;
using storage::ReaderKind;

class LoadFaults : public storage::ReaderTest {};

void add_bytes(DeviceSpan<const std::byte> data, std::vector<std::byte>& bytes) {
  if (!data.data) return;
  const std::byte* start = ops::host_device().on_host(data.data);
  bytes.insert(bytes.end(), start, start + data.size);
}
void add_bytes(const ops::WeightView& weight, std::vector<std::byte>& bytes) {
  const auto [format, rows, cols] = std::tuple(weight.format, weight.rows, weight.cols);
  add_bytes({weight.data, format::data_bytes(format, rows, cols)}, bytes);
  add_bytes({weight.scales, format::scale_bytes(format, rows, cols)}, bytes);
}
void add_bytes(DeviceSpan<const float> values, std::vector<std::byte>& bytes) {
  add_bytes({values.data.as<const std::byte>(), values.size_bytes()}, bytes);
}

std::vector<std::byte> bytes_of(const LoadedWeights& loaded) {
  std::vector<std::byte> bytes;
  add_bytes(loaded.weights.embed_tokens, bytes);
  add_bytes(loaded.weights.lm_head, bytes);
  add_bytes(loaded.weights.norm, bytes);
  for (const model::LayerWeights& layer : loaded.weights.layers) {
    const model::AttentionWeights& attention = layer.self_attn;
    for (const ops::WeightView* weight :
         {&attention.q_proj, &attention.q_a_proj, &attention.q_b_proj,
          &attention.kv_a_proj_with_mqa, &attention.kv_b_proj, &attention.o_proj, &layer.gate}) {
      add_bytes(*weight, bytes);
    }
    for (const DeviceSpan<const float>& values :
         {layer.input_layernorm, layer.post_attention_layernorm, attention.q_a_layernorm,
          attention.kv_a_layernorm, layer.e_score_correction_bias}) {
      add_bytes(values, bytes);
    }
    std::vector<ops::ExpertView> mlps = layer.experts;
    mlps.push_back(layer.mlp);
    mlps.push_back(layer.shared_experts);
    for (const ops::ExpertView& mlp : mlps) {
      for (const ops::WeightView* weight : {&mlp.gate_proj, &mlp.up_proj, &mlp.down_proj}) {
        add_bytes(*weight, bytes);
      }
    }
  }
  return bytes;
}

std::vector<std::byte> load(const std::filesystem::path& folder, ReaderKind kind,
                            storage::FaultSystem* system,
                            std::function<void(std::string_view)> log = {}) {
  LoadWeightsOptions options;
  options.reader.kind = kind;
  options.reader.depth = 4;
  options.reader.piece_bytes = storage::kBlockBytes;
  options.reader.system = system;
  options.reader.log = std::move(log);
  return bytes_of(
      load_weights(folder, checkpoint::read_config(folder), ops::host_device(), options));
}

TEST_P(LoadFaults, TheRightWeightsOrATypedErrorAndTheNextLoadIsWhole) {
  std::int64_t injections = 0;
  for (const testing::TinyKind kind : testing::kTinyKinds) {
    const testing::TinyCheckpoint checkpoint = testing::make_tiny_checkpoint(kind);
    std::int64_t reads = 1;
    for (const Fault fault : storage::kAllFaults) {
      for (std::int64_t at = 0; at < reads; ++at) {
        const testing::ScratchFolder folder;
        checkpoint.write(folder.path());
        const auto descriptors = ReaderFiles::open_descriptors();
        storage::FaultSystem plain;
        const std::vector<std::byte> right = load(folder.path(), GetParam(), &plain);
        {
          const auto shard = folder.path() / checkpoint.shards.front().name;
          FaultAt system(fault, at, shard.string());
          try {
            const auto log = [&](std::string_view line) {
              const bool waits = line.find("waiting on") != line.npos;
              if (waits && fault == Fault::kStallThenGoesOn) system.hang_up();
            };
            const std::vector<std::byte> got = load(folder.path(), GetParam(), &system, log);
            EXPECT_TRUE(storage::must_succeed(fault) || !system.injected());
            EXPECT_EQ(got, right);
          } catch (const IoError& error) {
            EXPECT_FALSE(storage::must_succeed(fault)) << error.what();
            EXPECT_NE(error.file().find(".safetensors"), std::string::npos);
          }
          injections += system.injected() ? 1 : 0;
          reads = std::max(reads, system.reads());
          system.wait_for_threads();
        }
        EXPECT_EQ(ReaderFiles::open_descriptors(), descriptors);
        checkpoint.write(folder.path());
        EXPECT_EQ(load(folder.path(), GetParam(), &plain), right);
        if (HasFailure()) return;
      }
    }
  }
  EXPECT_GE(injections, 30);
}

INSTANTIATE_TEST_SUITE_P(Kinds, LoadFaults,
                         ::testing::Values(ReaderKind::kUring, ReaderKind::kPread),
                         storage::kind_name);

}  // namespace
}  // namespace dsfp4::engine
