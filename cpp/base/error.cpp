#include "dsfp4/error.h"

#include <system_error>
#include <utility>

#include "base/units.h"

namespace dsfp4 {
namespace {

std::string checkpoint_message(const std::string& file, const std::string& tensor,
                               std::int64_t offset, const std::string& problem) {
  std::string message = file;
  if (!tensor.empty()) message += ": '" + tensor + "'";
  if (offset >= 0) message += " at byte " + std::to_string(offset);
  return message + ": " + problem;
}

std::string io_message(const std::string& file, std::int64_t offset, int error_number,
                       const std::string& problem) {
  std::string message = file;
  if (offset >= 0) message += " at byte " + std::to_string(offset);
  message += ": " + problem;
  if (error_number != 0) {
    message += " (errno " + std::to_string(error_number) + ": " +
               std::system_category().message(error_number) + ")";
  }
  return message;
}

}  // namespace

CheckpointError::CheckpointError(std::string file, std::string tensor, std::int64_t offset,
                                 const std::string& problem)
    : Error(checkpoint_message(file, tensor, offset, problem)),
      file_(std::move(file)),
      tensor_(std::move(tensor)),
      offset_(offset) {}

IoError::IoError(std::string file, std::int64_t offset, int error_number,
                 const std::string& problem)
    : Error(io_message(file, offset, error_number, problem)),
      file_(std::move(file)),
      offset_(offset),
      error_number_(error_number) {}

ParameterError::ParameterError(std::string parameter, const std::string& problem)
    : Error("parameter '" + parameter + "': " + problem), parameter_(std::move(parameter)) {}

ContextLengthError::ContextLengthError(std::int64_t requested, std::int64_t limit)
    : Error("the sequence needs " + std::to_string(requested) +
            " tokens and the context limit is " + std::to_string(limit) +
            "; shorten the prompt, lower max_tokens or raise max_context"),
      requested_(requested),
      limit_(limit) {}

MemoryLimitError::MemoryLimitError(const std::string& purpose, std::uint64_t needed,
                                   std::uint64_t available, const std::string& advice,
                                   const char* memory)
    : Error(purpose + " need " + gigabytes(needed) + " of " + memory + " and " +
            gigabytes(available) + " are available" + (advice.empty() ? "" : "; " + advice)),
      needed_(needed),
      available_(available) {}

CancelledError::CancelledError() : Error("the call was cancelled") {}

CudaError::CudaError(const std::string& problem, int code, std::string call, std::string source,
                     int line)
    : Error(call.empty()
                ? problem
                : call + " failed at " + source + ":" + std::to_string(line) + ": " + problem),
      code_(code),
      call_(std::move(call)),
      source_(std::move(source)),
      line_(line) {}

}  // namespace dsfp4
