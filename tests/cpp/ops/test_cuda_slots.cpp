// Experts whose slots on the device are filled again between steps, from the upload queue.
#include <algorithm>
#include <cstring>
#include <ostream>
#include <vector>

#include <gtest/gtest.h>

#include "ops/cuda_fixture.h"
#include "ops/raw.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;

constexpr std::int64_t kHidden = 512;
constexpr std::int64_t kIntermediate = 256;
// Before a slot's own bytes in the upload queue: about 40 ms at PCIe 5's rate, where the experts
// of a step take well under 1.
constexpr std::size_t kBallast = std::size_t{64} << 20;
constexpr int kBallastCopies = 32;

struct SlotCase {
  WeightFormat format;
  std::int64_t tokens;  // 1: the kernels of few tokens; 70: those of many
};

std::ostream& operator<<(std::ostream& out, const SlotCase& c) {
  return out << format::weight_format_name(c.format) << ", " << c.tokens << " tokens";
}

class CudaSlots : public Cuda, public ::testing::WithParamInterface<SlotCase> {
 protected:
  void SetUp() override {
    Cuda::SetUp();
    if (backend_ == nullptr) return;
    device_ = &backend_->device();
    for (std::uint32_t i = 0; i < 2; ++i) {
      experts_.push_back({random_weight(format_, kIntermediate, kHidden, 10 * i + 1),
                          random_weight(format_, kIntermediate, kHidden, 10 * i + 2),
                          random_weight(format_, kHidden, kIntermediate, 10 * i + 3)});
    }
    for (const auto& m : {experts_[0].gate, experts_[0].up, experts_[0].down}) {
      slot_bytes_ += memory::Arena::padded(m.data.size()) + memory::Arena::padded(m.scales.size());
    }
    pinned_ = device_->staging().allocate(pinned_bytes());
    ASSERT_NE(pinned_, nullptr);
    for (std::size_t i = 0; i < 2; ++i) {
      std::byte* to = pinned_ + i * slot_bytes_;
      const ExpertView placed = view_in(to, experts_[i]);
      const auto fill = [](const WeightView& view, const format::EncodedMatrix& from) {
        std::ranges::copy(from.data, const_cast<std::byte*>(unwrap(view.data)));
        std::ranges::copy(from.scales, const_cast<std::byte*>(unwrap(view.scales)));
      };
      fill(placed.gate_proj, experts_[i].gate);
      fill(placed.up_proj, experts_[i].up);
      fill(placed.down_proj, experts_[i].down);
    }
    std::memset(pinned_ + 2 * slot_bytes_, 0, kBallast);
    slot_ = arena_->take(slot_bytes_);
    ballast_ = arena_->take(kBallast);
    for (std::int64_t t = 0; t < tokens_; ++t) pairs_.push_back(static_cast<std::int32_t>(t));
    x_ = on_device(OwnedMatrix(tokens_, kHidden, 43));
    hidden_ = on_device(OwnedMatrix(tokens_, kIntermediate));
  }

  void TearDown() override {
    if (pinned_ == nullptr) return;
    device_->synchronize();
    device_->staging().release(pinned_, pinned_bytes());
  }

  struct Encoded {
    format::EncodedMatrix gate, up, down;
  };
  // The matrices one after the other from `base` on, as an arena would place them.
  static ExpertView view_in(DevicePtr<std::byte> base, const Encoded& from) {
    const auto take = [&](std::size_t bytes) {
      const DevicePtr<std::byte> taken = base;
      base = base + static_cast<std::ptrdiff_t>(memory::Arena::padded(bytes));
      return taken;
    };
    const auto place = [&](const format::EncodedMatrix& matrix) {
      WeightView view = matrix.view();
      view.data = take(matrix.data.size());
      view.scales = take(matrix.scales.size());
      return view;
    };
    return {place(from.gate), place(from.up), place(from.down)};
  }

  Matrix new_out() { return on_device(OwnedMatrix(tokens_, kHidden)); }
  void run(DevicePtr<std::byte> slot, std::size_t which, Matrix out) {
    const ExpertView expert = view_in(slot, experts_[which]);
    backend_->experts(std::vector<ExpertTask>{{&expert, pairs_}}, 1, x_, hidden_, out,
                      Phase::kDecode);
  }
  // NaN where a format's kernels know it, else the largest numbers.
  void poison() {
    const std::vector<std::byte> all_ones(slot_bytes_, std::byte{0xff});
    device_->upload(all_ones.data(), slot_, slot_bytes_);
  }
  void upload(const void* from, DevicePtr<std::byte> to, std::size_t bytes) {
    device_->copy_in(Queue::kUpload, from, to, bytes);
  }
  std::size_t pinned_bytes() const { return 2 * slot_bytes_ + kBallast; }

