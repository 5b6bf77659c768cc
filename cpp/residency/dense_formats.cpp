#include "residency/dense_formats.h"

#include <algorithm>
#include <utility>

namespace dsfp4::residency {
namespace {

using format::WeightFormat;

constexpr std::array<std::string_view, kDenseRoles> kNames = {"attention", "o_proj",
                                                              "shared_experts", "mlp", "lm_head"};

}  // namespace

std::string_view dense_role_name(DenseRole role) { return kNames[static_cast<std::size_t>(role)]; }

std::optional<DenseRole> dense_role(std::string_view name) {
  const auto found = std::ranges::find(kNames, name);
  if (found == kNames.end()) return std::nullopt;
  return static_cast<DenseRole>(found - kNames.begin());
}

bool DenseFormats::any() const noexcept {
  return std::ranges::any_of(by_role, [](const auto& format) { return format.has_value(); });
}

WeightFormat DenseFormats::of(DenseRole role, WeightFormat published, std::int64_t rows,
                              std::int64_t cols) const {
  const WeightFormat wanted = by_role[static_cast<std::size_t>(role)].value_or(published);
  if (wanted == WeightFormat::kNvfp4 && cols % format::kNvfp4Group != 0) return published;
  const auto bytes_in = [&](WeightFormat format) {
    return format::stored_bytes(format, rows, cols);
  };
  if (bytes_in(wanted) >= bytes_in(published)) return published;
  return wanted;
}

std::string describe(const DenseFormats& formats) {
  std::string text;
  for (const WeightFormat format : {WeightFormat::kFp8Block, WeightFormat::kNvfp4}) {
    std::string roles;
    for (std::size_t i = 0; i < kDenseRoles; ++i) {
      if (formats.by_role[i] != format) continue;
      if (!roles.empty()) roles += " and ";
      roles += kNames[i];
    }
    if (roles.empty()) continue;
    if (!text.empty()) text += ", ";
    text += roles + " to " + std::string(format::weight_format_name(format));
  }
  return text;
}

std::vector<DenseFormats> format_ladder() {
  std::vector<DenseFormats> ladder(1);
  const auto step = [&](std::initializer_list<DenseRole> roles, WeightFormat format) {
    DenseFormats next = ladder.back();
    for (const DenseRole role : roles) next.of(role) = format;
    ladder.push_back(next);
  };
  step({DenseRole::kAttention, DenseRole::kOProj}, WeightFormat::kFp8Block);
  step({DenseRole::kSharedExperts, DenseRole::kMlp}, WeightFormat::kFp8Block);
  step({DenseRole::kOProj}, WeightFormat::kNvfp4);
  step({DenseRole::kMlp}, WeightFormat::kNvfp4);
  step({DenseRole::kSharedExperts}, WeightFormat::kNvfp4);
  return ladder;
}

}  // namespace dsfp4::residency
