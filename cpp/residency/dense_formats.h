// The formats that dense weights have in memory, where they are converted while they are loaded.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/weight.h"

namespace dsfp4::residency {

/// Matrices that are converted together.
enum class DenseRole : std::uint8_t {
  kAttention,  // all of self_attn but o_proj
  kOProj,
  kSharedExperts,
  kMlp,  // of the dense layers
  kLmHead,
};

inline constexpr std::size_t kDenseRoles = 5;

/// "attention", "o_proj", "shared_experts", "mlp", "lm_head".
std::string_view dense_role_name(DenseRole role);
std::optional<DenseRole> dense_role(std::string_view name);

/// By role: kFp8Block or kNvfp4; none: as published. A matrix is converted only if it gets smaller,
/// to NVFP4 only if its columns are a multiple of the group.
struct DenseFormats {
  std::array<std::optional<format::WeightFormat>, kDenseRoles> by_role;

  std::optional<format::WeightFormat>& of(DenseRole role) {
    return by_role[static_cast<std::size_t>(role)];
  }
  /// True where some role is converted.
  bool any() const noexcept;
  /// Of a matrix that is published in `published`.
  format::WeightFormat of(DenseRole role, format::WeightFormat published, std::int64_t rows,
                          std::int64_t cols) const;

  friend bool operator==(const DenseFormats&, const DenseFormats&) = default;
};

/// "attention and o_proj to fp8, mlp to nvfp4"; empty where all is as published.
std::string describe(const DenseFormats& formats);

/// As published, then what a plan converts where memory is short, less exact from step to step, as
/// measured (LEARNED.md): FP8 first, then NVFP4 for the roles that NVIDIA publishes so.
std::vector<DenseFormats> format_ladder();

}  // namespace dsfp4::residency
