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

std::vector<std::byte> bytes_of(const LoadedWeights& loaded) {
  // The embedding is what is placed first, so the arena begins there.
  const std::byte* start = loaded.weights.embed_tokens.data;
  return {start, start + loaded.arena->used()};
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
  const auto backend = ops::make_reference_backend(1);
  return bytes_of(load_weights(folder, checkpoint::read_config(folder), *backend, options));
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
