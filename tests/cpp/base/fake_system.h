// A /proc and a /sys of files that a test writes.
#pragma once

#include <atomic>
#include <filesystem>
#include <string>
#include <unistd.h>

#include "base/cgroups.h"
#include "base/files.h"

namespace dsfp4 {

class FakeSystem {
 public:
  FakeSystem() {
    static std::atomic<int> count = 0;
    root_ = std::filesystem::temp_directory_path() /
            ("dsfp4-system-" + std::to_string(getpid()) + "-" + std::to_string(++count));
  }
  ~FakeSystem() {
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }
  FakeSystem(const FakeSystem&) = delete;
  FakeSystem& operator=(const FakeSystem&) = delete;

  void write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_ / path;
    std::filesystem::create_directories(file.parent_path());
    replace_file(file, text);
  }
  SystemRoots roots() const { return {root_ / "proc", root_ / "sys"}; }

 private:
  std::filesystem::path root_;
};

}  // namespace dsfp4
