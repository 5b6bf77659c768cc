#include "storage/system.h"

#include <cerrno>
#include <fcntl.h>
#include <unistd.h>
#include <utility>

namespace dsfp4::storage {

int System::open(const std::string& path, int flags) {
  for (;;) {
    const int descriptor = ::open(path.c_str(), flags);
    if (descriptor >= 0) return descriptor;
    if (errno != EINTR) return -errno;
  }
}

void System::close(int descriptor) noexcept { ::close(descriptor); }

int System::status(int descriptor, struct stat& status) {
  return ::fstat(descriptor, &status) == 0 ? 0 : -errno;
}

ssize_t System::pread(const ReadCall& call) {
  const ssize_t got =
      ::pread(call.descriptor, call.buffer, call.bytes, static_cast<off_t>(call.offset));
  return got >= 0 ? got : -errno;
}

std::thread System::start(std::function<void()> body) { return std::thread(std::move(body)); }

System& System::real() {
  static System system;
  return system;
}

}  // namespace dsfp4::storage
