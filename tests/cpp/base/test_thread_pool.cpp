#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "base/thread_team.h"
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

// A pool is a handle: the workers are the process's own, and ranges of all pools take turns.
TEST(ThreadPool, PoolsOfManySizesShareTheWorkers) {
  std::atomic<int> total = 0;
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&total, c] {
      for (int round = 0; round < 50; ++round) {
        ThreadPool pool(1 + (c + round) % 6);  // comes and goes; the largest one grows the team
        pool.parallel_for(16, 1, [&](std::int64_t begin, std::int64_t end) {
          total += static_cast<int>(end - begin);
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), 4 * 50 * 16);
}

TEST(ThreadPool, ASmallPoolUsesFewThreads) {
  ThreadPool large(6);
  const ThreadPool keeps_it_alive = large;
  ThreadPool small(2);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  for (int round = 0; round < 200; ++round) {
    small.parallel_for(64, 1, [&](std::int64_t, std::int64_t) {
      const std::lock_guard lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
  }
  EXPECT_LE(seen.size(), 2U);
  EXPECT_TRUE(seen.contains(std::this_thread::get_id())) << "the caller works, too";
}

TEST(ThreadPool, AnotherPoolInsideABodyRunsInPlace) {
  ThreadPool outer(3);
  ThreadPool inner(2);
  std::atomic<int> count = 0;
  outer.parallel_for(6, 1, [&](std::int64_t, std::int64_t) {
    inner.parallel_for(10, 1,
                       [&](std::int64_t b, std::int64_t e) { count += static_cast<int>(e - b); });
  });
  EXPECT_EQ(count.load(), 60);
}

TEST(ThreadPool, SleepersWakeUp) {
  ThreadPool pool(3);
  std::atomic<int> count = 0;
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // far longer than a worker spins
    pool.parallel_for(3, 1, [&](std::int64_t, std::int64_t) { ++count; });
  }
  EXPECT_EQ(count.load(), 60);
}

// As many as load options allow: the team's order has room for them beside its end.
TEST(ThreadPool, TheMostThreadsRunAndEnd) {
  ThreadPool pool(ThreadTeam::kMostWorkers + 1);
  std::atomic<int> total = 0;
  for (int round = 0; round < 3; ++round) {
    pool.parallel_for(2 * pool.size(), 1, [&](std::int64_t begin, std::int64_t end) {
      total += static_cast<int>(end - begin);
    });
  }
  EXPECT_EQ(total.load(), 3 * 2 * 1024);
  EXPECT_THROW(ThreadPool(ThreadTeam::kMostWorkers + 2), ParameterError);
}

// The parent's workers do not exist in the child, so neither ranges nor the end may wait for them.
TEST(ThreadPool, AForkedChildHasATeamOfItsOwn) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the sanitizer does not follow a child that starts threads";
#endif
  auto parents = std::make_unique<ThreadPool>(3);
  // All three are up before the fork: a sanitizer has locks that a thread holds as it starts, and
  // the child would wait for them for ever.
  std::atomic<int> up = 0;
  parents->parallel_for(3, 1, [&](std::int64_t, std::int64_t) {
    for (++up; up.load() < 3;) std::this_thread::yield();
  });
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a child that hangs ends
    std::atomic<int> total = 0;
    {
      ThreadPool pool(3);
      pool.parallel_for(100, 1, [&](std::int64_t begin, std::int64_t end) {
        total += static_cast<int>(end - begin);
      });
    }
    parents.reset();
    _exit(total.load() == 100 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

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
