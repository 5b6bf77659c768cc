#include "ops/cpu/tiles.h"

#include <cerrno>
#include <cpuid.h>
#include <cstring>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"

namespace dsfp4::ops::cpu {
namespace {

bool cpu_has_amx_bf16() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22;
  constexpr unsigned kTile = 1u << 24;
  return (edx & kBf16) != 0 && (edx & kTile) != 0;
}

// Linux saves the tiles' 8 KiB only for processes that have asked for it.
bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return true;
  log(LogLevel::kWarning, std::string("the CPU has AMX, but the system does not allow its use (") +
                              std::strerror(errno) + "); prefill uses AVX-512 instead");
  return false;
}

}  // namespace

bool amx_usable() {
  static const bool usable = cpu_has_amx_bf16() && ask_for_tiles();
  return usable;
}

}  // namespace dsfp4::ops::cpu
