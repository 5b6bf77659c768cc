// The control groups that limit this process.
#pragma once

#include <filesystem>
#include <string_view>
#include <vector>

namespace dsfp4 {

/// The folders in which the system describes itself. Tests have their own.
struct SystemRoots {
  std::filesystem::path proc = "/proc";
  std::filesystem::path sys = "/sys";
};

/// Folders of the groups that this process is in: its own first, then those above it up to the
/// root, which a container sees in place of its own. Version 1 of `controller` ("cpu", "memory"),
/// or version 2 if that is empty. A folder need not exist.
std::vector<std::filesystem::path> control_groups(const SystemRoots& roots,
                                                  std::string_view controller);

}  // namespace dsfp4
