#include <limits>
#include <stdexcept>
#include <utility>

#include <gtest/gtest.h>

#include "memory/account.h"

namespace dsfp4::memory {
namespace {

Account::Lease lease(Account& account, const MachineMemory& measured, std::uint64_t bytes) {
  return account.reserve(measured, [&](const MachineMemory&, std::uint64_t) { return bytes; });
}

TEST(Account, WhatIsLeasedCountsBeforeItIsWritten) {
  Account account;
  EXPECT_EQ(account.committed({1000, 900, 50}).process, 50u);
  const Account::Lease first = lease(account, {1000, 900, 50}, 300);
  // Nothing is written, a part, and all with 20 that nobody leased.
  for (const MachineMemory& measured :
       {MachineMemory{1000, 900, 50}, MachineMemory{1000, 800, 150}}) {
    EXPECT_EQ(account.committed(measured).process, 350u);
    EXPECT_EQ(account.committed(measured).available, 600u);
  }
  EXPECT_EQ(account.committed({1000, 580, 370}).process, 370u);
  EXPECT_EQ(account.committed({1000, 580, 370}).available, 580u);
}

TEST(Account, TheNextOneGetsWhatIsLeftAndAfterwardsAllIsThereAgain) {
  Account account;
  const MachineMemory measured{1000, 900, 50};
  {
    const Account::Lease first = lease(account, measured, 300);
    const Account::Lease second =
        account.reserve(measured, [](const MachineMemory& committed, std::uint64_t leased) {
          EXPECT_EQ(committed.process, 350u);
          EXPECT_EQ(leased, 300u);
          return 500;
        });
    EXPECT_EQ(account.committed(measured).available, 100u);
  }
  EXPECT_EQ(account.committed(measured).available, 900u);
  // Memory that the process took meanwhile is not held against it.
  EXPECT_EQ(account.committed({1000, 920, 30}).process, 30u);
}

TEST(Account, ALeaseMovesAndChangesItsSize) {
  Account account;
  const MachineMemory measured{1000, 900, 50};
  Account::Lease kept;
  {
    Account::Lease first = lease(account, measured, 300);
    const Account::Lease other = lease(account, measured, 40);
    first.resize([](std::uint64_t others) {
      EXPECT_EQ(others, 40u);
      return 200;
    });
    kept = std::move(first);
  }
  EXPECT_EQ(kept.bytes(), 200u);
  EXPECT_EQ(account.committed(measured).process, 250u);
  kept = Account::Lease();
  EXPECT_EQ(account.committed(measured).process, 50u);
}

TEST(Account, WhoeverIsRefusedLeavesNothingLeased) {
  Account account;
  const MachineMemory measured{1000, 900, 50};
  Account::Lease first = lease(account, measured, 300);
  const auto refuse = [](const MachineMemory&, std::uint64_t) -> std::uint64_t {
    throw std::runtime_error("no");
  };
  EXPECT_THROW(account.reserve(measured, refuse), std::runtime_error);
  EXPECT_THROW(first.resize([](std::uint64_t) -> std::uint64_t { throw std::runtime_error("no"); }),
               std::runtime_error);
  EXPECT_EQ(first.bytes(), 300u);
  EXPECT_EQ(account.committed(measured).process, 350u);
}

TEST(Account, UnknownMemoryStaysUnknown) {
  constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();
  Account account;
  const Account::Lease first = lease(account, {kUnknown, kUnknown, 50}, 300);
  EXPECT_EQ(account.committed({kUnknown, kUnknown, 50}).available, kUnknown);
}

}  // namespace
}  // namespace dsfp4::memory
