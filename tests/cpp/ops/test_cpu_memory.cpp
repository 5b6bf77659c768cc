// The CPU backend's working memory at DeepSeek-R1's widths: what working_bytes() says is what
// reserve() takes, and ops take no more. A program of its own, as it counts what operator new
// gives.
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/allocation_meter.h"
#include "ops/cpu/cpu_backend.h"
#include "ops/under_test.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using testing::AllocationMeter;

constexpr std::int64_t kHidden = 7168;
constexpr std::int64_t kIntermediate = 18432;
constexpr std::int64_t kMoeIntermediate = 2048;
constexpr std::int64_t kRows = 60;
constexpr std::int64_t kDenseRows = 20;  // of those, through a layer's dense weights together
constexpr std::int64_t kTopK = 8;
constexpr std::int64_t kContext = 1100;  // three pieces of it in decode
constexpr MlaShape kMla = {128, 512, 128, 64, 128, 0.1f};
constexpr int kThreads = 3;
constexpr std::size_t kSmall = 64 * 1024;

/// A weight of zeros.
struct Zeros {
  Zeros(WeightFormat format, std::int64_t rows, std::int64_t cols)
      : data(format::data_bytes(format, rows, cols)),
        scales(format::scale_bytes(format, rows, cols)),
        view{format, rows, cols, data.data(), scales.data()} {}

  std::vector<std::byte> data, scales;
  format::WeightView view;
};

struct Activations {
  Activations(std::int64_t rows, std::int64_t cols)
      : values(static_cast<std::size_t>(rows * cols)), view{values.data(), rows, cols, cols} {}

  std::vector<float> values;
  ops::Matrix view;
};

class CpuMemory : public ::testing::TestWithParam<WeightFormat> {
 protected:
  Ops::Largest largest() const {
    Ops::Largest sizes;
    sizes.mla = kMla;
    sizes.rows = kRows;
    sizes.dense_rows = kDenseRows;
    sizes.step_width = kHidden;
    sizes.context = kContext;
    sizes.top_k = kTopK;
    sizes.hidden_size = kHidden;
    sizes.moe_intermediate_size = kMoeIntermediate;
    const auto format = static_cast<std::size_t>(GetParam());
    sizes.widest.all.at(format) = kIntermediate;
    sizes.widest.all.at(static_cast<std::size_t>(WeightFormat::kBF16)) = kIntermediate;
    sizes.widest.expert_down.at(format) = kMoeIntermediate;
    return sizes;
  }

  // Every op that packs or works in memory of its own; few rows of a weight, all of its columns.
  void run_step(Ops& ops, Phase phase) {
    const std::int64_t rows = phase == Phase::kPrefill ? kRows : 1;
    const std::int64_t dense_rows = phase == Phase::kPrefill ? kDenseRows : 1;
    for (const Zeros* wide : {&wide_, &wide_bf16_}) {
      ops.linear(wide->view, wide_x_.view.slice(0, dense_rows), few_.view.slice(0, dense_rows),
                 phase);
    }
    ops.linear(shared_.view, x_.view.slice(0, rows), few_.view.slice(0, rows), phase);
    ops.linear(router_.view, x_.view.slice(0, dense_rows), few_.view.slice(0, dense_rows), phase,
               Inputs::kF32);

    std::vector<ExpertTask> tasks;
    std::vector<std::vector<std::int32_t>> pairs(kTopK);
    for (std::int64_t k = 0; k < kTopK; ++k) {
      for (std::int64_t t = 0; t < rows; ++t) {
        pairs[static_cast<std::size_t>(k)].push_back(static_cast<std::int32_t>(t * kTopK + k));
      }
    }
    for (const auto& chosen : pairs) tasks.push_back({&expert_, chosen});
    const std::int64_t held = phase == Phase::kPrefill ? added_pairs(rows, kTopK) : rows * kTopK;
    const ops::Matrix x = x_.view.slice(0, rows);
    const ops::Matrix hidden = hidden_.view.slice(0, held);
    const ops::Matrix routed = routed_.view.slice(0, held);
    if (phase == Phase::kDecode) {
      ops.experts(tasks, kTopK, x, hidden, routed, phase);
    } else {
      for (const ExpertTask& task : tasks) {
        ops.add_experts({&task, 1}, weights_, kTopK, x, hidden, routed, few_.view.slice(0, rows),
                        phase);
      }
    }

    const std::vector<DevicePtr<std::byte>> blocks(kContext / kKvBlockTokens + 1, block_.data());
    const std::int64_t position = phase == Phase::kPrefill ? 0 : kContext - rows;
    const SequenceRows sequence{0, dense_rows, position, {blocks, 0, KvFormat::kBf16, 1.0f}};
    const ops::Matrix q = q_.view.slice(0, dense_rows);
    if (phase == Phase::kPrefill) {
      ops.prefill_attention(kMla, kv_b_.view, {&sequence, 1}, q, attended_.view);
      return;
    }
    ops.absorb_query(kMla, kv_b_.view, q, q_abs_.view);
    ops.latent_attention(kMla, {&sequence, 1}, q_abs_.view, q, latent_.view);
    ops.expand_value(kMla, kv_b_.view, latent_.view, attended_.view.slice(0, 1));
  }

