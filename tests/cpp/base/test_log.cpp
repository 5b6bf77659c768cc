#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/log.h"

namespace dsfp4 {
namespace {

class Log : public ::testing::Test {
 protected:
  ~Log() override { set_log_callback({}); }
};

TEST_F(Log, SaysNothingWithoutACallback) { log(LogLevel::kWarning, "nobody hears this"); }

TEST_F(Log, ReachesTheLastCallbackOnly) {
  std::vector<std::pair<LogLevel, std::string>> first, second;
  set_log_callback([&](LogLevel level, std::string_view text) { first.emplace_back(level, text); });
  log(LogLevel::kInfo, "one");
  set_log_callback(
      [&](LogLevel level, std::string_view text) { second.emplace_back(level, text); });
  log(LogLevel::kWarning, "two");
  set_log_callback({});
  log(LogLevel::kWarning, "three");
  using Messages = std::vector<std::pair<LogLevel, std::string>>;
  EXPECT_EQ(first, (Messages{{LogLevel::kInfo, "one"}}));
  EXPECT_EQ(second, (Messages{{LogLevel::kWarning, "two"}}));
}

TEST_F(Log, DropsWhatTheCallbackThrows) {
  int calls = 0;
  set_log_callback([&](LogLevel, std::string_view) {
    ++calls;
    throw std::runtime_error("from the callback");
  });
  log(LogLevel::kDebug, "first");
  log(LogLevel::kDebug, "second");
  EXPECT_EQ(calls, 2);
}

TEST_F(Log, MayBeSetFromInsideItself) {
  int calls = 0;
  set_log_callback([&](LogLevel, std::string_view) {
    ++calls;
    set_log_callback({});
    log(LogLevel::kDebug, "nobody hears this");
  });
  log(LogLevel::kDebug, "once");
  log(LogLevel::kDebug, "not again");
  EXPECT_EQ(calls, 1);
}

// For ThreadSanitizer: callbacks change while others speak.
TEST_F(Log, FromManyThreads) {
  constexpr int kThreads = 4;
  constexpr int kMessages = 500;
  std::atomic<int> heard = 0;
  const LogCallback count = [&](LogLevel, std::string_view text) {
    heard += text == "message" ? 1 : 0;
  };
  set_log_callback(count);
  std::vector<std::jthread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < kMessages; ++j) {
        if (j % 100 == 0) set_log_callback(count);
        log(LogLevel::kDebug, "message");
      }
    });
  }
  threads.clear();
  EXPECT_EQ(heard, kThreads * kMessages);
}

}  // namespace
}  // namespace dsfp4
