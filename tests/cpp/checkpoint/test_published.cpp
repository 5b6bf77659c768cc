// Published models known by name have the tensors that a layout of their configuration needs.
#include <algorithm>
#include <string>

#include <gtest/gtest.h>

#include "checkpoint/layout.h"
#include "checkpoint/published.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

TEST(Published, EachModelResolves) {
  const auto names = published_names();
  EXPECT_TRUE(std::ranges::is_sorted(names));
  for (const std::string_view name : names) {
    SCOPED_TRACE(std::string(name));
    const PublishedModel model = published_model(name);
    const ModelLayout layout = resolve_layout(model.catalogue, model.config);
    EXPECT_EQ(static_cast<std::int64_t>(layout.layers.size()), model.config.num_hidden_layers);
    EXPECT_EQ(model.unneeded_bytes > 0, model.config.model_type == "deepseek_v3");
  }
}

TEST(Published, FormatsAreThoseOfTheExporter) {
  using format::WeightFormat;
  const auto layer = [](const PublishedModel& model) {
    return resolve_layout(model.catalogue, model.config).layers.back();
  };
  const PublishedModel r1 = published_model("deepseek-r1-fp4");
  EXPECT_EQ(layer(r1).self_attn.o_proj.format, WeightFormat::kBF16);
  EXPECT_EQ(layer(r1).experts.back().down_proj.format, WeightFormat::kNvfp4);
  const PublishedModel v31 = published_model("deepseek-v3.1-fp4");
  EXPECT_EQ(layer(v31).self_attn.q_b_proj.format, WeightFormat::kBF16);
  EXPECT_EQ(layer(v31).self_attn.o_proj.format, WeightFormat::kNvfp4);
  const PublishedModel fp8 = published_model("deepseek-v3-fp8");
  EXPECT_EQ(layer(fp8).self_attn.kv_b_proj.format, WeightFormat::kFp8Block);
  EXPECT_EQ(layer(fp8).gate.format, WeightFormat::kBF16);
}

// An expert's three packed matrices are neighbours in the file, and so are their scales.
TEST(Published, TensorsLieAsExportersWriteThem) {
  const PublishedModel model = published_model("deepseek-r1-fp4");
  const std::string prefix = "model.layers.9.mlp.experts.7.";
  const TensorInfo& down = model.catalogue.require(prefix + "down_proj.weight");
  const TensorInfo& gate = model.catalogue.require(prefix + "gate_proj.weight");
  const TensorInfo& scales = model.catalogue.require(prefix + "down_proj.weight_scale");
  EXPECT_EQ(down.offset + down.bytes, gate.offset);
  EXPECT_EQ(scales.offset + scales.bytes,
            model.catalogue.require(prefix + "gate_proj.weight_scale").offset);
  EXPECT_EQ(down.file, scales.file);
  EXPECT_EQ(model.catalogue.find("model.layers.61.eh_proj.weight"), nullptr);
}

TEST(Published, AnotherNameIsRefusedWithThoseThatThereAre) {
  try {
    published_model("deepseek-r1-fp5");
    FAIL() << "there is no such model";
  } catch (const ParameterError& error) {
    EXPECT_NE(std::string(error.what()).find("deepseek-r1-fp4"), std::string::npos);
  }
}

}  // namespace
}  // namespace dsfp4::checkpoint
