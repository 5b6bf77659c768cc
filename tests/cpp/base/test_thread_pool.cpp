#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <sys/resource.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

class ThreadPoolOf : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolOf, EveryIndexOnce) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.size(), GetParam());
  for (const std::int64_t count : {0, 1, 7, 64, 1000}) {
    for (const std::int64_t grain : {1, 3, 5000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
      pool.parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
      });
      for (const auto& times : seen) EXPECT_EQ(times.load(), 1);
    }
  }
}

TEST_P(ThreadPoolOf, ExceptionReachesTheCallerAndThePoolLivesOn) {
  ThreadPool pool(GetParam());
  for (int round = 0; round < 50; ++round) {
    EXPECT_THROW(pool.parallel_for(100, 1,
                                   [&](std::int64_t begin, std::int64_t end) {
                                     if (begin <= 37 && 37 < end) throw std::runtime_error("37");
                                   }),
                 std::runtime_error);
  }
  std::atomic<int> sum = 0;
  pool.parallel_for(10, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sum += static_cast<int>(i);
  });
  EXPECT_EQ(sum.load(), 45);
}

TEST_P(ThreadPoolOf, NestedCallsRunInPlace) {
  ThreadPool pool(GetParam());
  std::atomic<int> inner = 0;
  pool.parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      pool.parallel_for(8, 1,
                        [&](std::int64_t b, std::int64_t e) { inner += static_cast<int>(e - b); });
    }
  });
  EXPECT_EQ(inner.load(), 64);
}

TEST_P(ThreadPoolOf, SeveralCallersTakeTurns) {
  ThreadPool pool(GetParam());
  std::atomic<int> total = 0;
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        pool.parallel_for(16, 1, [&](std::int64_t begin, std::int64_t end) {
          total += static_cast<int>(end - begin);
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), 4 * 100 * 16);
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolOf, testing::Values(1, 2, 5));

TEST(ThreadPool, RefusesNoThreads) { EXPECT_THROW(ThreadPool(0), ParameterError); }

// With little address space left, the system has no stacks for so many threads.
TEST(ThreadPoolDeathTest, SaysThatTheSystemHasNotSoManyThreads) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer needs the address space itself";
#endif
  const auto start_many = [] {
    const rlimit limit{std::size_t{1} << 30, std::size_t{1} << 30};
    if (setrlimit(RLIMIT_AS, &limit) != 0) std::_Exit(2);
    try {
      ThreadPool pool(1000);
    } catch (const ParameterError& error) {
      std::_Exit(error.parameter() == "threads" ? 0 : 3);
    }
    std::_Exit(4);
  };
  EXPECT_EXIT(start_many(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace dsfp4
