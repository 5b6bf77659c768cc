// Models as their publishers export them, known by name: what a checkpoint's headers would say, for
// a plan before anything is downloaded. Facts: configurations and formats of the Hugging Face
// repositories of DeepSeek and NVIDIA.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"

namespace dsfp4::checkpoint {

struct PublishedModel {
  ModelConfig config;
  /// Every tensor that decoding needs, by layer as in a shard of its own. There are no such files.
  Catalogue catalogue;
  /// Bytes of weights that are published as well and that decoding does not need: the layers for
  /// multi-token prediction.
  std::uint64_t unneeded_bytes = 0;
};

/// Names, sorted: "deepseek-r1-fp4", ...
std::vector<std::string_view> published_names();

/// Throws ParameterError for a name that is not one of published_names().
PublishedModel published_model(std::string_view name);

}  // namespace dsfp4::checkpoint