 private:
  Zeros wide_{GetParam(), 16, kIntermediate}, wide_bf16_{WeightFormat::kBF16, 16, kIntermediate};
  Zeros router_{WeightFormat::kBF16, 16, kHidden}, shared_{GetParam(), 16, kHidden};
  Zeros gate_{GetParam(), kMoeIntermediate, kHidden}, down_{GetParam(), 16, kMoeIntermediate};
  ExpertView expert_{gate_.view, gate_.view, down_.view};
  Zeros kv_b_{WeightFormat::kBF16, 128 * 256, 512};
  std::vector<std::byte> block_ =
      std::vector<std::byte>(static_cast<std::size_t>(kKvBlockTokens * kMla.cache_width()) * 2);
  Activations wide_x_{kDenseRows, kIntermediate}, x_{kRows, kHidden}, few_{kRows, 16};
  Activations hidden_{kRows * kTopK, kMoeIntermediate}, routed_{kRows * kTopK, 16};
  std::vector<float> weights_ = std::vector<float>(static_cast<std::size_t>(kRows * kTopK));
  Activations q_{kDenseRows, 128 * 192}, attended_{kDenseRows, 128 * 128};
  Activations q_abs_{1, 128 * 512}, latent_{1, 128 * 512};
};

TEST_P(CpuMemory, IsPlannedAndTakenAtStart) {
  for (const Isa* isa : isas_under_test()) {
    CpuBackend backend(kThreads, *isa);
    const std::uint64_t planned = backend.working_bytes(largest());
    const AllocationMeter start;
    backend.reserve(largest());
    EXPECT_LE(start.peak_bytes(), planned + kSmall) << isa->name;
    EXPECT_GE(start.peak_bytes() + kSmall, planned) << isa->name;
    for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
      const AllocationMeter step;
      run_step(backend, phase);
      EXPECT_LT(step.peak_bytes(), kSmall) << isa->name << " phase " << static_cast<int>(phase);
    }
  }
}

TEST_P(CpuMemory, OfWideWeightsIsThatOfTheRowsThatPassThemTogether) {
  for (const Isa* isa : isas_under_test()) {
    const CpuBackend backend(kThreads, *isa);
    Ops::Largest sizes = largest();
    const std::uint64_t planned = backend.working_bytes(sizes);
    sizes.dense_rows = kRows;
    const std::uint64_t wider = static_cast<std::uint64_t>(kRows) * (kIntermediate - kHidden);
    EXPECT_GE(backend.working_bytes(sizes), planned + wider) << isa->name;  // a byte each at least
  }
}

// A caller who comes and goes leaves nothing behind, and needs nothing of its own.
TEST_P(CpuMemory, CallersShareIt) {
  CpuBackend backend(kThreads, select_isa());
  backend.reserve(largest());
  const AllocationMeter steps;
  for (int caller = 0; caller < 3; ++caller) {
    std::thread([&] { run_step(backend, Phase::kDecode); }).join();
  }
  EXPECT_LT(steps.peak_bytes(), kSmall);
}

INSTANTIATE_TEST_SUITE_P(Formats, CpuMemory,
                         ::testing::Values(WeightFormat::kFp8Block, WeightFormat::kNvfp4),
                         [](const auto& tested) {
                           return tested.param == WeightFormat::kNvfp4 ? "Nvfp4" : "Fp8";
                         });

}  // namespace
}  // namespace dsfp4::ops::cpu
