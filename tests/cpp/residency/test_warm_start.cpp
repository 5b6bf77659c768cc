#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/warm_start.h"

namespace dsfp4::residency {
namespace {

class WarmStart : public testing::Test {
 protected:
  WarmStart()
      : folder_(
            std::filesystem::path(testing::TempDir()) /
            (std::string("warm-") + testing::UnitTest::GetInstance()->current_test_info()->name())),
        path_(warm_start_path(folder_ / "deep" / "er", 42)) {}
  ~WarmStart() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path folder_;
  std::filesystem::path path_;
  const std::vector<float> state_{0.0f, 1.5f, 3.0f};
};

TEST_F(WarmStart, ComesBack) {
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

TEST_F(WarmStart, ADamagedFileIsIgnored) {
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

TEST_F(WarmStart, AFolderThatCannotBeMadeIsAnError) {
  std::filesystem::create_directories(folder_);
  std::ofstream(folder_ / "deep") << "a file";
  EXPECT_THROW(save_warm_start(path_, 42, "lfu", state_), IoError);
}

}  // namespace
}  // namespace dsfp4::residency
