#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/warm_start.h"

namespace dsfp4::residency {
namespace {

class WarmStartFile : public testing::Test {
 protected:
  WarmStartFile()
      : folder_(
            std::filesystem::path(testing::TempDir()) /
            (std::string("warm-") + testing::UnitTest::GetInstance()->current_test_info()->name())),
        path_(warm_start_path(folder_ / "deep" / "er", 42)) {}
  ~WarmStartFile() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path folder_;
  std::filesystem::path path_;
  const std::vector<float> state_{0.0f, 1.5f, 3.0f};
};

TEST_F(WarmStartFile, ComesBack) {
  EXPECT_FALSE(load_warm_start(path_, 42, "lfu"));
  save_warm_start(path_, 42, "lfu", state_);
  EXPECT_EQ(load_warm_start(path_, 42, "lfu"), state_);
  EXPECT_FALSE(load_warm_start(path_, 43, "lfu"));
  EXPECT_FALSE(load_warm_start(path_, 42, "lru"));
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator(path_.parent_path())) {
    ++files;
  }
  EXPECT_EQ(files, 1u);
}

TEST_F(WarmStartFile, ADamagedFileIsIgnored) {
  save_warm_start(path_, 42, "lfu", state_);
  std::string bytes;
  {
    std::ifstream file(path_, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(file), {});
  }
  const auto write = [&](const std::string& content) {
    std::ofstream(path_, std::ios::binary) << content;
  };
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    write(bytes.substr(0, length));
    EXPECT_FALSE(load_warm_start(path_, 42, "lfu")) << length;
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string changed = bytes;
    changed[i] = static_cast<char>(changed[i] ^ 0x10);
    write(changed);
    EXPECT_FALSE(load_warm_start(path_, 42, "lfu")) << i;
  }
}

// Deleting the file shows what was written anew.
TEST_F(WarmStartFile, IsWrittenWhenThereIsSomethingNewAndNotTooOften) {
  using Clock = WarmStart::Clock;
  WarmStart file(path_.parent_path(), 42, "lfu");
  const auto written = [&] { return std::filesystem::remove(path_); };
  const Clock::time_point start{};
  std::vector<float> state = state_;
  EXPECT_FALSE(file.load());
  file.save(state, start);
  EXPECT_EQ(load_warm_start(path_, 42, "lfu"), state);
  EXPECT_TRUE(written());
  file.save(state, start + std::chrono::hours(1));
  EXPECT_FALSE(written());
  state[0] = 7.0f;
  file.save(state, start + WarmStart::kPeriod - std::chrono::seconds(1));
  EXPECT_FALSE(written());
  file.save(state, start + WarmStart::kPeriod);
  EXPECT_EQ(file.load(), state);
  EXPECT_TRUE(written());
  file.save_last(state);
  EXPECT_FALSE(written());
  state[0] = 8.0f;
  file.save_last(state);
  EXPECT_TRUE(written());
}

TEST_F(WarmStartFile, AFileThatCannotBeWrittenIsTriedOnce) {
  std::filesystem::create_directories(folder_);
  std::ofstream(folder_ / "deep") << "a file";
  WarmStart file(path_.parent_path(), 42, "lfu");
  EXPECT_THROW(file.save(state_, {}), IoError);
  EXPECT_NO_THROW(file.save(state_, WarmStart::Clock::time_point(std::chrono::hours(1))));
  EXPECT_NO_THROW(file.save_last(state_));
}

TEST_F(WarmStartFile, AFolderThatCannotBeMadeIsAnError) {
  std::filesystem::create_directories(folder_);
  std::ofstream(folder_ / "deep") << "a file";
  EXPECT_THROW(save_warm_start(path_, 42, "lfu", state_), IoError);
}

}  // namespace
}  // namespace dsfp4::residency
