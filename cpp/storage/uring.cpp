#include "storage/uring.h"

#include <cerrno>
#include <string>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <system_error>
#include <unistd.h>
#include <vector>

#include "dsfp4/error.h"

namespace dsfp4::storage {
UnsupportedError uring_not_permitted(int error) {
  const char* why = error == ENOSYS  ? "the kernel does not have it, or a seccomp profile hides it"
                    : error == EPERM ? "a seccomp profile or kernel.io_uring_disabled forbids it"
                                     : "the system refused";
  return UnsupportedError("io_uring cannot be used here: " + std::string(why) + " (errno " +
                          std::to_string(error) + ": " + std::system_category().message(error) +
                          ")");
}

Wakeup::Wakeup() : event_(::eventfd(0, EFD_CLOEXEC)) {
  if (event_ < 0) throw uring_not_permitted(errno);
}

Wakeup::~Wakeup() { ::close(event_); }

void Wakeup::notify() noexcept {
  while (::eventfd_write(event_, 1) < 0 && errno == EINTR) {
  }
}

Uring::Uring(unsigned entries, const Wakeup& wakeup) : wakeup_(wakeup) {
  // Work of the kernel for this ring is done by its own thread, when that waits for completions;
  // kernels before 6.1 know less of this.
  constexpr unsigned kFlags[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                 IORING_SETUP_COOP_TASKRUN, 0};
  int error = -EINVAL;
  for (const unsigned flags : kFlags) {
    io_uring_params params{};
    params.flags = flags | IORING_SETUP_CLAMP;
    error = io_uring_queue_init_params(entries, &ring_, &params);
    if (error != -EINVAL) break;
  }
  if (error < 0) throw uring_not_permitted(-error);
  listen();
}

Uring::~Uring() { io_uring_queue_exit(&ring_); }

bool Uring::register_files(std::span<const int> descriptors) noexcept {
  if (descriptors.empty()) return false;
  return io_uring_register_files(&ring_, descriptors.data(),
                                 static_cast<unsigned>(descriptors.size())) == 0;
}

std::size_t Uring::register_buffers(std::byte* memory, std::uint64_t bytes, std::size_t count) {
  std::vector<iovec> buffers(count);
  for (std::size_t i = 0; i < count; ++i) buffers[i] = {memory + i * bytes, bytes};
  for (; count > 0; count /= 2) {
    if (io_uring_register_buffers(&ring_, buffers.data(), static_cast<unsigned>(count)) == 0) break;
  }
  return count;
}

io_uring_sqe* Uring::entry() noexcept {
  for (;;) {
    if (io_uring_sqe* entry = io_uring_get_sqe(&ring_)) return entry;
    io_uring_submit(&ring_);
  }
}

void Uring::listen() noexcept {
  io_uring_sqe* sqe = entry();
  io_uring_prep_read(sqe, wakeup_.descriptor(), &event_count_, sizeof(event_count_), 0);
  io_uring_sqe_set_data64(sqe, kWake);
}

void Uring::read(std::uint64_t id, const Read& read) noexcept {
  io_uring_sqe* sqe = entry();
  if (read.registered_buffer >= 0) {
    io_uring_prep_read_fixed(sqe, read.descriptor, read.to, read.bytes, read.offset,
                             read.registered_buffer);
  } else {
    io_uring_prep_read(sqe, read.descriptor, read.to, read.bytes, read.offset);
  }
  if (read.registered_file) io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
  io_uring_sqe_set_data64(sqe, id);
}

void Uring::cancel(std::uint64_t id) noexcept {
  io_uring_sqe* sqe = entry();
  io_uring_prep_cancel64(sqe, id, 0);
  io_uring_sqe_set_data64(sqe, kIgnored);
}

void Uring::wait(std::optional<Clock::duration> most) noexcept {
  io_uring_cqe* entry = nullptr;
  if (most) {
    const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(*most).count();
    __kernel_timespec time{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
    io_uring_submit_and_wait_timeout(&ring_, &entry, 1, &time, nullptr);
  } else {
    io_uring_submit_and_wait(&ring_, 1);
  }
}

}  // namespace dsfp4::storage
