// Rates of an emulated device's wires, as a model is loaded.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/files.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "dsfp4/log.h"
#include "emulated/emulated_ops.h"
#include "engine/engine.h"
#include "engine/kept_rates.h"
#include "storage/reader_fixture.h"

namespace dsfp4::engine {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using ops::testing::EmulatedDevice;
using ops::testing::EmulatedOps;
using Ids = std::vector<std::int32_t>;

constexpr double kCopyRate = 4e6;

// The messages of the log that say something of rates.
class Said {
 public:
  Said() {
    set_log_callback([this](LogLevel level, std::string_view message) {
      const std::lock_guard lock(mutex_);
      if (level == LogLevel::kInfo && message.find("rates") != message.npos) {
        messages_.emplace_back(message);
      }
    });
  }
  ~Said() { set_log_callback({}); }
  Said(const Said&) = delete;
  Said& operator=(const Said&) = delete;
  std::vector<std::string> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(messages_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> messages_;
};

class RatesOfModel : public ::testing::Test {
 protected:
  RatesOfModel() {
    dsfp4::testing::make_tiny_checkpoint(dsfp4::testing::TinyKind::kNvfp4, 3).write(model());
    options_.device = "reference";
    options_.threads = 1;
    options_.max_context = 64;
    options_.strategy.max_experts = 0;
    options_.warm_start_folder = (folder_.path() / "kept").string();
    options_.memory.prefetch_layers = 0;
    machine_.rate_limits = {.ssd_time = 10ms,
                            .time = 10ms,
                            .least_bytes = 1,
                            .most_bytes = 40'000,
                            .in_flight_bytes = 20'000};
    machine_.make_ops = [this] {
      auto made = std::make_unique<EmulatedOps>(
          ops::testing::EmulatedOptions{.copy_bytes_per_second = kCopyRate});
      device_ = made->emulated();
      device_->memory().fail_allocation(fail_allocation_);
      return made;
    };
  }
  fs::path model() const {
    fs::create_directories(folder_.path() / "model");
    return folder_.path() / "model";
  }
  std::unique_ptr<Engine> load() { return std::make_unique<Engine>(model(), options_, machine_); }
  Rates rates() { return load()->stats().rates; }
  std::vector<fs::path> files() const {
    std::vector<fs::path> found;
    if (!fs::exists(options_.warm_start_folder)) return found;
    for (const auto& entry : fs::directory_iterator(options_.warm_start_folder)) {
      if (entry.path().extension() == ".rates") found.push_back(entry.path());
    }
    return found;
  }
  // Puts other rates into the one file that there is.
  void keep(const Rates& rates) const {
    const std::string text = read_whole_file(files().at(0));
    const std::size_t title = text.find('\n') + 1;
    const std::string machine = text.substr(title, text.find('\n', title) - title);
    KeptRates(options_.warm_start_folder, machine).save(rates);
  }
  void expect_all_given_back() const {
    EXPECT_EQ(device_->memory().used(), 0u);
    EXPECT_EQ(device_->staging().used(), 0u);
  }

  dsfp4::testing::ScratchFolder folder_;
  LoadOptions options_;
  Machine machine_;
  std::int64_t fail_allocation_ = 0;
  std::shared_ptr<EmulatedDevice> device_;
  Said said_;
};

TEST_F(RatesOfModel, AreMeasuredOnceAndKept) {
  const Rates first = rates();
  EXPECT_GT(first.ssd, 0.0);
  EXPECT_GT(first.host_experts, 0.0);
  EXPECT_GT(first.both_host_experts, 0.0);
  for (const double copies : {first.copy_in, first.copy_out, first.both_copy_in}) {
    EXPECT_GT(copies, 0.0);
    EXPECT_LE(copies, kCopyRate);
  }
  ASSERT_EQ(files().size(), 1u);
  expect_all_given_back();

  constexpr Rates kOther{1, 2, 3, 4, 5, 6};
  keep(kOther);
  EXPECT_EQ(rates(), kOther);
}

TEST_F(RatesOfModel, WithoutAGpuTwoWiresAreMeasured) {
  machine_.make_ops = nullptr;
  options_.strategy.max_experts.reset();
  options_.strategy.cpu_cache_size = 0.0;
  const Rates measured = rates();
  EXPECT_GT(measured.ssd, 0.0);
  EXPECT_GT(measured.host_experts, 0.0);
  EXPECT_EQ(measured, (Rates{.ssd = measured.ssd, .host_experts = measured.host_experts}));
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(RatesOfModel, AreUnknownWithoutAFolderOrWithTooLittleToMeasureWith) {
  const std::string folder = std::exchange(options_.warm_start_folder, "");
  EXPECT_EQ(rates(), Rates());
  options_.warm_start_folder = folder;
  machine_.rate_limits = {};
  EXPECT_EQ(rates(), Rates());
  EXPECT_TRUE(files().empty());
  EXPECT_TRUE(said_.take().empty());
}

TEST_F(RatesOfModel, AreMeasuredAnewWhereTheFileIsDamagedOrAnotherMachines) {
  rates();
  const fs::path file = files().at(0);
  dsfp4::testing::write_file(file, "garbage");
  said_.take();
  EXPECT_GT(rates().ssd, 0.0);
  const std::vector<std::string> messages = said_.take();
  ASSERT_EQ(messages.size(), 2u);
  EXPECT_NE(messages[0].find(file.string()), std::string::npos);
  EXPECT_NE(messages[1].find("measured in"), std::string::npos);
  EXPECT_NE(read_whole_file(file), "garbage");

  options_.threads = 2;
  EXPECT_GT(rates().ssd, 0.0);
  EXPECT_EQ(files().size(), 2u);
}

// Reads that are held to a rate are not the disk's, so they are not kept.
TEST_F(RatesOfModel, OfReadsThatAreHeldAreNoHigher) {
  rates();
  keep({.ssd = 5e9, .host_experts = 1.0});
  options_.ssd_rate = 2'000'000'000;
  EXPECT_EQ(rates().ssd, 2e9);
  fs::remove(files().at(0));
  EXPECT_GT(rates().ssd, 0.0);
  EXPECT_TRUE(files().empty());
}

TEST_F(RatesOfModel, ADiskThatFailsLeavesThemUnknown) {
  storage::FaultSystem system;
  std::atomic<bool> fails = false;
  system.before = [&](storage::ReadCall&) { return fails ? std::optional(-EACCES) : std::nullopt; };
  machine_.reading.system = &system;
  options_.progress = [&](std::uint64_t done, std::uint64_t total) { fails = done == total; };
  const auto engine = load();
  fails = false;
  EXPECT_EQ(engine->stats().rates, Rates());
  EXPECT_TRUE(files().empty());
  const std::vector<std::string> messages = said_.take();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_NE(messages[0].find("unknown"), std::string::npos);
  GenerateOptions generate;
  generate.max_tokens = 2;
  EXPECT_NO_THROW(engine->generate(Ids{5, 3}, generate, {}));
}

TEST_F(RatesOfModel, VramThatIsNotThereLeavesCopiesUnknown) {
  fail_allocation_ = 2;  // the first one is for the weights
  const Rates measured = rates();
  EXPECT_GT(measured.host_experts, 0.0);
  EXPECT_EQ(measured, (Rates{.ssd = measured.ssd, .host_experts = measured.host_experts}));
  EXPECT_TRUE(files().empty());
}

// No wait is longer than what is asked between, however long the measurement.
TEST_F(RatesOfModel, TheMeasurementCanBeLeft) {
  using Limits = RateLimits;
  for (const auto forever : {&Limits::ssd_time, &Limits::time}) {
    machine_.rate_limits.*forever = 24h;
    bool loaded = false;
    int patience = 30;
    options_.progress = [&](std::uint64_t done, std::uint64_t total) { loaded = done == total; };
    options_.keep_going = [&] { return !loaded || --patience > 0; };
    EXPECT_THROW(load(), CancelledError);
    expect_all_given_back();
    machine_.rate_limits.*forever = 1ms;
  }
}

TEST_F(RatesOfModel, CopiesCanBeLeft) {
  for (const ops::Queue queue : {ops::Queue::kUpload, ops::Queue::kDownload}) {
    options_.keep_going = [&] { return device_->counts().copies_in(queue) == 0; };
    EXPECT_THROW(load(), CancelledError);
    expect_all_given_back();
  }
}

// The split of a first step: half and half while nothing is known.
TEST_F(RatesOfModel, SplitExpertsFromTheFirstStepOn) {
  rates();
  const auto computed = [&] {
    const auto engine = load();
    GenerateOptions generate;
    generate.max_tokens = 3;
    generate.stop_ids.emplace();
    engine->generate(Ids{5}, generate, {});
    return engine->stats().cpu_bytes;
  };
  keep({.both_host_experts = 1.0, .both_copy_in = 1e12});
  EXPECT_EQ(computed(), 0u);
  keep({});
  EXPECT_GT(computed(), 0u);
}

}  // namespace
}  // namespace dsfp4::engine
