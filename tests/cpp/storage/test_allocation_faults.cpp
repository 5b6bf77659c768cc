// The N-th allocation fails, for every N: an exception, never an abort, and nothing stays behind.
#include <atomic>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/slot_pool.h"
#include "storage/reader_fixture.h"

namespace {

std::atomic<std::int64_t> allocations_left = -1;  // below 0: all succeed
std::atomic<std::int64_t> allocations_out = 0;

bool refuse() {
  std::int64_t left = allocations_left.load();
  while (left > 0 && !allocations_left.compare_exchange_weak(left, left - 1)) {
  }
  return left == 0;
}

void* allocate(std::size_t bytes, std::size_t alignment) noexcept {
  if (refuse()) return nullptr;
  void* memory =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(bytes)
          : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory != nullptr) ++allocations_out;
  return memory;
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* memory = allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void release(void* memory) noexcept {
  if (memory == nullptr) return;
  --allocations_out;
  std::free(memory);
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, 1); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 1); }
void operator delete(void* memory) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { release(memory); }

namespace dsfp4::storage {
namespace {

class AllocationFaults : public ReaderTest {};

// Runs `body` with every allocation refused in turn until it passes; returns how many there were.
template <typename Body>
std::int64_t refuse_each(const Body& body) {
  for (std::int64_t n = 0;; ++n) {
    const std::int64_t before = allocations_out.load();
    const std::ptrdiff_t descriptors = ReaderFiles::open_descriptors();
    bool passed = false;
    allocations_left = n;
    try {
      body();
      passed = allocations_left.load() > 0;  // none was refused
    } catch (const std::bad_alloc&) {
    } catch (const Error&) {
    }
    allocations_left = -1;
    EXPECT_EQ(allocations_out.load(), before) << "allocation " << n;
    EXPECT_EQ(ReaderFiles::open_descriptors(), descriptors) << "allocation " << n;
    if (passed || testing::Test::HasFailure()) return n;
  }
}

TEST_P(AllocationFaults, OpeningSubmittingAndReading) {
  const std::vector<std::filesystem::path> paths = {files_.write("a", 50'000, 1)};
  std::vector<std::byte> buffer(50'000);
  const std::vector<Extent> extents = {{0, 3, 40'000, buffer.data()}};
  ReaderOptions few;
  few.kind = GetParam();
  few.depth = 3;
  few.piece_bytes = 4096;
  const std::int64_t count = refuse_each([&] {
    const auto reader = make_reader(paths, few);
    reader->read(extents, nullptr);
  });
  EXPECT_GT(count, 10);
  EXPECT_TRUE(files_.same(buffer.data(), 40'000, 3, 1));
}

// What a failing read allocates is words; without memory for them it still fails as it should.
TEST_P(AllocationFaults, Failing) {
  const std::vector<std::filesystem::path> paths = {files_.write("a", 50'000, 1)};
  std::vector<std::byte> buffer(90'000);
  const std::vector<Extent> extents = {{0, 3, 80'000, buffer.data()}};
  ReaderOptions few;
  few.kind = GetParam();
  few.depth = 2;
  few.piece_bytes = 4096;
  refuse_each([&] {
    const auto reader = make_reader(paths, few);
    try {
      reader->read(extents, nullptr);
      ADD_FAILURE() << "the file is too short";
    } catch (const IoError&) {
    }
  });
}

TEST(MemoryAllocationFaults, Pools) {
  const std::int64_t count = refuse_each([] {
    memory::SlotPool pool(10, 5000, "the test's slots");
    pool.release(pool.acquire());
    pool.resize(std::vector<bool>(20));
  });
  EXPECT_GE(count, 2);
}

INSTANTIATE_TEST_SUITE_P(Kinds, AllocationFaults,
                         testing::Values(ReaderKind::kUring, ReaderKind::kPread), kind_name);

}  // namespace
}  // namespace dsfp4::storage
