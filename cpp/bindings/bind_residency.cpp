// Replacement policies on recorded routings, for bench/replay.py and tests.
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "dsfp4/error.h"
#include "residency/policy.h"
#include "residency/warm_start.h"

namespace dsfp4::bindings {
namespace {

std::int64_t replay(const std::string& name, const ConstArray<std::int32_t>& used,
                    const ConstArray<float>& scores, std::int64_t capacity, std::int64_t first) {
  if (used.ndim() != 3 || scores.ndim() != 3 || used.shape(0) != scores.shape(0) ||
      used.shape(1) != scores.shape(1) || used.size() == 0 || scores.size() == 0) {
    throw ParameterError("used",
                         "must be [layers, tokens, top_k], and scores [layers, tokens, "
                         "experts] with the same layers and tokens");
  }
  if (capacity < 0) throw ParameterError("capacity", "must not be negative");
  const auto layers = static_cast<std::int64_t>(used.shape(0));
  const auto experts = static_cast<std::int64_t>(scores.shape(2));
  for (std::size_t i = 0; i < used.size(); ++i) {
    if (used.data()[i] < 0 || used.data()[i] >= experts) {
      throw ParameterError("used", "names expert " + std::to_string(used.data()[i]) + " of " +
                                       std::to_string(experts));
    }
  }
  const auto policy = residency::make_policy(name, layers, experts);
  const ReleasedGil released;
  return residency::replay_misses(
      *policy, layers, experts, static_cast<std::int64_t>(used.shape(2)),
      {used.data(), used.size()}, {scores.data(), scores.size()}, capacity, first);
}

}  // namespace

void bind_residency(nb::module_& m) {
  m.def(
      "policy_names",
      [] {
        std::vector<std::string> names;
        for (const std::string_view name : residency::policy_names()) names.emplace_back(name);
        return names;
      },
      "The replacement policies of the expert cache.");
  m.def(
      "check_warm_start",
      [](const std::string& path) { return residency::is_whole_warm_start(path); }, nb::arg("path"),
      "Whether a warm-start file is whole.");
  m.def("replay_misses", &replay, nb::arg("policy"), nb::arg("used"), nb::arg("scores"),
        nb::arg("capacity"), nb::arg("first") = 0,
        "Misses of a cache of `capacity` experts on a routing trace: used int32 [layers, tokens, "
        "top_k], selection scores float32 [layers, tokens, experts]. Tokens before `first` are not "
        "counted.");
}

}  // namespace dsfp4::bindings
