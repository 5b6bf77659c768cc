#include "engine/quantization.h"

#include <algorithm>
#include <optional>
#include <string>

#include "base/log.h"
#include "base/units.h"
#include "dsfp4/error.h"

namespace dsfp4::engine {
namespace {

using format::WeightFormat;
using residency::DenseFormats;
using residency::DenseRole;

std::string roles() {
  std::string names;
  for (std::size_t i = 0; i < residency::kDenseRoles; ++i) {
    if (i > 0) names += ", ";
    names += residency::dense_role_name(static_cast<DenseRole>(i));
  }
  return names;
}

std::optional<WeightFormat> format_of(DenseRole role, const std::string& name) {
  if (name == "keep") return std::nullopt;
  if (name == "fp8") return WeightFormat::kFp8Block;
  const bool exact = role == DenseRole::kAttention || role == DenseRole::kLmHead;
  if (name == "nvfp4" && !exact) return WeightFormat::kNvfp4;
  throw ParameterError("quantization", std::string(residency::dense_role_name(role)) + " can be " +
                                           (exact ? "keep or fp8" : "keep, fp8 or nvfp4") +
                                           ", not '" + name + "'");
}

}  // namespace

std::vector<DenseFormats> formats_to_choose(const LoadOptions& options, bool on_gpu) {
  if (!options.quantization) {
    return on_gpu ? residency::format_ladder() : std::vector<DenseFormats>(1);
  }
  DenseFormats formats;
  for (const auto& [name, format] : *options.quantization) {
    const std::optional<DenseRole> role = residency::dense_role(name);
    if (!role) {
      throw ParameterError("quantization", "has no role '" + name + "'; the roles are " + roles());
    }
    formats.of(*role) = format_of(*role, format);
  }
  return {formats};
}

void log_conversion(const residency::Plan& plan, const WeightSizes& sizes) {
  if (plan.formats == sizes.formats) return;
  const auto chosen =
      std::ranges::find(sizes.converted, plan.formats, &residency::ModelBytes::Converted::formats);
  const auto without_embedding = [&](std::uint64_t bytes) {
    return gigabytes(bytes - (plan.embedding_in_ram ? sizes.embedding_bytes : 0));
  };
  log(LogLevel::kWarning,
      "VRAM does not hold the dense weights as published, " + without_embedding(sizes.dense_bytes) +
          ": they are converted while they are loaded, " + residency::describe(plan.formats) +
          ", to " + without_embedding(chosen->dense) + "; quantization 'keep' forbids that");
}

}  // namespace dsfp4::engine
