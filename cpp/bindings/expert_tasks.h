// The arguments of the ops named `moe`, checked, as a backend takes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "dsfp4/error.h"
#include "ops/views.h"

namespace dsfp4::bindings {

inline void require(bool ok, const char* parameter, const std::string& problem) {
  if (!ok) throw ParameterError(parameter, problem);
}

/// Experts whose shapes fit x and each other, and the (token, slot) pairs of each.
struct ExpertTasks {
  /// `matrices`: gate, up and down of each expert. `chosen`: [rows of x, top_k], as `weights`.
  ExpertTasks(const std::vector<ops::WeightView>& matrices, ops::ConstMatrix x,
              const ConstArray<std::int32_t>& chosen, const ConstArray<float>& weights) {
    require(!matrices.empty() && matrices.size() % 3 == 0, "experts",
            "must be gate, up and down of each expert");
    for (std::size_t i = 0; i < matrices.size(); i += 3) {
      experts.push_back({matrices[i], matrices[i + 1], matrices[i + 2]});
      const ops::ExpertView& e = experts.back();
      require(e.gate_proj.cols == x.cols && e.up_proj.cols == x.cols &&
                  e.gate_proj.rows == e.up_proj.rows && e.down_proj.cols == e.gate_proj.rows &&
                  e.down_proj.rows == x.cols && e.gate_proj.rows == experts.front().gate_proj.rows,
              "experts", "shapes do not fit together");
    }
    require(chosen.ndim() == 2 && chosen.shape(0) == static_cast<std::size_t>(x.rows) &&
                weights.size() == chosen.size(),
            "chosen", "must be [rows of x, top_k], as weights");
    pairs.resize(experts.size());
    for (std::size_t p = 0; p < chosen.size(); ++p) {
      const auto e = static_cast<std::size_t>(chosen.data()[p]);
      require(e < experts.size(), "chosen", "names an expert that is not there");
      pairs[e].push_back(static_cast<std::int32_t>(p));
    }
    for (std::size_t e = 0; e < experts.size(); ++e) {
      if (!pairs[e].empty()) tasks.push_back({&experts[e], pairs[e]});
    }
    top_k = static_cast<std::int64_t>(chosen.shape(1));
  }
  ExpertTasks(const ExpertTasks&) = delete;
  ExpertTasks& operator=(const ExpertTasks&) = delete;

  std::vector<ops::ExpertView> experts;
  std::vector<std::vector<std::int32_t>> pairs;
  std::vector<ops::ExpertTask> tasks;
  std::int64_t top_k = 0;
};

}  // namespace dsfp4::bindings
