// Which processors there are, from the affinity mask and /sys.
#include <charconv>
#include <sched.h>
#include <string>
#include <thread>

#include "base/files.h"
#include "base/thread_pool.h"

namespace dsfp4 {
namespace {

// The lowest-numbered SMT sibling of a processor that the mask allows too; itself if /sys does not
// say. The list reads like "0,64" or "0-1".
int first_sibling(int cpu, const cpu_set_t& allowed) {
  const std::string list = read_whole_file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                           "/topology/thread_siblings_list");
  const char* at = list.data();
  const char* end = at + list.size();
  const auto number = [&](int& value) {
    const auto [after, error] = std::from_chars(at, end, value);
    at = after;
    return error == std::errc();
  };
  for (int first = 0; number(first);) {
    int last = first;
    if (at < end && *at == '-') {
      ++at;
      if (!number(last)) break;
    }
    for (int i = first; i <= last && i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &allowed)) return i;
    }
    if (at == end || *at != ',') break;
    ++at;
  }
  return cpu;
}

}  // namespace

std::vector<int> physical_cores() {
  std::vector<int> cores;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    // More processors than the mask has room for: count them, but pin to none.
    return cores;
  }
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && first_sibling(cpu, allowed) == cpu) cores.push_back(cpu);
  }
  return cores;
}

}  // namespace dsfp4
