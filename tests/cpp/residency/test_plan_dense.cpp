// Dense weights that VRAM does not hold: converted, then streamed.
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/plan.h"
#include "residency/small_model.h"
#include "residency/vram_budgets.h"

namespace dsfp4::residency {
namespace {

DenseFormats formats_of(DenseRole role, format::WeightFormat format) {
  DenseFormats formats;
  formats.of(role) = format;
  return formats;
}

// Dense weights of 600, 500 and 400 bytes.
ModelBytes convertible_model() {
  ModelBytes model = small_model();
  model.converted = {{formats_of(DenseRole::kMlp, format::WeightFormat::kFp8Block), 500, {}},
                     {formats_of(DenseRole::kMlp, format::WeightFormat::kNvfp4), 400, {}}};
  return model;
}

TEST(DenseInVram, DenseWeightsAreConvertedOnlyWhereTheyDoNotFit) {
  const ModelBytes model = convertible_model();
  const auto formats = [&](std::uint64_t vram) {
    return plan(vram, kEnough, wishes_of(), model).formats;
  };
  EXPECT_FALSE(formats(kWhole).any());
  EXPECT_FALSE(formats(kWhole - 1).any());  // three tiers come first
  EXPECT_FALSE(formats(kVramFloor).any());
  EXPECT_EQ(formats(kVramFloor - 1), model.converted[0].formats);
  EXPECT_EQ(formats(kVramFloor - 100), model.converted[0].formats);
  EXPECT_EQ(formats(kVramFloor - 101), model.converted[1].formats);
  const Plan least = plan(kVramFloor - 200, kEnough, wishes_of(), model);
  EXPECT_EQ(least.dense_bytes, 300u);  // 400 - 100
  EXPECT_EQ(least.vram_bytes, kVramFloor - 200);
  floor_is(kVramFloor - 200, wishes_of(), model);
  // Wishes come before formats.
  EXPECT_EQ(plan(kVramFloor + 7 * 130 - 1, kEnough, wishes_of(7), model).formats,
            model.converted[0].formats);
}

TEST(DenseInVram, WhereRamIsShortNothingIsConvertedForIt) {
  const auto error =
      refusal(convertible_model(), budgets_of(kVramFloor, kRamFloor - 1), wishes_of());
  ASSERT_TRUE(error);
  EXPECT_FALSE(says(error, "VRAM"));
  EXPECT_FALSE(plan(kVramFloor, kRamFloor, wishes_of(), convertible_model()).formats.any());
}

// Six layers: two of 60 bytes, then four of 50.
ModelBytes layered_model() {
  ModelBytes model = small_model();
  model.layers = {60, 60, 50, 50, 50, 50};
  return model;
}

Wishes with_layers(std::optional<std::uint64_t> most, std::uint64_t least = 0) {
  Wishes wishes = wishes_of();
  wishes.max_gpu_layers = most;
  wishes.min_layers = least;
  return wishes;
}

TEST(DenseInVram, LayersAreStreamedOnlyWhereTheRestDoesNotFit) {
  const ModelBytes model = layered_model();
  const auto planned = [&](std::uint64_t vram) { return plan(vram, kEnough, wishes_of(), model); };
  EXPECT_EQ(planned(kVramFloor).streamed_layers(), 0u);
  EXPECT_TRUE(planned(kVramFloor).warnings.empty());
  // Three of the four smaller ones, of which two are in buffers.
  const Plan three = planned(kVramFloor - 1);
  EXPECT_EQ(three.streamed, (std::vector<bool>{false, false, false, true, true, true}));
  EXPECT_EQ(three.layer_buffers, 2u);
  EXPECT_EQ(three.layer_buffer_bytes, 50u);
  EXPECT_EQ(three.staged_bytes, 150u);
  EXPECT_EQ(three.dense_bytes, 500u - 150 + 100);
  EXPECT_EQ(three.ram_bytes, kRam + 150 + 108 * 120);
  ASSERT_EQ(three.warnings.size(), 1u);
  EXPECT_NE(three.warnings[0].find("3 of 6 layers"), std::string::npos);
  EXPECT_EQ(planned(kVramFloor - 50).streamed_layers(), 3u);
  EXPECT_EQ(planned(kVramFloor - 51).streamed_layers(), 4u);
  EXPECT_EQ(planned(kVramFloor - 100).streamed_layers(), 4u);
  // The larger ones need larger buffers.
  const Plan all = planned(kVramFloor - 200);
  EXPECT_EQ(all.streamed_layers(), 6u);
  EXPECT_EQ(all.layer_buffer_bytes, 60u);
  floor_is(kVramFloor - 320 + 120, wishes_of(), model);
}

TEST(DenseInVram, MaxGpuLayersAndMinLayersAreKept) {
  const ModelBytes model = layered_model();
  const auto streamed = [&](std::uint64_t vram, const Wishes& wishes) {
    return plan(vram, kEnough, wishes, model).streamed_layers();
  };
  EXPECT_EQ(streamed(kEnough, with_layers(6)), 0u);
  EXPECT_EQ(streamed(kEnough, with_layers(3)), 3u);
  EXPECT_EQ(streamed(kEnough, with_layers(5)), 3u);  // fewer would save nothing
  EXPECT_EQ(streamed(kEnough, with_layers(0)), 6u);
  EXPECT_EQ(streamed(kVramFloor - 50, with_layers({}, 3)), 3u);
  EXPECT_TRUE(refusal(model, budgets_of(kVramFloor - 51), with_layers({}, 3)));
  EXPECT_TRUE(refusal(model, budgets_of(kVramFloor - 1), with_layers({}, 6)));
  EXPECT_TRUE(refusal(model, budgets_of(kVramFloor - 1), with_layers({}, 60)));
  EXPECT_EQ(streamed(kVramFloor, with_layers({}, 60)), 0u);
  EXPECT_TRUE(says(refusal(model, budgets_of(kVramFloor - 51), with_layers({}, 3)), "min_layers"));
  EXPECT_FALSE(says(refusal(model, budgets_of(1), with_layers({}, 3)), "min_layers"));
  try {
    plan(kEnough, kEnough, with_layers(2, 3), model);
    FAIL() << "it was taken";
  } catch (const ParameterError& error) {
    EXPECT_EQ(error.parameter(), "min_layers");
  }
}

// Says what is wrong with a wish.
std::string bad_wish(const Wishes& wishes, const ModelBytes& model) {
  try {
    plan(kEnough, kEnough, wishes, model);
    return "";
  } catch (const ParameterError& error) {
    return error.what();
  }
}

TEST(DenseInVram, TooFewLayersToStreamAreRefused) {
  const ModelBytes model = layered_model();
  EXPECT_EQ(bad_wish(with_layers(5, 3), model), "");
  const std::string six = bad_wish(with_layers(5, 4), model);
  EXPECT_NE(six.find("'max_gpu_layers': must be at least 6, all layers, or min_layers at most 3: "
                     "fewer than 3 streamed layers"),
            std::string::npos)
      << six;
  ModelBytes two = small_model();
  two.layers = {60, 50};
  for (const std::uint64_t stay : {0, 1}) {
    const std::string refusal = bad_wish(with_layers(stay), two);
    EXPECT_NE(refusal.find("must be at least 2, all layers: fewer"), std::string::npos) << refusal;
  }
  EXPECT_EQ(bad_wish(with_layers(2), two), "");
  two.layers = {60, 50, 50};
  EXPECT_EQ(plan(kEnough, kEnough, with_layers(2), two).streamed_layers(), 3u);
}

TEST(DenseInVram, LayersOfAModelWithoutExpertsAreNotStreamed) {
  ModelBytes model = layered_model();
  model.experts = model.expert_bytes = model.expert_slot = model.device_slot = 0;
  EXPECT_EQ(bad_wish(with_layers(6), model), "");
  EXPECT_NE(bad_wish(with_layers(3), model).find("'max_gpu_layers': must be at least 6"),
            std::string::npos);
}

TEST(DenseInVram, WhereStreamedLayersTakeTooMuchRamThatIsSaid) {
  const ModelBytes model = layered_model();  // 320 bytes of layers
  const auto with = [&](std::uint64_t vram, const Wishes& wishes) {
    return refusal(model, budgets_of(vram, kRamFloor + 319), wishes);
  };
  EXPECT_FALSE(refusal(model, budgets_of(kEnough, kRamFloor + 320), with_layers(0)));
  const auto error = with(kEnough, with_layers(0));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), error->available() + 1);
  EXPECT_TRUE(says(error, "raise ram_limit, or raise max_gpu_layers, or lower prefetch_size"));
  // VRAM takes only so many more.
  EXPECT_TRUE(says(with(kVramFloor - 100, with_layers(0)), "raise max_gpu_layers"));
  EXPECT_FALSE(says(with(kVramFloor - 200, with_layers(0)), "max_gpu_layers"));
  EXPECT_FALSE(says(with(kVramFloor - 200, wishes_of()), "max_gpu_layers"));
}

