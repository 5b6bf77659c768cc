// Every read of a load and of four tokens fails once, in every way, on a model whose experts, and
// even whose dense layers, stay in their files, and whose folder has checksums.
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
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

// How much stays in the files, so that tokens read, too.
struct Setting {
  std::int64_t prefetch_layers = 0;
  bool streamed = false;  // the dense layers stay there as well
};

// A process that has nothing yet on a machine that has everything: the plan is the same each time.
memory::MachineMemory boundless() { return {std::uint64_t{1} << 50, std::uint64_t{1} << 50, 0}; }

LoadOptions tiered(const Setting& setting) {
  LoadOptions options;
  options.threads = 1;
  options.max_context = 16;
  options.strategy.cpu_cache_size = 0.0;
  options.memory.prefetch_layers = setting.prefetch_layers;
  return options;
}

// The same with the least RAM that will do, where the dense layers are streamed.
LoadOptions planned(const std::filesystem::path& folder, const Setting& setting,
                    const Machine& machine) {
  LoadOptions options = tiered(setting);
  if (!setting.streamed) return options;
  const auto loads = [&](std::uint64_t limit) {
    options.ram_limit = limit;
    try {
      Engine(folder, options, machine);
      return true;
    } catch (const MemoryLimitError&) {
      return false;
    }
  };
  std::uint64_t refused = 1;
  std::uint64_t enough = 1'000'000'000;
  while (enough - refused > 1) {
    const std::uint64_t middle = (refused + enough) / 2;
    (loads(middle) ? enough : refused) = middle;
  }
  options.ram_limit = enough;
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

  storage::ReaderOptions shallow() {
    storage::ReaderOptions reading = options();
    reading.depth = 4;
    return reading;
  }

  // Loads and generates with one fault; says whether it came to that. An engine that came to life
  // must give the right tokens afterwards, unless the fault changed its files for good.
  bool inject(const testing::TinyCheckpoint& checkpoint, const LoadOptions& load, Fault fault,
              std::int64_t at, const Tokens& right) {
    const auto shard = folder_->path() / checkpoint.shards.front().name;
    FaultAt system(fault, at, shard.string());
    {
      storage::ReaderOptions faulty = shallow();
      faulty.system = &system;
      faulty.log = [&](std::string_view line) {
        if (line.find("waiting on") != line.npos && fault == Fault::kStallThenGoesOn) {
          system.hang_up();
        }
      };
      std::optional<Engine> engine;
      std::int64_t load_reads = 0;
      bool failed = true;
      const bool ahead = load.memory.prefetch_layers != 0 || load.ram_limit > 0;
      try {
        engine.emplace(folder_->path(), load, Machine{faulty, boundless});
        load_reads = system.reads();
        EXPECT_EQ(four_tokens(*engine), right);
        // A change of the file may come after the last byte that was needed, and so may a flip.
        // What was read on a guess may not be needed at all.
        const bool must_fail =
            !ahead && (fault == Fault::kIoErrorForever || fault == Fault::kStallForever);
        EXPECT_FALSE(must_fail && system.injected()) << static_cast<int>(fault) << " at " << at;
        failed = false;
      } catch (const IoError& error) {
        EXPECT_FALSE(storage::must_succeed(fault)) << error.what();
        EXPECT_NE(error.file().find(".safetensors"), std::string::npos);
        if (engine && fault != Fault::kIoErrorForever && at >= load_reads) {
          EXPECT_TRUE(says_whose(error, load)) << error.what();
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
        const bool may_fail = !failed && load.ram_limit > 0 &&
                              (fault == Fault::kBitFlip || !storage::must_succeed(fault));
        EXPECT_EQ(fault == Fault::kStallForever ? tokens_after_a_leap(*engine)
                                                : tokens_at_last(*engine, may_fail),
                  right)
            << "the next request, after " << static_cast<int>(fault) << " at " << at;
      }
    }
    system.wait_for_threads();
    const bool changed = fault == Fault::kTruncated || fault == Fault::kRewritten;
    if (changed || fault == Fault::kReplaced) write(checkpoint);
    return system.injected();
  }

  // What was read ahead for the next request may fail that one instead.
  static Tokens tokens_at_last(Engine& engine, bool may_fail) {
    try {
      return four_tokens(engine);
    } catch (const Error&) {
      if (!may_fail) throw;
      return four_tokens(engine);
    }
  }

  // The clock's leap was a stall to every read that was with the system then: each of them may fail
  // one request, and none a second one. What they hold comes back a moment after the stall's end.
  Tokens tokens_after_a_leap(Engine& engine) {
    std::set<std::pair<std::string, std::int64_t>> given_up;
    for (int moments = 0;;) {
      try {
        return four_tokens(engine);
      } catch (const IoError& error) {
        const std::string text = error.what();
        const bool held = text.find("has no buffer") != text.npos ||
                          text.find("no room for another expert") != text.npos;
        if (held && ++moments < 10'000) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
          continue;
        }
        const bool anew = given_up.insert({error.file(), error.offset()}).second;
        const bool in_flight = std::ssize(given_up) <= shallow().depth;
        if (held || error.error_number() != ETIMEDOUT || !anew || !in_flight) throw;
      }
    }
  }

  // An expert of a layer or, where those are streamed, a layer.
  static bool says_whose(const IoError& error, const LoadOptions& load) {
    const std::string text = error.what();
    const bool expert = text.find("expert ") != text.npos && text.find(" of layer ") != text.npos;
    return expert || (load.ram_limit > 0 && text.find("layer ") != text.npos);
  }

  // Every `step`-th read, in every way; returns how often that came to pass.
  std::int64_t inject_all(const testing::TinyCheckpoint& checkpoint, const LoadOptions& load,
                          std::int64_t step, const Tokens& right) {
    std::vector<Fault> faults(std::begin(storage::kAllFaults), std::end(storage::kAllFaults));
    faults.insert(faults.begin(), {Fault::kNone, Fault::kBitFlip});
    reads_ = 1;
    std::int64_t injections = 0;
    const auto descriptors = ReaderFiles::open_descriptors();
    for (const Fault fault : faults) {
      const std::int64_t most = fault == Fault::kNone ? 1 : reads_;
      for (std::int64_t at = 0; at < most && !HasFailure(); at += step) {
        injections += inject(checkpoint, load, fault, at, right) ? 1 : 0;
      }
      EXPECT_EQ(ReaderFiles::open_descriptors(), descriptors) << static_cast<int>(fault);
    }
    return injections;
  }

  // Into models of every kind, so placed; returns how often that came to pass.
  std::int64_t inject_into_all_kinds(std::int64_t layers, const std::vector<Setting>& settings,
                                     std::int64_t step) {
    std::int64_t injections = 0;
    for (const testing::TinyKind kind : testing::kTinyKinds) {
      const testing::TinyCheckpoint checkpoint = testing::make_tiny_checkpoint(kind, layers);
      folder_.emplace();
      hashed_ = false;
      write(checkpoint);
      Tokens right;
      {
        Engine engine(folder_->path(), tiered({}));
        right = four_tokens(engine);
        EXPECT_TRUE(engine.stats().tiered);
      }
      for (const Setting& setting : settings) {
        const Machine machine{shallow(), boundless};
        const LoadOptions load = planned(folder_->path(), setting, machine);
        {
          Engine engine(folder_->path(), load, machine);
          EXPECT_EQ(engine.stats().streamed_layers, setting.streamed ? layers : 0);
          EXPECT_EQ(four_tokens(engine), right);
        }
        injections += inject_all(checkpoint, load, step, right);
        if (HasFailure()) return injections;
      }
    }
    RecordProperty("injections", static_cast<int>(injections));
    return injections;
  }

  const bool full_ = std::getenv("DSFP4_FULL") != nullptr;
  std::optional<testing::ScratchFolder> folder_;
  bool hashed_ = false;
  std::int64_t reads_ = 0;
};

TEST_P(GenerationFaults, TheRightTokensOrATypedErrorAndTheNextRequestIsWhole) {
  const std::int64_t injections = inject_into_all_kinds(2, {{0}, {1}, {2}}, full_ ? 1 : 7);
  EXPECT_GE(injections, full_ ? 1000 : 150);  // with each of the two readers
}

TEST_P(GenerationFaults, ThatOfStreamedLayersToo) {
  const std::int64_t injections =
      inject_into_all_kinds(14, {{0, true}, {1, true}}, full_ ? 140 : 560);
  EXPECT_GE(injections, full_ ? 250 : 50);
}

INSTANTIATE_TEST_SUITE_P(Kinds, GenerationFaults,
                         ::testing::Values(ReaderKind::kUring, ReaderKind::kPread),
                         storage::kind_name);

}  // namespace
}  // namespace dsfp4::engine
