#include "base/trace.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <unistd.h>

#include "base/log.h"
#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

constexpr std::size_t kWriteBytes = std::size_t{256} << 10;
constexpr std::string_view kTrackNames[] = {"steps", "CPU", "waits", "SSD", "PCIe", "GPU"};

}  // namespace

Trace::Trace(const std::filesystem::path& path)
    : descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
  if (descriptor_ < 0) throw IoError(path.string(), -1, errno, "the trace cannot be written");
  text_ = R"([{"ph":"M","pid":1,"name":"process_name","args":{"name":"dsfp4"}})";
  for (std::size_t track = 0; track < std::size(kTrackNames); ++track) {
    text_.append(",\n{\"ph\":\"M\",\"pid\":1,\"tid\":").append(std::to_string(track));
    text_.append(R"(,"name":"thread_name","args":{"name":")").append(kTrackNames[track]);
    text_.append("\"}}");
  }
}

Trace::~Trace() {
  const std::lock_guard lock(mutex_);
  write();
  text_ = "\n]\n";
  write();
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::int64_t Trace::microseconds(Clock::time_point time) const {
  return std::chrono::duration_cast<std::chrono::microseconds>(time - begin_).count();
}

void Trace::span(Track track, std::string_view name, Clock::time_point start, Clock::time_point end,
                 std::uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  if (descriptor_ < 0) return;
  const std::size_t whole = text_.size();
  try {
    add(track, name, start, end, bytes);
  } catch (...) {  // no memory: this span is left out
    text_.resize(whole);
  }
  if (text_.size() >= kWriteBytes) write();
}

void Trace::add(Track track, std::string_view name, Clock::time_point start, Clock::time_point end,
                std::uint64_t bytes) {
  const long long from = microseconds(start);
  const long long to = std::max<long long>(from, microseconds(end));
  const auto event = [&](char phase, long long time, const std::string& rest) {
    char text[96];
    std::snprintf(text, sizeof(text), ",\n{\"ph\":\"%c\",\"pid\":1,\"tid\":%d,\"ts\":%lld,", phase,
                  static_cast<int>(track), time);
    text_.append(text).append("\"name\":\"").append(name).append("\"").append(rest).append("}");
  };
  std::string arguments;
  if (bytes > 0)
    arguments.append(",\"args\":{\"bytes\":").append(std::to_string(bytes)).append("}");
  if (track != Track::kReads) {
    event('X', from, ",\"dur\":" + std::to_string(to - from) + arguments);
    return;
  }
  const std::string id = ",\"cat\":\"read\",\"id\":" + std::to_string(++reads_);
  event('b', from, id + arguments);
  event('e', to, id);
}

void Trace::write() noexcept {
  std::string_view left = text_;
  while (descriptor_ >= 0 && !left.empty()) {
    const ssize_t count = ::pwrite(descriptor_, left.data(), left.size(), written_);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      log(LogLevel::kWarning, errno == ENOSPC ? "the disk is full: the trace ends here"
                                              : "its file cannot be written: the trace ends here");
      ::close(descriptor_);
      descriptor_ = -1;
      break;
    }
    written_ += count;
    left.remove_prefix(static_cast<std::size_t>(count));
  }
  text_.clear();
}

}  // namespace dsfp4
