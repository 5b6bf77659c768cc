// Every read of a load and of four tokens fails once, in every way, on a model whose experts stay
// in their files and whose folder has checksums.
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/engine.h"
#include "engine/verify.h"
#include "storage/faults.h"

namespace dsfp4::engine {
namespace {

using storage::Fault;
using storage::FaultAt;
using storage::ReaderFiles;
using storage::ReaderKind;
using Tokens = std::vector<std::int32_t>;

constexpr std::int32_t kPrompt[] = {5, 3, 9};

// With little memory, so that tokens read, too.
LoadOptions tiered(std::int64_t prefetch_layers) {
  LoadOptions options;
  options.threads = 1;
  options.max_context = 16;
  options.strategy.cpu_cache_size = 0.0;
  options.memory.prefetch_layers = prefetch_layers;
  return options;
}

Tokens four_tokens(Engine& engine) {
  GenerateOptions options;
  options.max_tokens = 4;
  options.stop_ids.emplace();
  return engine.generate(kPrompt, options, {}).tokens;
}

class GenerationFaults : public storage::ReaderTest {
 protected:
  // The folder anew, with checksums.
  void write(const testing::TinyCheckpoint& checkpoint) {
    checkpoint.write(folder_->path());
    if (!hashed_) verify(folder_->path(), 1, true, {});
    hashed_ = true;
  }

  // Loads and generates with one fault; says whether it came to that. An engine that came to life
  // must give the right tokens afterwards, unless the fault changed its files for good.
  bool inject(const testing::TinyCheckpoint& checkpoint, std::int64_t prefetch_layers, Fault fault,
              std::int64_t at, const Tokens& right) {
    const auto shard = folder_->path() / checkpoint.shards.front().name;
    FaultAt system(fault, at, shard.string());
    {
      storage::ReaderOptions faulty = options();
      faulty.depth = 4;
      faulty.system = &system;
      faulty.log = [&](std::string_view line) {
        if (line.find("waiting on") != line.npos && fault == Fault::kStallThenGoesOn) {
          system.hang_up();
        }
      };
      std::optional<Engine> engine;
      std::int64_t load_reads = 0;
      try {
        engine.emplace(folder_->path(), tiered(prefetch_layers), faulty);
        load_reads = system.reads();
        EXPECT_EQ(four_tokens(*engine), right);
        // A change of the file may come after the last byte that was needed, and so may a flip.
        // What was read on a guess may not be needed at all.
        const bool must_fail = prefetch_layers == 0 &&
                               (fault == Fault::kIoErrorForever || fault == Fault::kStallForever);
        EXPECT_FALSE(must_fail && system.injected()) << static_cast<int>(fault) << " at " << at;
      } catch (const IoError& error) {
        EXPECT_FALSE(storage::must_succeed(fault)) << error.what();
        EXPECT_NE(error.file().find(".safetensors"), std::string::npos);
        const bool of_an_expert = engine && fault != Fault::kIoErrorForever && at >= load_reads;
        if (of_an_expert) {
          EXPECT_NE(std::string(error.what()).find("expert "), std::string::npos) << error.what();
          EXPECT_NE(std::string(error.what()).find(" of layer "), std::string::npos);
        }
      } catch (const CheckpointError& error) {
        EXPECT_EQ(fault, Fault::kBitFlip) << error.what();
        EXPECT_NE(std::string(error.what()).find("checksum"), std::string::npos) << error.what();
        EXPECT_FALSE(error.tensor().empty());
      }
      system.hang_up();
      reads_ = std::max(reads_, system.reads());
      const bool for_good = fault == Fault::kTruncated || fault == Fault::kRewritten ||
                            fault == Fault::kIoErrorForever;
      if (engine && !for_good) {
        EXPECT_EQ(four_tokens(*engine), right)
            << "the next request, after " << static_cast<int>(fault) << " at " << at;
      }
    }
    const bool changed = fault == Fault::kTruncated || fault == Fault::kRewritten;
    if (changed || fault == Fault::kReplaced) write(checkpoint);
    return system.injected();
  }

  // Every `step`-th read, in every way; returns how often that came to pass.
  std::int64_t inject_all(const testing::TinyCheckpoint& checkpoint, std::int64_t prefetch_layers,
                          std::int64_t step, const Tokens& right) {
    std::vector<Fault> faults(std::begin(storage::kAllFaults), std::end(storage::kAllFaults));
    faults.insert(faults.begin(), {Fault::kNone, Fault::kBitFlip});
    reads_ = 1;
    std::int64_t injections = 0;
    const auto descriptors = ReaderFiles::open_descriptors();
    for (const Fault fault : faults) {
      // A load that has been given up still waits for its buffer, so nobody would hang up.
      if (fault == Fault::kStallForever && GetParam() == ReaderKind::kPread) continue;
      const std::int64_t most = fault == Fault::kNone ? 1 : reads_;
      for (std::int64_t at = 0; at < most && !HasFailure(); at += step) {
        injections += inject(checkpoint, prefetch_layers, fault, at, right) ? 1 : 0;
      }
      EXPECT_EQ(ReaderFiles::open_descriptors(), descriptors) << static_cast<int>(fault);
    }
    return injections;
  }

  std::optional<testing::ScratchFolder> folder_;
  bool hashed_ = false;
  std::int64_t reads_ = 0;
};

TEST_P(GenerationFaults, TheRightTokensOrATypedErrorAndTheNextRequestIsWhole) {
  const bool full = std::getenv("DSFP4_FULL") != nullptr;
  std::int64_t injections = 0;
  for (const testing::TinyKind kind : testing::kTinyKinds) {
    const testing::TinyCheckpoint checkpoint = testing::make_tiny_checkpoint(kind);
    folder_.emplace();
    hashed_ = false;
    write(checkpoint);
    Tokens right;
    {
      Engine engine(folder_->path(), tiered(0));
      right = four_tokens(engine);
      ASSERT_TRUE(engine.stats().tiered);
    }
    for (const std::int64_t prefetch_layers : {0, 1, 2}) {
      injections += inject_all(checkpoint, prefetch_layers, full ? 1 : 7, right);
      if (HasFailure()) return;
    }
  }
  EXPECT_GE(injections, full ? 1000 : 150);  // with each of the two readers
  RecordProperty("injections", static_cast<int>(injections));
}

INSTANTIATE_TEST_SUITE_P(Kinds, GenerationFaults,
                         ::testing::Values(ReaderKind::kUring, ReaderKind::kPread),
                         storage::kind_name);

}  // namespace
}  // namespace dsfp4::engine
