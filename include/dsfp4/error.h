// The error family. Every exception that leaves dsfp4 is one of these types; what() is one sentence
// that names what is wrong and, where there is something to do about it, what to do. Each owns its
// text and facts, so it may be kept. File names are as the caller gave the folder; all text is
// UTF-8 as far as file names are.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dsfp4/api.h"

namespace dsfp4 {
inline namespace DSFP4_ABI_NAMESPACE {

/// Base of all errors thrown by the library.
class DSFP4_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file of a checkpoint is malformed, incomplete or contradicts another one.
class DSFP4_API CheckpointError : public Error {
 public:
  /// `tensor` is the tensor or field at fault, empty if none; `offset` is a byte offset in `file`,
  /// or -1 where no single byte is at fault.
  CheckpointError(std::string file, std::string tensor, std::int64_t offset,
                  const std::string& problem);

  const std::string& file() const noexcept { return file_; }
  const std::string& tensor() const noexcept { return tensor_; }
  std::int64_t offset() const noexcept { return offset_; }

 private:
  std::string file_;
  std::string tensor_;
  std::int64_t offset_;
};

/// The checkpoint is sound, but needs something that this version does not do.
class DSFP4_API UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// The operating system refused to read or write a file.
class DSFP4_API IoError : public Error {
 public:
  /// `error_number` is an errno value; `offset` is a byte offset in `file`, or -1.
  IoError(std::string file, std::int64_t offset, int error_number, const std::string& problem);

  const std::string& file() const noexcept { return file_; }
  std::int64_t offset() const noexcept { return offset_; }
  int error_number() const noexcept { return error_number_; }

 private:
  std::string file_;
  std::int64_t offset_;
  int error_number_;
};

/// An argument is outside its documented range.
class DSFP4_API ParameterError : public Error {
 public:
  ParameterError(std::string parameter, const std::string& problem);

  const std::string& parameter() const noexcept { return parameter_; }

 private:
  std::string parameter_;
};

/// A sequence would grow beyond the context limit of the loaded model.
class DSFP4_API ContextLengthError : public Error {
 public:
  /// Both in tokens.
  ContextLengthError(std::int64_t requested, std::int64_t limit);

  std::int64_t requested() const noexcept { return requested_; }
  std::int64_t limit() const noexcept { return limit_; }

 private:
  std::int64_t requested_;
  std::int64_t limit_;
};

/// Memory that is needed is not there, or not within the limit that was given.
class DSFP4_API MemoryLimitError : public Error {
 public:
  /// `purpose` is what the memory is for ("the weights"); both numbers are in bytes; `advice` is
  /// what to do about it, where that is known; `memory` is "RAM" or "VRAM".
  MemoryLimitError(const std::string& purpose, std::uint64_t needed, std::uint64_t available,
                   const std::string& advice = "", const char* memory = "RAM");

  std::uint64_t needed() const noexcept { return needed_; }
  std::uint64_t available() const noexcept { return available_; }

 private:
  std::uint64_t needed_;
  std::uint64_t available_;
};

/// The call was left because its keep_going (model.h) said so.
class DSFP4_API CancelledError : public Error {
 public:
  CancelledError();
};

/// The GPU, its driver or the CUDA backend's library refused a call or cannot be used.
class DSFP4_API CudaError : public Error {
 public:
  /// `code` is a cudaError_t, 0 where no call failed (no driver, no plugin); then `call` and
  /// `source` are empty.
  explicit CudaError(const std::string& problem, int code = 0, std::string call = "",
                     std::string source = "", int line = 0);

  int code() const noexcept { return code_; }
  const std::string& call() const noexcept { return call_; }
  const std::string& source() const noexcept { return source_; }
  int line() const noexcept { return line_; }

 private:
  int code_;
  std::string call_;
  std::string source_;
  int line_;
};

}  // namespace DSFP4_ABI_NAMESPACE
}  // namespace dsfp4
