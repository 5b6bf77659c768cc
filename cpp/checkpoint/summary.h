// What a checkpoint holds, by role: the facts behind `dsfp4 info`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"

namespace dsfp4::checkpoint {

struct RoleSummary {
  std::string role;                             // "routed experts", "attention", ...
  std::map<std::string, std::int64_t> formats;  // "nvfp4" -> matrices (vectors, for the norms)
  std::uint64_t bytes = 0;                      // all tensors of the role, the scalars too
  std::uint64_t bytes_per_token = 0;            // read to decode one token
};

struct Summary {
  /// In a fixed order, roles that the model does not have left out: routed experts, shared experts,
  /// dense MLP, attention, router, embedding, head, norms. A tied head has no bytes of its own.
  std::vector<RoleSummary> roles;
  std::uint64_t total_bytes = 0;  // of all roles
  std::uint64_t bytes_per_token = 0;
  std::uint64_t unused_bytes = 0;  // of tensors that decoding does not use, MTP layers for one
  std::uint64_t tensors = 0;
  std::uint64_t files = 0;
};

Summary summarize(const Catalogue& catalogue, const ModelConfig& config, const ModelLayout& layout);

}  // namespace dsfp4::checkpoint
