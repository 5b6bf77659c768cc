// Several threads at one store, over a real file and both readers.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "residency/expert_store.h"

namespace dsfp4::residency {
namespace {

constexpr std::int64_t kLayers = 3;
constexpr std::int64_t kExperts = 16;
constexpr std::uint64_t kBytes = 9000;  // neither a block's multiple nor aligned
constexpr std::chrono::seconds kPatience{60};
const ops::ExpertView kView;

char content(std::uint64_t offset) { return static_cast<char>(offset * 2654435761U >> 13); }

class ExpertStoreThreads : public testing::TestWithParam<storage::ReaderKind> {
 protected:
  ExpertStoreThreads()
      : path_(std::filesystem::path(testing::TempDir()) /
              ("store-threads." + std::to_string(::getpid()))) {
    std::string bytes(kLayers * kExperts * kBytes, '\0');
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = content(i);
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  ~ExpertStoreThreads() override { std::filesystem::remove(path_); }

  std::filesystem::path path_;
};

std::vector<ExpertImage> images() {
  std::vector<ExpertImage> all;
  for (std::uint64_t key = 0; key < kLayers * kExperts; ++key) {
    ExpertImage image;
    const std::uint64_t offset = key * kBytes;
    image.files.parts.push_back({0, offset, kBytes, offset % storage::kBlockBytes});
    image.files.slot_bytes = memory::PhasedLayout::most(kBytes);
    image.view = &kView;
    for (MatrixPlace& place : image.places) place.data = offset % storage::kBlockBytes;
    all.push_back(image);
  }
  return all;
}

bool is_right(const ExpertStore& store, ExpertKey key) {
  const std::byte* data = store.view(key).gate_proj.data;
  for (std::uint64_t b = 0; b < kBytes; b += 97) {
    if (data[b] != static_cast<std::byte>(content(key * kBytes + b))) return false;
  }
  return true;
}

TEST_P(ExpertStoreThreads, EveryoneGetsWhatTheyAskFor) {
  storage::ReaderOptions options;
  options.kind = GetParam();
  const auto reader = storage::make_reader({path_}, options);
  ExpertStore store({kLayers, 0, kExperts, 20, 10, {}, nullptr}, images(), *reader,
                    make_policy("default", kLayers, kExperts));
  std::atomic<int> wrong = 0;
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    const std::vector<float> scores(kExperts, 0.5f);
    for (int i = 0; i < 300; ++i) {
      const auto layer = static_cast<std::int64_t>(random() % kLayers);
      const auto expert = static_cast<std::int32_t>(random() % kExperts);
      const auto key = static_cast<ExpertKey>(layer * kExperts + expert);
      auto found = store.pin(key, true);
      // Another thread may fetch it in between: then the slot is its own, and ours waits with it.
      if (found == ExpertStore::Found::kAbsent) found = store.fetch(key, random() % 4 != 0);
      if (found == ExpertStore::Found::kNoRoom) continue;
      if (store.ready_of(std::span(&key, 1), kPatience).size() != 1 || !is_right(store, key))
        ++wrong;
      store.note_use(layer, std::span(&expert, 1), scores);
      store.unpin(key);
      store.trim();
      if (random() % 3 == 0)
        store.prefetch(static_cast<ExpertKey>(random() % (kLayers * kExperts)));
      if (random() % 5 == 0) store.drop_speculation(layer);
    }
  };
  {
    std::vector<std::jthread> team;
    for (unsigned seed = 0; seed < 4; ++seed) team.emplace_back(work, seed);
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(store.is_consistent());
  const StoreStats stats = store.stats();
  EXPECT_GT(stats.hits, 0u);
  EXPECT_GT(stats.misses, 0u);
}

INSTANTIATE_TEST_SUITE_P(Readers, ExpertStoreThreads,
                         testing::Values(storage::ReaderKind::kAutomatic,
                                         storage::ReaderKind::kPread));

}  // namespace
}  // namespace dsfp4::residency
