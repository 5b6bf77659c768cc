// Thousands of damaged checkpoints: each is read, loaded and run, or refused with a typed error.
// DSFP4_FULL=1 takes the full count; DSFP4_MUTATION_SEED=N does one mutation alone and tells of it.
#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/allocation_meter.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"
#include "checkpoint/mutator.h"
#include "checkpoint/summary.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "dsfp4/model.h"

namespace dsfp4::testing {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kQuickCount = 500;
constexpr std::uint64_t kFullCount = 10'002;  // a multiple of the kinds
constexpr std::size_t kAllowance = std::size_t{64} << 20;
constexpr std::chrono::minutes kHang{2};

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? nullptr : value;
}

// Ends the process, with the seed, if one mutation takes far too long.
class Watchdog {
 public:
  Watchdog() : thread_([this] { watch(); }) {}
  ~Watchdog() {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  void start(std::uint64_t seed) {
    const std::lock_guard lock(mutex_);
    seed_ = seed;
    deadline_ = std::chrono::steady_clock::now() + kHang;
  }

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    while (!wake_.wait_for(lock, std::chrono::seconds(1), [this] { return done_; })) {
      if (std::chrono::steady_clock::now() < deadline_) continue;
      std::fprintf(stderr, "mutation with DSFP4_MUTATION_SEED=%llu hangs\n",
                   static_cast<unsigned long long>(seed_));
      std::abort();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  bool done_ = false;
  std::uint64_t seed_ = 0;
  std::chrono::steady_clock::time_point deadline_ = std::chrono::steady_clock::now() + kHang;
  std::thread thread_;
};

// Bytes of all files: the JSON, and the little data there is.
std::size_t file_bytes(const fs::path& folder) {
  std::size_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::error_code unreadable;  // folders and links that lead nowhere count nothing
    const auto size = fs::file_size(entry.path(), unreadable);
    if (!unreadable) bytes += static_cast<std::size_t>(size);
  }
  return bytes;
}

// What a mutation came to.
enum Outcome : std::size_t { kRan, kRefused, kUnsupported, kIo, kMemory, kOutcomes };

class Mutations : public ::testing::TestWithParam<TinyKind> {
 protected:
  Mutations() : sound_(make_tiny_checkpoint(GetParam())) {}

  // Everything that a user's load does, in its parts and then as a whole.
  void open_and_run() {
    checkpoint::ModelConfig config;
    {
      const AllocationMeter meter;
      struct Check {
        const AllocationMeter& meter;
        std::size_t bytes;
        ~Check() { EXPECT_LE(meter.peak_bytes(), 4 * bytes + kAllowance); }
      } const check{meter, file_bytes(folder_.path())};
      config = checkpoint::read_config(folder_.path());
      const auto catalogue = checkpoint::Catalogue::open(folder_.path());
      for (const auto& tensor : catalogue.tensors()) {
        const auto size = fs::file_size(catalogue.files().at(tensor.file));
        ASSERT_LE(tensor.offset, size);
        ASSERT_LE(tensor.bytes, size - tensor.offset);
      }
      const auto layout = checkpoint::resolve_layout(catalogue, config);
      EXPECT_EQ(checkpoint::summarize(catalogue, config, layout).tensors,
                catalogue.tensors().size());
    }
    LoadOptions options;
    options.threads = 1;
    options.max_context = std::min<std::int64_t>(8, config.max_position_embeddings);
    Model model = Model::load(folder_.path(), options);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(
        std::min<std::int64_t>(3, std::min(model.max_context(), model.vocab_size()))));
    std::iota(ids.begin(), ids.end(), 0);
    std::vector<float> logits(ids.size() * static_cast<std::size_t>(model.vocab_size()));
    model.forward(ids, logits);
  }

  // A CheckpointError says where.
  static void expect_facts(const CheckpointError& error) {
    EXPECT_FALSE(error.file().empty());
    const std::string message = error.what();
    EXPECT_NE(message.find(error.file()), std::string::npos) << message;
    EXPECT_NE(message.find(error.tensor()), std::string::npos) << message;
    EXPECT_GT(message.size(), error.file().size() + error.tensor().size()) << message;
  }