TEST(DenseInVram, BuffersAreFewerThanTheLayersThatUseThem) {
  Wishes wishes = with_layers(0);
  wishes.prefetch_layers = 16;
  const Plan all = plan(kEnough, kEnough, wishes, layered_model());
  EXPECT_EQ(all.streamed_layers(), 6u);
  EXPECT_EQ(all.layer_buffers, 5u);
  wishes.max_gpu_layers = 3;
  EXPECT_EQ(plan(kEnough, kEnough, wishes, layered_model()).layer_buffers, 2u);
}

TEST(DenseInVram, WeightsAreConvertedBeforeLayersAreStreamed) {
  ModelBytes model = layered_model();
  model.converted = {{formats_of(DenseRole::kMlp, format::WeightFormat::kFp8Block),
                      500,
                      {50, 50, 40, 40, 40, 40}}};
  const Plan converted = plan(kVramFloor - 100, kEnough, wishes_of(), model);
  EXPECT_TRUE(converted.formats.any());
  EXPECT_EQ(converted.streamed_layers(), 0u);
  const Plan both = plan(kVramFloor - 101, kEnough, wishes_of(), model);
  EXPECT_TRUE(both.formats.any());
  EXPECT_EQ(both.streamed_layers(), 3u);
  EXPECT_EQ(both.staged_bytes, 120u);
}

