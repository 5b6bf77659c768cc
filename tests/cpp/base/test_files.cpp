#include <algorithm>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <sys/file.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "base/files.h"
#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

class ReplaceFile : public testing::Test {
 protected:
  ReplaceFile() {
    std::string name = std::filesystem::temp_directory_path() / "dsfp4-files-XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~ReplaceFile() override { std::filesystem::remove_all(folder_); }

  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      names.insert(entry.path().filename().string());
    }
    return names;
  }

  std::filesystem::path folder_;
};

TEST_F(ReplaceFile, TheOldOneOrTheNewOne) {
  replace_file(folder_ / "a", "old");
  replace_file(folder_ / "a", "new and longer");
  EXPECT_EQ(read_whole_file(folder_ / "a"), "new and longer");
  EXPECT_EQ(files(), std::set<std::string>{"a"});
  EXPECT_THROW(replace_file(folder_ / "absent" / "a", "x"), IoError);
}

// As two models of one checkpoint do with what they remember.
TEST_F(ReplaceFile, ManyAtOnceAndOneOfThemStays) {
  std::vector<std::string> contents;
  for (char c = 'a'; c < 'e'; ++c) contents.emplace_back(std::size_t{100'000}, c);
  {
    std::vector<std::jthread> writers;
    for (const std::string& content : contents) {
      writers.emplace_back([&] {
        for (int i = 0; i < 25; ++i) EXPECT_NO_THROW(replace_file(folder_ / "a", content));
      });
    }
  }
  const std::string stayed = read_whole_file(folder_ / "a");
  EXPECT_NE(std::ranges::find(contents, stayed), contents.end());
  EXPECT_EQ(files(), std::set<std::string>{"a"});
}

TEST_F(ReplaceFile, LeftoversAreDeletedAndWhatIsBeingWrittenIsNot) {
  std::ofstream(folder_ / "a.77.part") << "killed";
  std::ofstream(folder_ / "a.77-5.part") << "killed too";
  std::ofstream(folder_ / "a.88-0.part") << "of a process that writes still";
  std::ofstream(folder_ / "b.77-5.part") << "of another file";
  const int writer = ::open((folder_ / "a.88-0.part").c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::flock(writer, LOCK_EX), 0);
  replace_file(folder_ / "a", "x");
  EXPECT_EQ(files(), (std::set<std::string>{"a", "a.88-0.part", "b.77-5.part"}));
  ::close(writer);
}

}  // namespace
}  // namespace dsfp4
