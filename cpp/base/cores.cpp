#include "base/cores.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <sched.h>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <sys/un.h>
#include <thread>
#include <unistd.h>

#include "base/files.h"

namespace dsfp4 {
namespace {

// Calls `use` with each number of a list like "0,64" or "0-1"; false ends it.
template <typename Use>
void for_each_in_list(std::string_view list, const Use& use) {
  const char* at = list.data();
  const char* const end = at + list.size();
  const auto number = [&](int& value) {
    const auto [after, error] = std::from_chars(at, end, value);
    at = after;
    return error == std::errc();
  };
  for (int first = 0; number(first);) {
    int last = first;
    if (at < end && *at == '-') {
      ++at;
      if (!number(last)) return;
    }
    for (int i = first; i <= last && i < CPU_SETSIZE; ++i) {
      if (!use(i)) return;
    }
    if (at == end || *at != ',') return;
    ++at;
  }
}

// The lowest-numbered SMT sibling of a processor that the mask allows too; itself if /sys does not
// say.
int first_sibling(const SystemRoots& roots, int cpu, const cpu_set_t& allowed) {
  int sibling = cpu;
  for_each_in_list(read_whole_file(roots.sys / ("devices/system/cpu/cpu" + std::to_string(cpu)) /
                                   "topology/thread_siblings_list"),
                   [&](int i) {
                     if (!CPU_ISSET(i, &allowed)) return true;
                     sibling = i;
                     return false;
                   });
  return sibling;
}

bool covers_all(const SystemRoots& roots, const cpu_set_t& allowed) {
  bool known = false;
  bool all = true;
  for_each_in_list(read_whole_file(roots.sys / "devices/system/cpu/online"), [&](int i) {
    known = true;
    all = CPU_ISSET(i, &allowed);
    return all;
  });
  return known && all;
}

// The numbers in a file's first line, as many as there are in front of another word.
std::vector<double> numbers_in(const std::filesystem::path& file) {
  const std::string text = read_whole_file(file);
  std::vector<double> numbers;
  const char* at = text.data();
  const char* const end = at + text.size();
  for (long long value = 0; at < end; ++at) {
    const auto [after, error] = std::from_chars(at, end, value);
    if (error != std::errc()) break;
    numbers.push_back(static_cast<double>(value));
    at = after;
    if (at == end || *at != ' ') break;
  }
  return numbers;
}

double smallest_quota(const SystemRoots& roots) {
  double quota = std::numeric_limits<double>::infinity();
  const auto apply = [&](double microseconds, double period) {
    // Version 1 writes "none" as -1, version 2 as the word "max".
    if (microseconds > 0 && period > 0) quota = std::min(quota, microseconds / period);
  };
  for (const auto& group : control_groups(roots, "")) {
    const std::vector<double> max = numbers_in(group / "cpu.max");
    if (max.size() == 2) apply(max[0], max[1]);
  }
  for (const auto& group : control_groups(roots, "cpu")) {
    const std::vector<double> most = numbers_in(group / "cpu.cfs_quota_us");
    const std::vector<double> period = numbers_in(group / "cpu.cfs_period_us");
    if (!most.empty() && !period.empty()) apply(most[0], period[0]);
  }
  return quota;
}

// `cores`, or `quota` if that is less; at least 1.
int lesser(std::size_t cores, double quota) {
  if (cores == 0) cores = std::max(1U, std::thread::hardware_concurrency());
  return static_cast<int>(std::max(1.0, std::min(static_cast<double>(cores), quota)));
}

}  // namespace

int Cores::threads() const { return lesser(physical.size(), std::ceil(quota)); }
int Cores::spinners() const { return lesser(physical.size(), std::floor(quota)); }

Cores find_cores(const SystemRoots& roots) {
  Cores cores;
  cores.quota = smallest_quota(roots);
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    // More processors than the mask has room for: count them, but pin to none.
    return cores;
  }
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && first_sibling(roots, cpu, allowed) == cpu) {
      cores.physical.push_back(cpu);
    }
  }
  cores.all = covers_all(roots, allowed);
  return cores;
}

int available_cores() { return find_cores().threads(); }

// An abstract socket: a name that no file has, so there is nothing to clean up and no permission
// to lack. A child that was forked without exec keeps its copy: it, too, is another process.
PinMark::PinMark(std::string_view name) noexcept
    : socket_(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {
  sockaddr_un address{};
  if (socket_ < 0 || name.size() >= sizeof(address.sun_path)) return;
  address.sun_family = AF_UNIX;
  name.copy(address.sun_path + 1, name.size());  // after a zero: abstract
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  if (bind(socket_, reinterpret_cast<const sockaddr*>(&address), length) == 0) {
    state_ = State::kOurs;
  } else if (errno == EADDRINUSE) {
    state_ = State::kTaken;
  }
}

PinMark::~PinMark() {
  if (socket_ >= 0) close(socket_);
}

}  // namespace dsfp4
