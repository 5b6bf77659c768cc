// Checkpoint folders as Python sees them: tensors, configuration, summary.
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "base/poll.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"
#include "checkpoint/leftovers.h"
#include "checkpoint/shard_index.h"
#include "checkpoint/summary.h"
#include "dsfp4/error.h"
#include "engine/verify.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;
using checkpoint::Catalogue;
using checkpoint::ModelConfig;
using checkpoint::TensorInfo;
using std::filesystem::path;

/// A tensor with the file that it lies in; independent of the catalogue.
struct PyTensorInfo {
  TensorInfo info;
  path file;

  nb::tuple shape() const { return nb::tuple(nb::cast(info.shape)); }
};

PyTensorInfo tensor_info(const Catalogue& catalogue, const TensorInfo& tensor) {
  return {tensor, catalogue.files().at(tensor.file)};
}

Catalogue open_catalogue(const path& folder) {
  const ReleasedGil released;
  return Catalogue::open(folder);
}

std::vector<PyTensorInfo> tensors(const Catalogue& catalogue) {
  std::vector<PyTensorInfo> all;
  all.reserve(catalogue.tensors().size());
  for (const TensorInfo& tensor : catalogue.tensors()) {
    all.push_back(tensor_info(catalogue, tensor));
  }
  return all;
}

std::optional<PyTensorInfo> find(const Catalogue& catalogue, const std::string& name) {
  const TensorInfo* tensor = catalogue.find(name);
  if (tensor == nullptr) return std::nullopt;
  return tensor_info(catalogue, *tensor);
}

nb::object yarn_dict(const std::optional<checkpoint::YarnConfig>& yarn) {
  if (!yarn) return nb::none();
  nb::dict dict;
  dict["factor"] = yarn->factor;
  dict["beta_fast"] = yarn->beta_fast;
  dict["beta_slow"] = yarn->beta_slow;
  dict["mscale"] = yarn->mscale;
  dict["mscale_all_dim"] = yarn->mscale_all_dim;
  dict["original_max_position_embeddings"] = yarn->original_max_position_embeddings;
  return std::move(dict);
}

}  // namespace

nb::dict config_dict(const ModelConfig& config) {
  nb::dict dict;
  dict["model_type"] = config.model_type;
  dict["vocab_size"] = config.vocab_size;
  dict["hidden_size"] = config.hidden_size;
  dict["num_hidden_layers"] = config.num_hidden_layers;
  dict["first_k_dense_replace"] = config.first_k_dense_replace;
  dict["num_attention_heads"] = config.num_attention_heads;
  dict["q_lora_rank"] = config.q_lora_rank;
  dict["kv_lora_rank"] = config.kv_lora_rank;
  dict["qk_nope_head_dim"] = config.qk_nope_head_dim;
  dict["qk_rope_head_dim"] = config.qk_rope_head_dim;
  dict["v_head_dim"] = config.v_head_dim;
  dict["intermediate_size"] = config.intermediate_size;
  dict["moe_intermediate_size"] = config.moe_intermediate_size;
  dict["n_routed_experts"] = config.n_routed_experts;
  dict["n_shared_experts"] = config.n_shared_experts;
  dict["num_experts_per_tok"] = config.num_experts_per_tok;
  dict["n_group"] = config.n_group;
  dict["topk_group"] = config.topk_group;
  dict["scoring_func"] = checkpoint::scoring_name(config.scoring_func);
  dict["topk_method"] = checkpoint::topk_method_name(config.topk_method);
  dict["norm_topk_prob"] = config.norm_topk_prob;
  dict["routed_scaling_factor"] = config.routed_scaling_factor;
  dict["rms_norm_eps"] = config.rms_norm_eps;
  dict["rope_theta"] = config.rope_theta;
  dict["yarn"] = yarn_dict(config.yarn);
  dict["max_position_embeddings"] = config.max_position_embeddings;
  dict["tie_word_embeddings"] = config.tie_word_embeddings;
  dict["bos_token_id"] = config.bos_token_id;
  dict["eos_token_ids"] = config.eos_token_ids;
  return dict;
}

