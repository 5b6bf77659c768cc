// Three MoE layers of eight tiny experts in a file that a FakeReader reads, for the tests of what
// runs and predicts them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "memory/arena.h"
#include "memory/slot_pool.h"
#include "ops/ops.h"
#include "ops/random_weight.h"
#include "residency/expert_store.h"
#include "residency/fake_reader.h"
#include "residency/prefetcher.h"

namespace dsfp4::residency {

class TinyExpertsTest : public testing::Test {
 protected:
  static constexpr std::int64_t kLayers = 3;
  static constexpr std::int64_t kFirstLayer = 2;  // the model's number of the first of them
  static constexpr std::int64_t kExperts = 8;
  static constexpr std::int64_t kTopK = 2;
  static constexpr std::int64_t kHidden = 32;
  static constexpr std::int64_t kIntermediate = 16;

  TinyExpertsTest() : ops_(ops::make_reference_ops(1)), arena_(1 << 20, "the scratch") {
    router_.experts = kExperts;
    router_.top_k = kTopK;
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      gates_.push_back(weight(kExperts, kHidden));
    }
    for (const format::EncodedMatrix& gate : gates_) routers_.push_back({gate.view(), {}, {}});
    for (std::int64_t key = 0; key < kLayers * kExperts; ++key) {
      for (int m = 0; m < 2; ++m) matrices_.push_back(weight(kIntermediate, kHidden));
      matrices_.push_back(weight(kHidden, kIntermediate));
    }
    for (std::size_t m = 0; m < matrices_.size(); m += 3) {
      views_.push_back({matrices_[m].view(), matrices_[m + 1].view(), matrices_[m + 2].view()});
    }
    reader_.contents.resize(kFirstByte);
    for (const format::EncodedMatrix& matrix : matrices_) {
      reader_.contents.insert(reader_.contents.end(), matrix.data.begin(), matrix.data.end());
    }
  }
  ~TinyExpertsTest() override {
    store_.reset();
    for (std::size_t i = 0; i < reader_.reads.size(); ++i) {
      if (!reader_.reads[i].over) reader_.complete(i);
    }
  }

  void make_store(std::size_t slots, std::size_t cache_slots,
                  memory::MemorySource& memory = memory::host_memory()) {
    ExpertStore::Options options;
    options.memory = &memory;
    options.layers = kLayers;
    options.first_layer = kFirstLayer;
    options.experts = kExperts;
    options.slots = slots;
    options.cache_slots = cache_slots;
    options.check = [this](std::span<const ExpertKey> keys, std::span<const ops::HostExpertView>) {
      if (on_compute_) on_compute_(keys);
    };
    store_ = std::make_unique<ExpertStore>(options, images(), reader_,
                                           make_policy("lru", kLayers, kExperts));
  }
  /// Makes it a cached expert.
  void bring(ExpertKey key) {
    ASSERT_EQ(store_->fetch(key, true), ExpertStore::Found::kReading);
    reader_.complete(reader_.reads.size() - 1);
    store_->unpin(key);
  }
  static ExpertKey key_of(const FakeReader::Read& read) {
    return static_cast<ExpertKey>((read.request.extents.at(0).offset - kFirstByte) / kBytes);
  }
  /// Of the reads from number `first` on with that priority, in the order of submission.
  std::vector<ExpertKey> submitted(storage::Priority priority, std::size_t first = 0) const {
    std::vector<ExpertKey> keys;
    for (std::size_t i = first; i < reader_.reads.size(); ++i) {
      if (reader_.reads[i].request.priority == priority) keys.push_back(key_of(reader_.reads[i]));
    }
    return keys;
  }
  /// A router's preference for one row, best first.
  std::vector<std::int32_t> preferred(std::int64_t moe_layer, ops::ConstMatrix x) {
    ops::testing::OwnedMatrix logits(x.rows, kExperts);
    ops_->linear(routers_[static_cast<std::size_t>(moe_layer)].gate, x, logits.view(),
                 ops::Phase::kDecode, ops::Inputs::kF32);
    std::vector<std::int32_t> experts(static_cast<std::size_t>(x.rows * kTopK)), used(experts);
    std::vector<float> weights(experts.size());
    ops_->route(router_, logits.view(), {}, {}, {experts, used, weights, {}});
    return experts;
  }

  std::function<void(std::span<const ExpertKey>)> on_compute_;  // before experts are computed
  std::unique_ptr<ops::Ops> ops_;
  memory::Arena arena_;
  FakeReader reader_;
  ops::RouterSpec router_;
  std::vector<format::EncodedMatrix> gates_;  // of seeds 1, 2, 3
  std::vector<RouterView> routers_;
  std::vector<ops::ExpertView> views_;  // by key
  std::unique_ptr<ExpertStore> store_;

 private:
  static constexpr std::uint64_t kFirstByte = 100;
  static constexpr std::uint64_t kMatrixBytes = kHidden * kIntermediate * sizeof(float);
  static constexpr std::uint64_t kBytes = 3 * kMatrixBytes;

  format::EncodedMatrix weight(std::int64_t rows, std::int64_t cols) {
    return ops::testing::random_weight(format::WeightFormat::kF32, rows, cols, seed_++);
  }
  std::vector<ExpertImage> images() const {
    std::vector<ExpertImage> all;
    for (std::size_t key = 0; key < views_.size(); ++key) {
      const std::uint64_t offset = kFirstByte + key * kBytes;
      ExpertImage image;
      image.files.parts = {{0, offset, kBytes, offset % storage::kBlockBytes}};
      image.files.slot_bytes = memory::PhasedLayout::most(kBytes);
      image.view = &views_[key];
      for (std::size_t m = 0; m < image.places.size(); ++m) {
        image.places[m].data = offset % storage::kBlockBytes + m * kMatrixBytes;
      }
      all.push_back(image);
    }
    return all;
  }

  std::uint32_t seed_ = 1;
  std::vector<format::EncodedMatrix> matrices_;
};

}  // namespace dsfp4::residency