TEST(DenseInVram, StreamedLayersAreNotConvertedForTheSakeOfRam) {
  ModelBytes model = layered_model();  // 320 bytes of layers, or 240
  model.converted = {{formats_of(DenseRole::kMlp, format::WeightFormat::kFp8Block),
                      500,
                      {40, 40, 40, 40, 40, 40}}};
  const auto error = refusal(model, budgets_of(kEnough, kRamFloor + 319), with_layers(0));
  EXPECT_TRUE(says(error, "of RAM"));
}

TEST(DenseInVram, StreamedLayersTakeRam) {
  const ModelBytes model = layered_model();
  const auto error = refusal(model, budgets_of(kVramFloor - 50, kRamFloor + 149), wishes_of());
  ASSERT_TRUE(error);
  EXPECT_FALSE(says(error, "VRAM"));
  EXPECT_EQ(error->needed(), error->available() + 1);  // with no more layers than VRAM asks for
  EXPECT_EQ(plan(kVramFloor - 50, kRamFloor + 150, wishes_of(), model).cache_slots, 0u);
}

// One that is larger than the last would make every buffer larger.
TEST(DenseInVram, LargerLayersAreStreamedLast) {
  ModelBytes model = small_model();
  model.layers = {60, 50, 55, 50, 50, 55, 50};
  const Plan four = plan(kEnough, kEnough, with_layers(3), model);
  EXPECT_EQ(four.streamed, (std::vector<bool>{false, true, false, true, true, false, true}));
  EXPECT_EQ(four.layer_buffer_bytes, 50u);
  EXPECT_EQ(plan(kEnough, kEnough, with_layers(0), model).layer_buffer_bytes, 60u);
}

// The buffers of 80 bytes more are the room of two layers. With a prompt in four pieces it pays.
TEST(DenseInVram, LayersAreStreamedForLongerChunksWhereThatMovesLess) {
  ModelBytes model = layered_model();
  const auto made = [&](std::int64_t rows) {
    model.steps = {{256, 150, 30}, {rows, 230, 30}};
    return plan(kVramFloor, kRamFloor + 200, wishes_of(), model);
  };
  EXPECT_EQ(made(1000).chunk, 1000);
  EXPECT_EQ(made(1000).streamed_layers(), 4u);
  EXPECT_EQ(made(512).chunk, 256);
  EXPECT_EQ(made(512).streamed_layers(), 0u);
}

}  // namespace
}  // namespace dsfp4::residency