namespace {

nb::dict read_config(const path& folder) {
  ModelConfig config;
  {
    const ReleasedGil released;
    config = checkpoint::read_config(folder);
  }
  return config_dict(config);
}

std::optional<std::vector<std::string>> needed_shards(const path& folder) {
  const ReleasedGil released;
  const ModelConfig config = checkpoint::read_config(folder);
  const std::optional<checkpoint::ShardIndex> index = checkpoint::read_shard_index(folder);
  if (!index) return std::nullopt;
  return checkpoint::needed_shards(*index, config);
}

nb::dict describe(const path& folder) {
  ModelConfig config;
  checkpoint::Summary summary;
  {
    const ReleasedGil released;
    config = checkpoint::read_config(folder);
    const Catalogue catalogue = Catalogue::open(folder);
    summary =
        checkpoint::summarize(catalogue, config, checkpoint::resolve_layout(catalogue, config));
  }
  nb::list roles;
  for (const checkpoint::RoleSummary& role : summary.roles) {
    nb::dict dict;
    dict["role"] = role.role;
    dict["formats"] = role.formats;
    dict["bytes"] = role.bytes;
    dict["bytes_per_token"] = role.bytes_per_token;
    roles.append(dict);
  }
  nb::dict dict;
  dict["config"] = config_dict(config);
  dict["roles"] = roles;
  dict["total_bytes"] = summary.total_bytes;
  dict["bytes_per_token"] = summary.bytes_per_token;
  dict["unused_bytes"] = summary.unused_bytes;
  dict["tensors"] = summary.tensors;
  dict["files"] = summary.files;
  return dict;
}

Poll leave_when_asked() {
  return [go_on = keep_going()] {
    if (!go_on()) throw CancelledError();
  };
}

nb::dict verify(const path& folder, int threads, bool write,
                const std::optional<nb::callable>& progress) {
  std::function<void(std::uint64_t, std::uint64_t)> on_bytes;
  if (progress) {
    on_bytes = [&](std::uint64_t done, std::uint64_t total) {
      const nb::gil_scoped_acquire gil;
      (*progress)(done, total);
    };
  }
  engine::VerifyReport report;
  {
    const ReleasedGil released;
    report = engine::verify(folder, threads, write, on_bytes, leave_when_asked());
  }
  nb::list problems;
  for (const engine::TensorProblem& problem : report.problems) {
    nb::dict dict;
    dict["file"] = file_text(problem.file);
    dict["tensor"] = problem.tensor;
    dict["offset"] = problem.offset;
    dict["problem"] = problem.problem;
    problems.append(dict);
  }
  nb::dict dict;
  dict["files"] = report.files;
  dict["tensors"] = report.tensors;
  dict["bytes"] = report.bytes;
  dict["compared"] = report.compared;
  dict["wrote"] = report.wrote;
  dict["problems"] = problems;
  return dict;
}

}  // namespace

void bind_checkpoint(nb::module_& m) {
  nb::class_<PyTensorInfo>(m, "TensorInfo", "A tensor of a checkpoint and where its bytes lie.")
      .def_prop_ro("name", [](const PyTensorInfo& tensor) { return tensor.info.name; })
      .def_prop_ro(
          "dtype", [](const PyTensorInfo& tensor) { return std::string(tensor.info.dtype_name()); },
          "As safetensors spells it: 'BF16', 'F8_E4M3', ...")
      .def_prop_ro("shape", &PyTensorInfo::shape, nb::sig("def shape(self) -> tuple[int, ...]"))
      .def_prop_ro(
          "file", [](const PyTensorInfo& tensor) { return file_text(tensor.file.native()); },
          "Absolute path.")
      .def_prop_ro(
          "offset", [](const PyTensorInfo& tensor) { return tensor.info.offset; },
          "Of its first byte in the file.")
      .def_prop_ro("bytes", [](const PyTensorInfo& tensor) { return tensor.info.bytes; });

  nb::class_<Catalogue>(m, "Catalogue", "The tensors of a checkpoint folder; reads headers only.")
      .def(nb::new_(&open_catalogue), nb::arg("folder"))
      .def_prop_ro("tensors", &tensors, "All of them, in the order of the files.")
      .def("find", &find, nb::arg("name"), "The tensor of that name, or None.");

  m.def("read_config", &read_config, nb::arg("folder"),
        nb::sig("def read_config(folder: str | os.PathLike) -> dict[str, typing.Any]"),
        "config.json of a checkpoint folder, validated, with the family's defaults filled in.");
  m.def("needed_shards", &needed_shards, nb::arg("folder"),
        nb::sig("def needed_shards(folder: str | os.PathLike) -> list[str] | None"),
        "Names of the shards that decoding needs, by the index and config.json alone; None where "
        "there is no index.");
  m.def("describe", &describe, nb::arg("folder"),
        nb::sig("def describe(folder: str | os.PathLike) -> dict[str, typing.Any]"),
        "What a checkpoint holds, by role, and the bytes that one decoded token reads.");
  m.def("verify", &verify, nb::arg("folder"), nb::arg("threads"), nb::arg("write"),
        nb::arg("progress").none(),
        nb::sig("def verify(folder: str | os.PathLike, threads: int, write: bool, progress: "
                "collections.abc.Callable[[int, int], object] | None) -> dict[str, typing.Any]"),
        "Reads every tensor: finite numbers, and the checksums of the sidecar if there is one.");
}

}  // namespace dsfp4::bindings
