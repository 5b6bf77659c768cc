// The warnings that are logged while this lives.
#pragma once

#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "dsfp4/log.h"

namespace dsfp4::testing {

class Warnings {
 public:
  Warnings() {
    set_log_callback([this](LogLevel level, std::string_view message) {
      if (level != LogLevel::kWarning) return;
      const std::lock_guard lock(mutex_);
      messages_.emplace_back(message);
    });
  }
  ~Warnings() { set_log_callback({}); }
  Warnings(const Warnings&) = delete;
  Warnings& operator=(const Warnings&) = delete;

  /// The warnings that `part` is in.
  std::vector<std::string> with(std::string_view part) const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> found;
    for (const std::string& message : messages_) {
      if (message.find(part) != std::string::npos) found.push_back(message);
    }
    return found;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> messages_;
};

}  // namespace dsfp4::testing
