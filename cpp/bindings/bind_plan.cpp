// Plans for machines that are described in numbers.
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "checkpoint/published.h"
#include "engine/planner.h"

namespace dsfp4::bindings {
namespace {

using engine::DescribedPlan;
using engine::Planner;

std::unique_ptr<Planner> make_planner(
    const std::string& model, bool published, const std::string& device,
    const std::string& kv_cache_dtype, int threads,
    std::optional<std::map<std::string, std::string>> quantization) {
  LoadOptions options;
  options.device = device;
  options.kv_cache_dtype = kv_cache_dtype;
  options.threads = threads;
  options.quantization = std::move(quantization);
  const ReleasedGil released;
  if (published) return std::make_unique<Planner>(checkpoint::published_model(model), options);
  return std::make_unique<Planner>(model, options);
}

nb::dict model_of(const Planner& planner) {
  nb::dict dict = config_dict(planner.config());
  dict["weight_bytes"] = planner.weight_bytes();
  dict["unneeded_bytes"] = planner.unneeded_bytes();
  dict["expert_bytes"] = planner.expert_bytes();
  dict["experts"] = planner.experts();
  return dict;
}

nb::dict dict_of(const DescribedPlan& described) {
  const residency::Plan& plan = described.plan;
  nb::list roles;
  for (const engine::PlacedRole& role : described.roles) {
    nb::dict dict;
    dict["role"] = role.role;
    dict["tier"] = engine::tier_name(role.tier);
    dict["bytes"] = role.bytes;
    dict["format"] = role.format;
    roles.append(dict);
  }
  nb::dict dict;
  dict["max_context"] = described.max_context;
  dict["roles"] = roles;
  dict["layer_bytes"] = described.layer_bytes;
  dict["head_bytes"] = described.head_bytes;
  dict["kv_bytes_per_token"] = described.kv_bytes_per_token;
  dict["conversion"] = described.conversion;
  dict["chunk"] = plan.chunk;
  dict["tiered"] = plan.tiered;
  dict["streamed"] = plan.streamed;
  dict["slots"] = plan.slots;
  dict["cache_slots"] = plan.cache_slots;
  dict["device_slots"] = plan.device_slots;
  dict["device_cache_slots"] = plan.device_cache_slots;
  dict["ram_bytes"] = plan.ram_bytes;
  dict["load_bytes"] = plan.load_bytes;
  dict["vram_bytes"] = plan.vram_bytes;
  dict["warnings"] = plan.warnings;
  return dict;
}

nb::dict plan(const Planner& planner, std::uint64_t ram, std::optional<std::uint64_t> vram,
              std::uint64_t ram_limit, std::int64_t max_context,
              std::optional<std::int64_t> prefetch_layers, const MemoryStrategy& strategy) {
  LoadOptions options;
  options.device = vram ? "cuda" : "cpu";
  options.ram_limit = ram_limit;
  options.max_context = max_context;
  options.memory.prefetch_layers = prefetch_layers;
  options.strategy = strategy;
  DescribedPlan described;
  {
    const ReleasedGil released;
    described = planner.plan({ram, vram}, options);
  }
  return dict_of(described);
}

}  // namespace

void bind_plan(nb::module_& m) {
  m.def("published_models", &checkpoint::published_names,
        "Names of models that can be planned without a checkpoint.");
  nb::class_<Planner>(
      m, "Planner",
      "Plans one model for machines that are described in numbers: from the headers "
      "of a checkpoint folder, or by the name of a published model.")
      .def(nb::new_(&make_planner), nb::arg("model"), nb::kw_only(), nb::arg("published"),
           nb::arg("device"), nb::arg("kv_cache_dtype") = "bf16", nb::arg("threads") = 0,
           nb::arg("quantization") = nb::none())
      .def_prop_ro("model", &model_of,
                   "The configuration, and in bytes: weight_bytes that decoding needs, "
                   "unneeded_bytes, expert_bytes of one routed expert; `experts`: how many.")
      .def(
          "plan",
          [](const Planner& planner, std::uint64_t ram, std::optional<std::uint64_t> vram,
             std::uint64_t ram_limit, std::int64_t max_context,
             std::optional<std::int64_t> prefetch_layers, std::optional<double> cpu_cache_size,
             std::optional<double> prefetch_size, std::optional<std::int64_t> max_experts,
             std::optional<double> gpu_reserved, std::optional<std::int64_t> max_gpu_layers,
             std::optional<std::int64_t> min_layers) {
            return plan(planner, ram, vram, ram_limit, max_context, prefetch_layers,
                        {cpu_cache_size, prefetch_size, max_experts, gpu_reserved, max_gpu_layers,
                         min_layers});
          },
          nb::kw_only(), nb::arg("ram"), nb::arg("vram").none() = nb::none(),
          nb::arg("ram_limit") = 0, nb::arg("max_context") = 0,
          nb::arg("prefetch_layers") = nb::none(), nb::arg("cpu_cache_size") = nb::none(),
          nb::arg("prefetch_size") = nb::none(), nb::arg("max_experts") = nb::none(),
          nb::arg("gpu_reserved") = nb::none(), nb::arg("max_gpu_layers") = nb::none(),
          nb::arg("min_layers") = nb::none(),
          "What a load would decide. `ram`: bytes of the whole machine; `vram`: bytes that the "
          "process may take of a GPU, its context included. Raises MemoryLimitError as a load "
          "does.");
}

}  // namespace dsfp4::bindings
