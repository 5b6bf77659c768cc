#include "storage/reader.h"

#include <cerrno>
#include <string>
#include <system_error>

#include "base/log.h"
#include "dsfp4/error.h"
#include "storage/engines.h"
#include "storage/request_queue.h"
#include "storage/uring.h"

namespace dsfp4::storage {

void ReadResult::throw_if_failed() const {
  if (status == ReadStatus::kFailed) throw IoError(file, offset, error_number, problem);
}

ReadStatus ReadTicket::status() const noexcept { return state_->status.load(); }
bool ReadTicket::quiet() const noexcept { return state_ == nullptr || state_->quiet.load(); }
std::uint64_t ReadTicket::bytes_done() const noexcept { return state_->bytes_done.load(); }

ReadResult Reader::wait(const ReadTicket& ticket, const Poll& poll) {
  if (poll) {
    do poll();
    while (!wait_for(ticket, kPollPeriod));
  }
  return wait(ticket);
}

void Reader::read(std::span<const Extent> extents, std::shared_ptr<void> owner,
                  const ReadProgress& progress, const Poll& poll) {
  const bool owned = owner != nullptr;
  ReadRequest request;
  request.extents.assign(extents.begin(), extents.end());
  request.owner = std::move(owner);
  const ReadTicket ticket = submit(std::move(request));
  std::uint64_t told = 0;
  const auto tell = [&] {
    const std::uint64_t done = ticket.bytes_done();
    if (progress && done > told) progress(told = done);
  };
  ReadResult result;
  try {
    result = wait(ticket, [&] {
      if (poll) poll();
      tell();
    });
    tell();
  } catch (...) {
    cancel(ticket);
    if (!owned) wait(ticket);
    throw;
  }
  result.throw_if_failed();
}

std::string uring_problem() {
  try {
    const Wakeup wakeup;
    const Uring ring(1, wakeup);
  } catch (const UnsupportedError& error) {
    return error.what();
  }
  return {};
}

std::unique_ptr<Reader> make_reader(const std::vector<std::filesystem::path>& files,
                                    const ReaderOptions& given) {
  ReaderOptions options = given;
  if (!options.log) options.log = [](std::string_view line) { log(LogLevel::kWarning, line); };
  if (options.kind == ReaderKind::kPread) return make_pread_reader(files, options);
  try {
    return make_uring_reader(files, options);
  } catch (const UnsupportedError& error) {
    if (options.kind == ReaderKind::kUring) throw;
    if (options.log) {
      options.log(std::string(error.what()) + "; reading with " + std::to_string(options.depth) +
                  " threads instead, which costs the processor more");
    }
  }
  return make_pread_reader(files, options);
}

}  // namespace dsfp4::storage
