// Experts in staging memory, and a DeviceExperts on the emulated device, for its tests.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "emulated/emulated_ops.h"
#include "emulated/room.h"
#include "memory/arena.h"
#include "ops/random_weight.h"
#include "residency/device_experts.h"

namespace dsfp4::residency {

class DeviceExpertsTest : public testing::Test {
 protected:
  using Floats = std::vector<float>;
  static constexpr std::int64_t kHidden = 64;
  static constexpr std::int64_t kIntermediate = 32;
  static constexpr std::size_t kExperts = 16;
  static constexpr std::int64_t kResults = 16;

  DeviceExpertsTest() {
    use_format(format::WeightFormat::kNvfp4);
    device.synchronize();  // x is there, whatever fails
  }

  // So that a test which fails while a queue is held ends.
  void TearDown() override {
    device.run_empty();
    experts.reset();
  }

  // Experts of that format in staging memory, and what each makes of x.
  void use_format(format::WeightFormat stored) {
    source.clear();
    expected.clear();
    const auto reference = ops::make_reference_ops(1);
    ops::testing::OwnedMatrix in(1, kHidden, 7);
    ops::testing::OwnedMatrix between(1, kIntermediate);
    for (std::uint32_t key = 0; key < kExperts; ++key) {
      const auto weight = [&](std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
        const format::EncodedMatrix made =
            stored == format::WeightFormat::kNvfp4
                ? format::encode_nvfp4(ops::testing::random_values(rows * cols, seed), rows, cols,
                                       format::nvfp4_global_scale(2.0f + static_cast<float>(seed)))
                : ops::testing::random_weight(stored, rows, cols, seed);
        return format::WeightView{
            stored, rows, cols, staged(made.data), staged(made.scales), made.global_scale};
      };
      source.push_back({weight(kIntermediate, kHidden, 3 * key),
                        weight(kIntermediate, kHidden, 3 * key + 1),
                        weight(kHidden, kIntermediate, 3 * key + 2)});
      const ops::ExpertView view = source.back();
      ops::testing::OwnedMatrix out(1, kHidden);
      reference->experts(std::array{ops::ExpertTask{&view, kPair}}, 1, in.view(), between.view(),
                         out.view(), ops::Phase::kDecode);
      expected.push_back(out.values);
    }
  }
  const std::byte* staged(const std::vector<std::byte>& bytes) {
    if (bytes.empty()) return nullptr;
    std::byte* memory = memory::on_host(device.staging(), staging.take(bytes.size()));
    std::ranges::copy(bytes, memory);
    return memory;
  }

  // Room for such a matrix in staging memory.
  format::WeightViewOf<std::byte*> blank(const format::WeightView& matrix) {
    const auto take = [&](std::size_t bytes) {
      return bytes == 0 ? nullptr : memory::on_host(device.staging(), staging.take(bytes));
    };
    return {matrix.format,
            matrix.rows,
            matrix.cols,
            take(data_of(matrix).size()),
            take(scales_of(matrix).size()),
            matrix.global_scale};
  }
  static std::vector<std::byte> data_of(const format::WeightView& matrix) {
    return {matrix.data, matrix.data + format::data_bytes(matrix.format, matrix.rows, matrix.cols)};
  }
  static std::vector<std::byte> scales_of(const format::WeightView& matrix) {
    return {matrix.scales,
            matrix.scales + format::scale_bytes(matrix.format, matrix.rows, matrix.cols)};
  }

  void make(std::size_t slots, std::size_t cache_slots) { make_on(device, slots, cache_slots); }
  void make_on(ops::Device& on, std::size_t slots, std::size_t cache_slots,
               DeviceTrace* trace = nullptr) {
    experts.emplace(
        on, DeviceExperts::slot_bytes(source[0]), slots, cache_slots, kExperts,
        [this](std::span<const ExpertKey> keys, std::span<float> values) {
          std::ranges::transform(keys, values.begin(),
                                 [this](ExpertKey key) { return worth[key]; });
        },
        trace);
  }
  const ops::ExpertView* bring(ExpertKey key, bool keep) {
    experts->revalue();
    const ops::ExpertView* view = experts->bring(key, source[key], keep);
    EXPECT_TRUE(experts->is_consistent());
    return view;
  }
  void release(ExpertKey key) {
    experts->release(key);
    EXPECT_TRUE(experts->is_consistent());
  }
  void pass(ExpertKey key, bool keep) {
    ASSERT_NE(bring(key, keep), nullptr);
    release(key);
  }
  // Queues the expert's op, whose result is results[place].
  void compute(const ops::ExpertView& view, std::int64_t place) {
    compute_ops.experts(std::array{ops::ExpertTask{&view, kPair}}, 1, x, hidden,
                        results.slice(place, 1), ops::Phase::kDecode);
  }
  Floats result(std::int64_t place) { return room.get(results.slice(place, 1)); }
  // Long enough for a queue that does not wait to go on.
  template <typename Condition>
  static bool stays(Condition condition) {
    for (int i = 0; i < 30; ++i) {
      if (!condition()) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

  static constexpr std::array<std::int32_t, 1> kPair{0};

  ops::testing::EmulatedOps compute_ops;
  ops::testing::EmulatedDevice& device = *compute_ops.emulated();
  ops::testing::Room room{device};
  memory::Arena staging{std::size_t{4} << 20, "the test's experts", device.staging()};
  const ops::Matrix x = room.matrix(1, kHidden, 7);
  const ops::Matrix hidden = room.matrix(1, kIntermediate);
  const ops::Matrix results = room.matrix(kResults, kHidden);
  std::vector<ops::HostExpertView> source;  // by key
  std::vector<Floats> expected;
  std::array<float, kExperts> worth{};
  std::optional<DeviceExperts> experts;
};

}  // namespace dsfp4::residency
