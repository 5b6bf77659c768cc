// The rates of a machine and a disk, measured once and kept in a file.
//
// Text, replaced in one step. A file that is damaged, or of another machine, is as good as none.
// Nobody needs it: it may be deleted at any time.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "base/cgroups.h"
#include "base/poll.h"
#include "dsfp4/model.h"
#include "dsfp4/rates.h"
#include "engine/loader.h"
#include "engine/rates.h"
#include "model/spec.h"
#include "ops/ops.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// One line that names what rates depend on: the processor, the threads that compute, the GPU
/// (empty: none), the disk of `file`, and how that is read ("io_uring", "pread").
std::string machine_line(int threads, std::string_view gpu, const std::filesystem::path& file,
                         std::string_view reader, const SystemRoots& roots = {});

class KeptRates {
 public:
  /// For what `machine` names, in `folder`.
  KeptRates(const std::filesystem::path& folder, std::string machine);

  const std::filesystem::path& path() const noexcept { return path_; }
  /// Nothing if there is no such file, or none that can be used; the latter is logged.
  std::optional<Rates> load() const;
  /// Makes folders as needed. Throws IoError; the old file is then still there.
  void save(const Rates& rates) const;

 private:
  std::filesystem::path path_;
  std::string machine_;
};

/// Who computes a model.
struct Computers {
  const model::ModelSpec& spec;
  ops::Ops& ops;
  ops::Ops* host;  // the processor's, beside a GPU that does not hold everything
};

/// The rates for a model that is loaded but for its tiers: those that options.warm_start_folder
/// keeps; where it keeps none, measured ones, which it keeps from then on. None without a folder,
/// without tiers, or for a model too small to measure with. An error on the way is logged, and what
/// it left unknown is 0. Throws what `poll` throws.
Rates known_rates(const Computers& computers, const LoadedWeights& loaded,
                  const residency::Plan& plan, const LoadOptions& options, int threads,
                  const RateLimits& limits, const Poll& poll);

}  // namespace dsfp4::engine