  // An expert computed from a poisoned slot whose upload waits behind others.
  std::vector<float> of_a_delayed_upload(bool with_event) {
    const Matrix out = new_out();
    poison();
    run(slot_, 0, out);  // so that all kernels are loaded
    EXPECT_TRUE(is_wrong(on_host(out)));
    const Event filled = device_->make_event();
    for (int i = 0; i < kBallastCopies; ++i) {
      upload(pinned_ + 2 * slot_bytes_, ballast_, kBallast);
    }
    upload(pinned_, slot_, slot_bytes_);
    device_->record(Queue::kUpload, filled);
    if (with_event) device_->wait(Queue::kCompute, filled);
    run(slot_, 0, out);
    return on_host(out);
  }

  std::vector<float> expected(std::size_t which) {
    const Encoded& e = experts_[which];
    const ExpertView host{e.gate.view(), e.up.view(), e.down.view()};
    OwnedMatrix x(tokens_, kHidden, 43);
    OwnedMatrix hidden(tokens_, kIntermediate);
    OwnedMatrix out(tokens_, kHidden);
    reference_->experts(std::vector<ExpertTask>{{&host, pairs_}}, 1, x.view(), hidden.view(),
                        out.view(), Phase::kDecode);
    return out.values;
  }

  // For results of expert 0.
  bool is_wrong(const std::vector<float>& got) {
    return !(relative_error(got, expected(0)) < 0.5);  // NaN, too
  }

  const WeightFormat format_ = GetParam().format;
  const std::int64_t tokens_ = GetParam().tokens;
  Device* device_ = nullptr;
  std::vector<Encoded> experts_;
  std::size_t slot_bytes_ = 0;
  std::byte* pinned_ = nullptr;  // both experts, then the ballast
  DevicePtr<std::byte> slot_, ballast_;
  std::vector<std::int32_t> pairs_;
  Matrix x_, hidden_;
};

TEST_P(CudaSlots, ADelayedUploadIsWaitedFor) {
  EXPECT_LT(relative_error(of_a_delayed_upload(true), expected(0)), kTolerance);
}

// The other side of that: it is the event that makes it right. Rests on the upload being slower
// than the experts, so it is not run by itself.
TEST_P(CudaSlots, DISABLED_WithoutTheEventTheOldBytesAreRead) {
  EXPECT_TRUE(is_wrong(of_a_delayed_upload(false)));
}

// The same addresses hold one expert, then the other, in turns, with nothing but events between.
TEST_P(CudaSlots, ARefilledSlotIsReadAnew) {
  constexpr std::size_t kRounds = 40;
  std::vector<std::vector<float>> alone;
  for (std::size_t which = 0; which < 2; ++which) {
    const DevicePtr<std::byte> place = arena_->take(slot_bytes_);
    device_->upload(pinned_ + which * slot_bytes_, place, slot_bytes_);
    const Matrix out = new_out();
    run(place, which, out);
    alone.push_back(on_host(out));
    EXPECT_LT(relative_error(alone.back(), expected(which)), kTolerance);
  }
  poison();
  std::vector<Matrix> outs;
  outs.reserve(kRounds);
  for (std::size_t i = 0; i < kRounds; ++i) outs.push_back(new_out());
  const Event filled = device_->make_event();
  const Event read = device_->make_event();
  device_->record(Queue::kCompute, read);  // the poison is there
  for (std::size_t i = 0; i < kRounds; ++i) {
    device_->wait(Queue::kUpload, read);
    upload(pinned_ + i % 2 * slot_bytes_, slot_, slot_bytes_);
    device_->record(Queue::kUpload, filled);
    device_->wait(Queue::kCompute, filled);
    run(slot_, i % 2, outs[i]);
    device_->record(Queue::kCompute, read);
  }
  for (std::size_t i = 0; i < kRounds; ++i) EXPECT_EQ(on_host(outs[i]), alone[i % 2]) << i;
}

INSTANTIATE_TEST_SUITE_P(
    All, CudaSlots,
    ::testing::Values(SlotCase{WeightFormat::kNvfp4, 1}, SlotCase{WeightFormat::kMxfp4, 1},
                      SlotCase{WeightFormat::kFp8Block, 1}, SlotCase{WeightFormat::kBF16, 1},
                      SlotCase{WeightFormat::kF32, 1}, SlotCase{WeightFormat::kNvfp4, 70},
                      SlotCase{WeightFormat::kMxfp4, 70}, SlotCase{WeightFormat::kFp8Block, 70},
                      SlotCase{WeightFormat::kBF16, 70}));

}  // namespace
}  // namespace dsfp4::ops