  Outcome outcome() {
    try {
      open_and_run();
      return kRan;
    } catch (const CheckpointError& error) {
      last_message_ = error.what();
      expect_facts(error);
      return kRefused;
    } catch (const UnsupportedError& error) {
      last_message_ = error.what();
      EXPECT_FALSE(last_message_.empty());
      return kUnsupported;
    } catch (const IoError& error) {
      last_message_ = error.what();
      EXPECT_FALSE(error.file().empty());
      EXPECT_NE(error.error_number(), 0) << last_message_;
      return kIo;
    } catch (const MemoryLimitError& error) {
      last_message_ = error.what();
      EXPECT_GT(error.needed(), error.available());
      return kMemory;
    } catch (const std::exception& error) {
      ADD_FAILURE() << "a foreign exception: " << error.what();
    }
    return kOutcomes;
  }

  // Returns the time in seconds.
  double mutate(std::uint64_t seed, std::array<std::uint64_t, kOutcomes + 1>& counts) {
    watchdog_.start(seed);
    Mutator mutator(seed);
    last_message_.clear();
    mutator.write_damaged(sound_, folder_.path());
    SCOPED_TRACE("DSFP4_MUTATION_SEED=" + std::to_string(seed) + ": " + mutator.log());
    const auto start = std::chrono::steady_clock::now();
    const Outcome result = outcome();
    last_log_ = mutator.log();
    ++counts[result];
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  TinyCheckpoint sound_;
  ScratchFolder folder_;
  Watchdog watchdog_;
  std::string last_log_;
  std::string last_message_;
};

TEST_P(Mutations, OfNothingLoadsAndRuns) {
  sound_.write(folder_.path());
  const auto config = checkpoint::read_config(folder_.path());
  const auto catalogue = checkpoint::Catalogue::open(folder_.path());
  EXPECT_EQ(checkpoint::resolve_layout(catalogue, config).layers.size(), 2u);
  EXPECT_NO_THROW(open_and_run());
}

TEST_P(Mutations, LoadOrThrowTypedErrors) {
  std::array<std::uint64_t, kOutcomes + 1> counts{};
  const std::uint64_t first = static_cast<std::uint64_t>(GetParam()) << 32;
  if (const char* one = environment("DSFP4_MUTATION_SEED")) {
    const std::uint64_t seed = std::strtoull(one, nullptr, 10);
    if (seed >> 32 != first >> 32) GTEST_SKIP() << "the seed belongs to another kind";
    const double seconds = mutate(seed, counts);
    std::printf("done: %s\nanswer after %.3f s: %s\n", last_log_.c_str(), seconds,
                last_message_.empty() ? "it runs" : last_message_.c_str());
    return;
  }
  const std::uint64_t count =
      (environment("DSFP4_FULL") ? kFullCount : kQuickCount) / std::size(kTinyKinds);
  double longest = 0.0;
  std::uint64_t slowest = first;
  for (std::uint64_t seed = first; seed < first + count && !HasFailure(); ++seed) {
    const double seconds = mutate(seed, counts);
    if (seconds > longest) {
      longest = seconds;
      slowest = seed;
    }
  }
  std::printf(
      "%llu mutations: %llu run, %llu CheckpointError, %llu UnsupportedError, %llu IoError, %llu "
      "MemoryLimitError; the longest, seed %llu, took %.3f s\n",
      static_cast<unsigned long long>(count), static_cast<unsigned long long>(counts[kRan]),
      static_cast<unsigned long long>(counts[kRefused]),
      static_cast<unsigned long long>(counts[kUnsupported]),
      static_cast<unsigned long long>(counts[kIo]),
      static_cast<unsigned long long>(counts[kMemory]), static_cast<unsigned long long>(slowest),
      longest);
  if (HasFailure()) return;
  // Damage that the readers never saw, or that always stopped them at once, would test little.
  EXPECT_GT(counts[kRefused], count / 3);
  EXPECT_GT(counts[kRan], count / 50);
}

INSTANTIATE_TEST_SUITE_P(AllKinds, Mutations, ::testing::ValuesIn(kTinyKinds),
                         [](const ::testing::TestParamInfo<TinyKind>& info) -> std::string {
                           switch (info.param) {
                             case TinyKind::kNvfp4:
                               return "Nvfp4";
                             case TinyKind::kCompressed:
                               return "Compressed";
                             case TinyKind::kBf16:
                               return "Bf16";
                             case TinyKind::kMixed:
                               return "Mixed";
                           }
                           return "";
                         });

// The most tensors that the longest header can hold: its memory is bounded by its own size.
TEST(HeaderMemory, StaysBelowFourTimesTheHeader) {
  const std::size_t wanted = environment("DSFP4_FULL") ? 20'000'000 : 5'000'000;
  ScratchFolder folder;
  std::string header = "{";
  header.reserve(wanted + 128);
  for (std::size_t i = 0; header.size() < wanted; ++i) {
    header += (i == 0 ? "\"" : ",\"") + std::to_string(i) +
              "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
  }
  header += '}';
  const std::size_t bytes = header.size();
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(bytes >> (8 * i));
  write_file(folder.path() / "model.safetensors", file + header);
  header = {};
  const AllocationMeter meter;
  const auto catalogue = checkpoint::Catalogue::open(folder.path());
  EXPECT_GT(catalogue.tensors().size(), wanted / 64);
  EXPECT_LE(meter.peak_bytes(), 4 * bytes + (std::size_t{1} << 20));
  std::printf("a header of %zu bytes took %zu bytes of memory\n", bytes, meter.peak_bytes());
}

// The same for an index: every tensor in a shard that is not there is remembered twice.
TEST(IndexMemory, StaysBelowFourTimesTheIndex) {
  const std::size_t wanted = std::size_t{environment("DSFP4_FULL") ? 12u : 6u} << 20;
  ScratchFolder folder;
  make_tiny_checkpoint(TinyKind::kNvfp4).write(folder.path());
  std::string index = R"({"weight_map":{"t":"model-00001-of-00002.safetensors")";
  index.reserve(wanted + 128);
  constexpr std::string_view kDigits = "0123456789abcdefghijklmnopqrstuvwxyz";
  for (std::size_t i = 0; index.size() < wanted; ++i) {
    index += ",\"";
    for (std::size_t rest = i; rest > 0; rest /= kDigits.size()) {
      index += kDigits[rest % kDigits.size()];
    }
    index += "\":\".safetensors\"";
  }
  index += "}}";
  const std::size_t bytes = index.size();
  write_file(folder.path() / "model.safetensors.index.json", index);
  index = {};
  const AllocationMeter meter;
  try {
    checkpoint::Catalogue::open(folder.path());
    ADD_FAILURE() << "'t' is in no shard";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.tensor(), "t") << error.what();
  }
  EXPECT_LE(meter.peak_bytes(), 4 * bytes + (std::size_t{1} << 20));
  std::printf("an index of %zu bytes took %zu bytes of memory\n", bytes, meter.peak_bytes());
}

// Arrays of the smallest values are the densest tree.
TEST(ConfigMemory, StaysInBounds) {
  ScratchFolder folder;
  TinyCheckpoint checkpoint = make_tiny_checkpoint(TinyKind::kNvfp4);
  std::string list = "[0";
  for (int i = 0; i < 250'000; ++i) list += ",0";
  checkpoint.config.set("extra", JsonNode::raw(list + "]"));
  checkpoint.write(folder.path());
  const std::size_t bytes = fs::file_size(folder.path() / "config.json");
  const AllocationMeter meter;
  checkpoint::read_config(folder.path());
  EXPECT_LE(meter.peak_bytes(), 4 * bytes + kAllowance);
  std::printf("a configuration of %zu bytes took %zu bytes of memory\n", bytes, meter.peak_bytes());
}

}  // namespace
}  // namespace dsfp4::testing
