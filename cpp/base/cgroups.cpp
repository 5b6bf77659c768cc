#include "base/cgroups.h"

#include <algorithm>
#include <string>

#include "base/files.h"

namespace dsfp4 {
namespace {

// Names are separated by commas.
bool is_among(std::string_view name, std::string_view names) {
  while (!names.empty()) {
    const std::string_view one = names.substr(0, names.find(','));
    if (one == name) return true;
    names.remove_prefix(std::min(one.size() + 1, names.size()));
  }
  return false;
}

// This process's path in a hierarchy; empty if /proc names none. A line is "4:cpu,cpuacct:/path";
// that of version 2 names no controller.
std::string own_path(const SystemRoots& roots, std::string_view controller) {
  const std::string whole = read_whole_file(roots.proc / "self/cgroup");
  const std::string_view text = whole;
  for (std::size_t at = 0, end = 0; at < text.size(); at = end + 1) {
    end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, end - at);
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string_view names = line.substr(first + 1, second - first - 1);
    if (controller.empty() ? names.empty() : is_among(controller, names)) {
      return std::string(line.substr(second + 1));
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
