#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "engine/turns.h"

namespace dsfp4::engine {
namespace {

TEST(Turns, ComeInTheOrderOfAsking) {
  Turns turns;
  std::vector<int> order;  // changed by whose turn it is
  std::optional<Turns::Turn> first(std::in_place, turns, KeepGoing());
  std::array<std::atomic<bool>, 4> waits{};
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < waits.size(); ++i) {
    threads.emplace_back([&turns, &order, &waits, i] {
      const Turns::Turn turn(turns, [&waits, i] {
        waits.at(i) = true;
        waits.at(i).notify_one();
        return true;
      });
      order.push_back(static_cast<int>(i));
    });
    waits.at(i).wait(false);
  }
  first.reset();
  threads.clear();
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3}));
}

TEST(Turns, AWaiterMayLeaveAndTheOthersMoveUp) {
  for (const bool throws : {false, true}) {
    Turns turns;
    std::optional<Turns::Turn> first(std::in_place, turns, KeepGoing());
    std::atomic<bool> leave = false;
    std::atomic<bool> left = false;
    std::atomic<bool> waits = false;
    std::atomic<bool> had_turn = false;
    std::jthread leaver([&] {
      try {
        const Turns::Turn turn(turns, [&] {
          waits = true;
          waits.notify_one();
          if (leave && throws) throw Error("of the callback");
          return !leave;
        });
        left = !turn.came();
      } catch (const Error&) {
        left = throws;
      }
    });
    waits.wait(false);
    std::jthread next([&] {
      const Turns::Turn turn(turns, {});
      had_turn = turn.came();
    });
    leave = true;
    leaver.join();
    EXPECT_TRUE(left);
    EXPECT_FALSE(had_turn);
    first.reset();
    next.join();
    EXPECT_TRUE(had_turn);
  }
}

TEST(Turns, WhoHasOneIsRefusedAnotherAtOnce) {
  Turns turns;
  const Turns::Turn turn(turns, {});
  try {
    const Turns::Turn second(turns, {});
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("a callback called the model"), std::string::npos);
  }
}

TEST(Turns, AreGivenBackByAnError) {
  Turns turns;
  for (int i = 0; i < 2; ++i) {
    EXPECT_THROW(
        {
          const Turns::Turn turn(turns, {});
          throw Error("within");
        },
        Error);
  }
}

}  // namespace
}  // namespace dsfp4::engine
