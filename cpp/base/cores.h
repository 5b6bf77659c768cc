// The processors that this process may use, and how many threads are worth starting on them.
#pragma once

#include <limits>
#include <string_view>
#include <vector>

#include "base/cgroups.h"

namespace dsfp4 {

/// The processors by the affinity mask, /sys and the control groups.
struct Cores {
  /// The logical processors of the affinity mask, one for each physical core: the lowest-numbered
  /// of its SMT siblings. In ascending order; empty if the system does not say.
  std::vector<int> physical;
  /// The mask leaves out no processor that is online.
  bool all = false;
  /// Processors that the control groups let this process use on average (`docker run --cpus`);
  /// infinite if they set no limit. The smallest number of all groups above counts.
  double quota = std::numeric_limits<double>::infinity();

  /// Threads to start by default, at least 1: the physical cores, or the quota if that is less.
  /// A quota of 2.5 gives 3, as 2 threads would leave a fifth of it unused.
  int threads() const;
  /// Threads that may spin while they wait: as threads(), but a quota of 2.5 gives 2, as spinning
  /// uses it up.
  int spinners() const;
};

Cores find_cores(const SystemRoots& roots = {});

/// find_cores().threads().
int available_cores();

inline constexpr std::string_view kPinMark = "dsfp4-uses-the-cores";

/// A mark, seen by all processes of this network namespace, that this one uses the cores. One
/// process at a time has it; the kernel takes it back when that process ends.
class PinMark {
 public:
  enum class State {
    kOurs,
    kTaken,    // by another process, or by another mark of this one
    kUnknown,  // the system has no such marks for us
  };

  /// `name`: at most 100 characters; processes that share the cores use the same.
  explicit PinMark(std::string_view name) noexcept;
  ~PinMark();
  PinMark(const PinMark&) = delete;
  PinMark& operator=(const PinMark&) = delete;

  State state() const noexcept { return state_; }

 private:
  int socket_ = -1;
  State state_ = State::kUnknown;
};

}  // namespace dsfp4
