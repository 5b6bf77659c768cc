// Weights that are converted while they are loaded.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/warnings.h"
#include "checkpoint/config.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "emulated/emulated_device.h"
#include "engine/loader.h"
#include "engine/quantization.h"
#include "engine/three_tiers_fixture.h"
#include "engine/weight_convert.h"
#include "format/block.h"
#include "memory/arena.h"
#include "ops/measure/random_data.h"

namespace dsfp4::engine {
namespace {

using dsfp4::testing::TinyKind;
using format::EncodedMatrix;
using format::WeightFormat;
using residency::DenseFormats;
using residency::DenseRole;

// The matrix that convert() writes to the emulated device.
EncodedMatrix converted(const EncodedMatrix& from, WeightFormat to, int threads,
                        const Poll& poll = {}) {
  ops::testing::EmulatedDevice device;
  EncodedMatrix out;
  out.format = to;
  out.rows = from.rows;
  out.cols = from.cols;
  out.data.resize(format::data_bytes(to, from.rows, from.cols));
  out.scales.resize(format::scale_bytes(to, from.rows, from.cols));
  memory::Arena arena(memory::Arena::padded(out.data.size()) + out.scales.size(), "a test",
                      device.memory());
  Placement::WeightPlace place = {to, from.rows, from.cols, arena.take(out.data.size()),
                                  arena.take(out.scales.size())};
  ThreadPool pool(threads);
  out.global_scale = convert(from.view(), place, device, pool, poll);
  device.download(place.data, out.data.data(), out.data.size());
  device.download(place.scales, out.scales.data(), out.scales.size());
  return out;
}

TEST(WeightConvert, IsWhatTheWholeMatrixEncodesTo) {
  ThreadPool pool(1);
  for (const WeightFormat from : {WeightFormat::kBF16, WeightFormat::kFp8Block}) {
    for (const std::int64_t rows : {1, 128, 300, 5 * 128 + 7}) {  // bands, and a part of one
      const EncodedMatrix source = ops::measure::random_weight(pool, from, rows, 176, 5);
      const std::vector<float> values = format::decode(source.view());
      float largest = 0.0f;
      for (const float value : values) largest = std::max(largest, std::abs(value));
      const EncodedMatrix nvfp4 =
          format::encode_nvfp4(values, rows, 176, format::nvfp4_global_scale(largest));
      const EncodedMatrix fp8 = format::encode_fp8_block(values, rows, 176);
      for (const int threads : {1, 3}) {
        for (const EncodedMatrix* right : {&nvfp4, &fp8}) {
          const EncodedMatrix got = converted(source, right->format, threads);
          EXPECT_EQ(got.data, right->data) << rows;
          EXPECT_EQ(got.scales, right->scales) << rows;
          EXPECT_EQ(got.global_scale, right->global_scale) << rows;
        }
      }
    }
  }
}

TEST(WeightConvert, CanBeLeftBetweenBands) {
  ThreadPool pool(1);
  const EncodedMatrix source = ops::measure::random_weight(pool, WeightFormat::kBF16, 640, 32, 1);
  int asked = 0;
  const auto leave_at = [&](int at) {
    asked = 0;
    return [&asked, at] {
      if (++asked == at) throw CancelledError();
    };
  };
  for (const int at : {1, 4, 10}) {  // five bands for the scale, five for the values
    EXPECT_THROW(converted(source, WeightFormat::kNvfp4, 1, leave_at(at)), CancelledError);
  }
  converted(source, WeightFormat::kNvfp4, 1, leave_at(11));
  EXPECT_EQ(asked, 10);
}

TEST(WeightConvert, TheScaleIsThatOfTheLargestMagnitude) {
  std::vector<float> values(2 * 32, 0.25f);
  values[40] = -8.0f;
  EncodedMatrix source{WeightFormat::kF32, 2, 32};
  source.data.resize(values.size() * sizeof(float));
  std::memcpy(source.data.data(), values.data(), source.data.size());
  EXPECT_EQ(converted(source, WeightFormat::kNvfp4, 1).global_scale,
            format::nvfp4_global_scale(8.0f));
}

TEST(WeightConvert, MemoryForItIsOfABandForEachThread) {
  for (const std::int64_t cols : {16, 7168}) {
    const auto values = static_cast<std::uint64_t>(format::kFp8Tile * cols);
    EXPECT_GE(conversion_bytes(1, cols),
              values * sizeof(float) +
                  format::stored_bytes(WeightFormat::kFp8Block, format::kFp8Tile, cols));
    EXPECT_EQ(conversion_bytes(3, cols), 3 * conversion_bytes(1, cols));
  }
}

DenseFormats formats_of(DenseRole role, WeightFormat format) {
  DenseFormats formats;
  formats.of(role) = format;
  return formats;
}

// Loaded into RAM without a plan.
class ConvertedWeights : public ::testing::Test {
 protected:
  LoadedWeights load(TinyKind kind, std::vector<DenseFormats> formats) {
    const dsfp4::testing::ScratchFolder folder;
    dsfp4::testing::make_tiny_checkpoint(kind).write(folder.path());
    LoadWeightsOptions options;
    options.threads = 1;
    options.formats = std::move(formats);
    return load_weights(folder.path(), checkpoint::read_config(folder.path()), ops::host_device(),
                        options);
  }
  static format::WeightView on_host(const ops::WeightView& view) {
    ops::Device& host = ops::host_device();
    return {view.format,
            view.rows,
            view.cols,
            host.on_host(view.data),
            view.scales ? host.on_host(view.scales) : nullptr,
            view.global_scale};
  }
};

TEST_F(ConvertedWeights, AreTheEncodedPublishedOnes) {
  const LoadedWeights published = load(TinyKind::kBf16, {DenseFormats()});
  const LoadedWeights loaded =
      load(TinyKind::kBf16, {formats_of(DenseRole::kOProj, WeightFormat::kNvfp4)});
  const format::WeightView from = on_host(published.weights.layers[1].self_attn.o_proj);
  const format::WeightView got = on_host(loaded.weights.layers[1].self_attn.o_proj);
  ASSERT_EQ(from.format, WeightFormat::kBF16);
  ASSERT_EQ(got.format, WeightFormat::kNvfp4);
  const std::vector<float> values = format::decode(from);
  float largest = 0.0f;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  const EncodedMatrix right =
      format::encode_nvfp4(values, from.rows, from.cols, format::nvfp4_global_scale(largest));
  EXPECT_EQ(got.global_scale, right.global_scale);
  EXPECT_EQ(std::memcmp(got.data, right.data.data(), right.data.size()), 0);
  EXPECT_EQ(std::memcmp(got.scales, right.scales.data(), right.scales.size()), 0);
  EXPECT_LT(loaded.weight_bytes, published.weight_bytes);
}

TEST_F(ConvertedWeights, AreCountedBeforeTheyAreLoaded) {
  const WeightSizes none = load(TinyKind::kBf16, {DenseFormats()}).sizes;
  EXPECT_EQ(none.conversion, 0u);
  EXPECT_EQ(none.widest.all[static_cast<std::size_t>(WeightFormat::kFp8Block)], 0);
  const LoadedWeights loaded =
      load(TinyKind::kBf16, {formats_of(DenseRole::kMlp, WeightFormat::kFp8Block)});
  const auto& layer = loaded.weights.layers.front();
  std::int64_t cols = loaded.weights.lm_head.cols;  // of whatever has a role
  for (const auto& some : loaded.weights.layers) {
    cols = std::max({cols, some.self_attn.o_proj.cols, some.self_attn.kv_b_proj.cols,
                     some.mlp.down_proj.cols, some.shared_experts.down_proj.cols});
  }
  EXPECT_EQ(loaded.sizes.conversion, conversion_bytes(1, cols));
  EXPECT_EQ(loaded.sizes.widest.all[static_cast<std::size_t>(WeightFormat::kFp8Block)],
            std::max(layer.mlp.gate_proj.cols, layer.mlp.down_proj.cols));
}

TEST_F(ConvertedWeights, StepsThatSaveNothingAreLeftOut) {
  const WeightSizes sizes = load(TinyKind::kBf16, residency::format_ladder()).sizes;
  std::uint64_t before = sizes.dense_bytes;
  for (const auto& step : sizes.converted) {
    EXPECT_LT(step.dense, before);
    before = step.dense;
  }
  EXPECT_FALSE(sizes.converted.empty());
  EXPECT_GT(sizes.conversion, 0u);
  // Matrices that are published in FP8 or NVFP4, so small that an arena rounds them to the same.
  const WeightSizes small = load(TinyKind::kNvfp4, residency::format_ladder()).sizes;
  EXPECT_TRUE(small.converted.empty());
  EXPECT_EQ(small.conversion, 0u);
}

TEST(QuantizationOption, IsChosenForAGpuOnlyUnlessItIsGiven) {
  LoadOptions options;
  EXPECT_EQ(formats_to_choose(options, true), residency::format_ladder());
  EXPECT_EQ(formats_to_choose(options, false), std::vector<DenseFormats>(1));
  options.quantization.emplace()["mlp"] = "nvfp4";
  for (const bool on_gpu : {false, true}) {
    EXPECT_EQ(formats_to_choose(options, on_gpu),
              std::vector{formats_of(DenseRole::kMlp, WeightFormat::kNvfp4)});
  }
}

TEST(QuantizationOption, WhatIsConvertedUnaskedIsSaidWithItsBytes) {
  residency::Plan plan;
  WeightSizes sizes;
  sizes.dense_bytes = 10'000'000'000;
  sizes.embedding_bytes = 2'000'000'000;
  const dsfp4::testing::Warnings warnings;
  log_conversion(plan, sizes);
  EXPECT_TRUE(warnings.with("").empty());
  plan.formats = formats_of(DenseRole::kMlp, WeightFormat::kFp8Block);
  sizes.converted = {{plan.formats, 7'000'000'000, {}}};
  log_conversion(plan, sizes);
  EXPECT_EQ(warnings.with("as published, 10.000 GB: ").size(), 1u);
  EXPECT_EQ(warnings.with("mlp to fp8, to 7.000 GB").size(), 1u);
  plan.embedding_in_ram = true;
  log_conversion(plan, sizes);
  EXPECT_EQ(warnings.with("as published, 8.000 GB: ").size(), 1u);
  EXPECT_EQ(warnings.with("mlp to fp8, to 5.000 GB").size(), 1u);
}

class Conversion : public ThreeTiersFixture {
 protected:
  static LoadOptions with(std::map<std::string, std::string> quantization) {
    LoadOptions options = load_options();
    options.quantization = std::move(quantization);
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Bf16, Conversion, ::testing::Values(TinyKind::kBf16));

TEST_P(Conversion, ARoleThatIsKeptChangesNothing) {
  for (const auto& kept : {with({}), with({{"attention", "keep"}, {"mlp", "keep"}})}) {
    EXPECT_TRUE(ask(*load(kept)) == right_);
    Engine in_ram(folder_.path(), kept);
    EXPECT_TRUE(ask(in_ram) == right_);
  }
}

// In RAM or VRAM, loaded whole or not: the same weights.
TEST_P(Conversion, TheSameWeightsWhereverTheyLie) {
  const LoadOptions all = with(
      {{"attention", "fp8"}, {"o_proj", "nvfp4"}, {"shared_experts", "nvfp4"}, {"mlp", "fp8"}});
  Engine in_ram(folder_.path(), all);
  const Says says = ask(in_ram);
  EXPECT_FALSE(says == right_);
  LoadOptions tiers = all;
  tiers.strategy.cpu_cache_size = 0.0;
  Engine from_files(folder_.path(), tiers);
  EXPECT_TRUE(ask(from_files) == says);
  EXPECT_TRUE(ask(*load(all)) == says);
  tiers.strategy.max_experts = 2;
  tiers.memory.cpu_share = 0.0;
  EXPECT_TRUE(ask(*load(tiers)) == says);
}

TEST_P(Conversion, AsFewRolesAsVramTakes) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 0;
  options.strategy.min_layers = kModelLayers;  // rather than that some are in RAM
  options.memory.cpu_share = 0.0;
  LoadOptions keeps = options;
  keeps.quantization.emplace();
  const std::uint64_t published = least_vram(keeps);
  const std::uint64_t least = least_vram(options);
  EXPECT_LT(least, published);

  ops::testing::EmulatedOptions device = as_a_gpu();
  device.memory_limit = published + kRounding;
  const auto says = [&] {
    const dsfp4::testing::Warnings warnings;
    const Says said = ask(*load(options, device));
    return std::pair(said, warnings.with("VRAM does not hold the dense weights as published"));
  };
  EXPECT_EQ(says(), std::pair(right_, std::vector<std::string>()));
  device.memory_limit -= 1;
  EXPECT_THROW(load(keeps, device), MemoryLimitError);
  const auto [converted, notes] = says();
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_NE(notes.front().find("attention and o_proj to fp8, to"), std::string::npos)
      << notes.front();
  Engine same(folder_.path(), with({{"attention", "fp8"}, {"o_proj", "fp8"}}));
  EXPECT_TRUE(converted == ask(same));

  device.memory_limit = least + kRounding;
  EXPECT_EQ(says().second.size(), 1u);
  EXPECT_LE(device_->memory().used(), least);
}

TEST(QuantizationOption, BadRolesAndFormatsAreNamed) {
  const auto refused = [](std::map<std::string, std::string> quantization) -> std::string {
    LoadOptions options;
    options.quantization = std::move(quantization);
    try {
      formats_to_choose(options, true);
      return "";
    } catch (const ParameterError& error) {
      EXPECT_EQ(error.parameter(), "quantization");
      return error.what();
    }
  };
  EXPECT_NE(refused({{"router", "fp8"}}).find("no role 'router'; the roles are attention, o_proj"),
            std::string::npos);
  EXPECT_NE(refused({{"o_proj", "int4"}}).find("o_proj can be keep, fp8 or nvfp4, not 'int4'"),
            std::string::npos);
  EXPECT_NE(refused({{"attention", "nvfp4"}}).find("attention can be keep or fp8, not 'nvfp4'"),
            std::string::npos);
  EXPECT_NE(refused({{"lm_head", "nvfp4"}}).find("lm_head can be keep or fp8, not 'nvfp4'"),
            std::string::npos);
  EXPECT_EQ(refused({{"attention", "fp8"}, {"o_proj", "nvfp4"}}), "");
}

}  // namespace
}  // namespace dsfp4::engine
