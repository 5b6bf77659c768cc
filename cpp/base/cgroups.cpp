#include "base/cgroups.h"

#include <algorithm>
#include <string>

#include "base/files.h"

namespace dsfp4 {
namespace {

// This process's path in a hierarchy; empty if /proc names none. A line is "4:cpu,cpuacct:/path";
// that of version 2 names no controller.
std::string own_path(const SystemRoots& roots, std::string_view controller) {
  const std::string text = read_whole_file(roots.proc / "self/cgroup");
  const std::string wanted = controller.empty() ? ",," : "," + std::string(controller) + ",";
  for (std::size_t at = 0, end = 0; at < text.size(); at = end + 1) {
    end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controller.empty() ? names == wanted : names.find(wanted) != std::string::npos) {
      return line.substr(second + 1);
    }
  }
  return "";
}

}  // namespace

std::vector<std::filesystem::path> control_groups(const SystemRoots& roots,
                                                  std::string_view controller) {
  std::filesystem::path root = roots.sys / "fs/cgroup";
  if (!controller.empty()) root /= controller;
  std::vector<std::filesystem::path> groups;
  std::filesystem::path own =
      std::filesystem::path(own_path(roots, controller)).relative_path().lexically_normal();
  for (; !own.empty() && own != "."; own = own.parent_path()) groups.push_back(root / own);
  groups.push_back(root);
  return groups;
}

}  // namespace dsfp4
