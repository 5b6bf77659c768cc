#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "base/checked.h"
#include "checkpoint/absence.h"
#include "checkpoint/json.h"
#include "checkpoint/name_order.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kMaxRank = 32;
constexpr std::size_t kMaxMetadataKeys = std::size_t{1} << 16;
// The text of the shortest entry: "":{"dtype":"U8","shape":[],"data_offsets":[0,0]},
constexpr std::size_t kMinEntryBytes = 50;

// Writes the entries of a header straight into TensorInfos.
class HeaderHandler : public JsonHandler {
 public:
  HeaderHandler(const InputFile& file, std::uint32_t file_number, std::uint64_t data_begin,
                std::vector<TensorInfo>& tensors)
      : file_(file),
        file_number_(file_number),
        data_begin_(data_begin),
        tensors_(tensors),
        first_(tensors.size()) {}

  // An exact reservation, as growing by doubling would take twice the memory; not so small a step
  // that many small files make it quadratic.
  void begin_document(const JsonOutline& outline) override {
    const std::size_t possible = outline.bytes / kMinEntryBytes + 1;
    const std::size_t needed = first_ + std::min(outline.objects, possible);
    if (needed > tensors_.capacity()) {
      tensors_.reserve(std::max(needed, tensors_.capacity() + tensors_.capacity() / 4));
    }
  }

  void begin_object(std::size_t at) override {
    if (place_ == Place::kOutside) {
      place_ = Place::kRoot;
    } else if (place_ == Place::kRoot && key_ == "__metadata__") {
      if (metadata_seen_) fail(key_, at, "this key is there twice");
      metadata_seen_ = true;
      place_ = Place::kMetadata;
    } else if (place_ == Place::kRoot) {
      place_ = Place::kTensor;
      tensors_.emplace_back();
      tensors_.back().name = key_;
      tensors_.back().file = file_number_;
      key_at_.push_back(static_cast<std::uint32_t>(root_key_at_));
      field_ = Field::kNone;
      fields_seen_ = 0;
    } else {
      refuse(at, "an object");
    }
  }

  void key(std::string_view name, std::size_t at) override {
    if (place_ == Place::kTensor) {
      begin_field(name, at);
      return;
    }
    if (place_ == Place::kMetadata) {
      if (metadata_.size() == kMaxMetadataKeys) {
        fail("__metadata__", at,
             "has too many keys; the limit is " + std::to_string(kMaxMetadataKeys));
      }
      metadata_.push_back({std::string(name), at});
      return;
    }
    key_ = name;
    root_key_at_ = at;
  }

  void end_object(std::size_t at) override {
    if (place_ == Place::kTensor) {
      end_tensor(at);
      place_ = Place::kRoot;
    } else if (place_ == Place::kMetadata) {
      end_metadata();
      place_ = Place::kRoot;
    } else {
      place_ = Place::kOutside;
    }
  }

  void begin_array(std::size_t at) override {
    if (place_ != Place::kTensor || (field_ != Field::kShape && field_ != Field::kOffsets)) {
      refuse(at, "a list");
    }
    place_ = Place::kList;
    count_ = 0;
  }

  void end_array(std::size_t at) override {
    TensorInfo& tensor = tensors_.back();
    if (field_ == Field::kShape) {
      tensor.shape.assign(numbers_.begin(), numbers_.begin() + static_cast<std::ptrdiff_t>(count_));
    } else {
      if (count_ != 2) fail(tensor.name, at, "data_offsets must be two numbers");
      begin_ = static_cast<std::uint64_t>(numbers_[0]);
      end_ = static_cast<std::uint64_t>(numbers_[1]);
    }
    place_ = Place::kTensor;
    field_ = Field::kNone;
  }

  void scalar(const JsonScalar& value, std::size_t at) override {
    const auto* text = std::get_if<std::string_view>(&value);
    if (place_ == Place::kMetadata) {
      if (text == nullptr) fail("__metadata__", at, "its values must be strings");
    } else if (place_ == Place::kList) {
      add_number(value, at);
    } else if (place_ == Place::kTensor && field_ == Field::kDtype && text != nullptr) {
      set_dtype(*text, at);
    } else {
      refuse(at, "this value");
    }
  }

  /// Byte offset of the name of the `i`-th tensor that was appended.
  std::int64_t key_at(std::size_t i) const { return key_at_[i]; }
  std::size_t first() const { return first_; }

 private:
  enum class Place { kOutside, kRoot, kMetadata, kTensor, kList };
  enum class Field { kNone, kDtype, kShape, kOffsets };

  struct MetadataKey {
    std::string name;
    std::size_t at = 0;
  };

  [[noreturn]] void fail(const std::string& tensor, std::size_t at,
                         const std::string& problem) const {
    throw CheckpointError(file_.name(), tensor, static_cast<std::int64_t>(at), problem);
  }

  [[noreturn]] void refuse(std::size_t at, const std::string& what) const {
    const bool in_tensor = place_ == Place::kTensor || place_ == Place::kList;
    fail(in_tensor ? tensors_.back().name : key_, at,
         what +
             " has no place here: a tensor's entry is {\"dtype\": string, \"shape\": numbers, "
             "\"data_offsets\": two numbers}");
  }

  void end_metadata() {
    const NameOrder names = order_names(
        metadata_.size(), [&](std::size_t i) -> const std::string& { return metadata_[i].name; });
    if (names.twice) {
      const MetadataKey& second = metadata_[names.order[*names.twice + 1]];
      fail("__metadata__", second.at, "'" + second.name + "' is there twice");
    }
    metadata_ = {};
  }

  void begin_field(std::string_view name, std::size_t at) {
    constexpr std::array<std::string_view, 3> kNames = {"dtype", "shape", "data_offsets"};
    const auto* found = std::find(kNames.begin(), kNames.end(), name);
    const std::string& tensor = tensors_.back().name;
    if (found == kNames.end()) fail(tensor, at, "has an unknown field '" + std::string(name) + "'");
    const auto index = static_cast<unsigned>(found - kNames.begin());
    if ((fields_seen_ & (1u << index)) != 0)
      fail(tensor, at, "has '" + std::string(name) + "' twice");
    fields_seen_ |= 1u << index;
    field_ = static_cast<Field>(index + 1);
  }

  void add_number(const JsonScalar& value, std::size_t at) {
    const auto* number = std::get_if<std::int64_t>(&value);
    const char* field = field_ == Field::kShape ? "shape" : "data_offsets";
    if (number == nullptr || *number < 0) {
      fail(tensors_.back().name, at,
           std::string(field) + " must hold integers from 0 to 9223372036854775807");
    }
    if (count_ == numbers_.size()) {
      fail(tensors_.back().name, at,
           std::string(field) + " has more than " + std::to_string(kMaxRank) + " numbers");
    }
    numbers_[count_++] = *number;
  }

  void set_dtype(std::string_view name, std::size_t at) {
    TensorInfo& tensor = tensors_.back();
    tensor.dtype = format::parse_dtype(name).value_or(format::DType::kOther);
    if (name.size() > kMaxDtypeName) {
      fail(tensor.name, at,
           "has a dtype whose name has " + std::to_string(name.size()) +
               " characters; the limit is " + std::to_string(kMaxDtypeName));
    }
    if (tensor.dtype == format::DType::kOther) std::ranges::copy(name, tensor.other_dtype.begin());
    field_ = Field::kNone;
  }

  void end_tensor(std::size_t at) {
    TensorInfo& tensor = tensors_.back();
    if (fields_seen_ != 0b111) fail(tensor.name, at, "needs dtype, shape and data_offsets");
    const std::size_t name_at = key_at_.back();
    std::optional<std::uint64_t> bytes = format::dtype_size(tensor.dtype);
    for (const std::int64_t dimension : tensor.shape) {
      if (bytes) bytes = checked_mul(*bytes, static_cast<std::uint64_t>(dimension));
    }
    if (!bytes) fail(tensor.name, name_at, "its shape is too large: the product overflows");
    const auto range = [&] {
      return "data_offsets [" + std::to_string(begin_) + ", " + std::to_string(end_) + "]";
    };
    if (begin_ > end_) fail(tensor.name, name_at, range() + " run backwards");
    // How many bytes a value of an unknown type takes is not known.
    if (tensor.dtype == format::DType::kOther) bytes = end_ - begin_;
    if (end_ - begin_ != *bytes) {
      fail(tensor.name, name_at,
           range() + " hold " + std::to_string(end_ - begin_) + " bytes; " +
               std::string(tensor.dtype_name()) + " " + shape_text(tensor.shape) + " takes " +
               std::to_string(*bytes));
    }
    const std::uint64_t data_bytes = file_.size() - data_begin_;
    if (end_ > data_bytes) {
      fail(tensor.name, name_at,
           range() + " go beyond the file's " + std::to_string(data_bytes) +
               " bytes of data: the file is truncated, download it again");
    }
    tensor.offset = data_begin_ + begin_;
    tensor.bytes = *bytes;
  }

  const InputFile& file_;
  std::uint32_t file_number_;
  std::uint64_t data_begin_;
  std::vector<TensorInfo>& tensors_;
  std::size_t first_;
  std::vector<std::uint32_t> key_at_;

  Place place_ = Place::kOutside;
  std::string key_;
  std::size_t root_key_at_ = 0;
  bool metadata_seen_ = false;
  std::vector<MetadataKey> metadata_;
  Field field_ = Field::kNone;
  unsigned fields_seen_ = 0;  // one bit a field
  std::array<std::int64_t, kMaxRank> numbers_{};
  std::size_t count_ = 0;
  std::uint64_t begin_ = 0;
  std::uint64_t end_ = 0;
};

NameOrder check_names(const InputFile& file, const HeaderHandler& header,
                      std::span<const TensorInfo> tensors) {
  NameOrder names = order_names(
      tensors.size(), [&](std::size_t i) -> const std::string& { return tensors[i].name; });
  if (!names.twice) return names;
  const std::uint32_t second = names.order[*names.twice + 1];
  throw CheckpointError(file.name(), tensors[second].name, header.key_at(second),
                        "this tensor is there twice in the header");
}

// The tensors, in the order of their offsets, must follow each other without overlap or hole.
void check_coverage(const InputFile& file, const HeaderHandler& header, std::uint64_t data_begin,
                    std::span<const TensorInfo> tensors) {
  struct Extent {
    std::uint64_t offset, bytes;
    std::uint32_t tensor;
    auto operator<=>(const Extent&) const = default;
  };
  std::vector<Extent> extents;
  extents.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) {
    extents.push_back(
        {tensor.offset, tensor.bytes, static_cast<std::uint32_t>(&tensor - tensors.data())});
  }
  if (!std::is_sorted(extents.begin(), extents.end())) std::sort(extents.begin(), extents.end());
  std::uint64_t covered = data_begin;
  const TensorInfo* previous = nullptr;
  for (const Extent& extent : extents) {
    const std::uint32_t i = extent.tensor;
    const TensorInfo& tensor = tensors[i];
    if (previous != nullptr && tensor.offset < covered) {
      throw CheckpointError(file.name(), tensor.name, header.key_at(i),
                            "its data overlaps that of '" + previous->name + "'");
    }
    if (tensor.offset > covered) {
      throw CheckpointError(file.name(), tensor.name, header.key_at(i),
                            "its data begins " + std::to_string(tensor.offset - covered) +
                                " bytes after " +
                                (previous ? "that of '" + previous->name + "'" : "the header") +
                                " ends: no tensor covers this hole");
    }
    covered = tensor.offset + tensor.bytes;
    previous = &tensor;
  }
  if (covered != file.size()) {
    throw CheckpointError(
        file.name(), "", static_cast<std::int64_t>(covered),
        std::to_string(file.size() - covered) + " trailing bytes belong to no tensor");
  }
}

void check_no_lfs_pointer(const InputFile& file) {
  if (file.size() > kMostLfsPointer) return;
  const std::string pointer = describe_lfs_pointer(file.read(0, file.size()), file.size());
  if (!pointer.empty()) throw CheckpointError(file.name(), "", -1, pointer);
}

std::uint64_t read_header_length(const InputFile& file) {
  check_no_lfs_pointer(file);
  if (file.size() < kLengthBytes) {
    throw CheckpointError(file.name(), "", 0,
                          "has " + std::to_string(file.size()) +
                              " bytes, too few for a safetensors header: the file is truncated");
  }
  const std::string prefix = file.read(0, kLengthBytes);
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | static_cast<unsigned char>(prefix[i]);
  }
  if (length > kMaxHeaderBytes) {
    throw CheckpointError(file.name(), "", 0,
                          "gives a header of " + std::to_string(length) + " bytes; the limit is " +
                              std::to_string(kMaxHeaderBytes));
  }
  if (length > file.size() - kLengthBytes) {
    throw CheckpointError(file.name(), "", 0,
                          "gives a header of " + std::to_string(length) + " bytes, but only " +
                              std::to_string(file.size() - kLengthBytes) +
                              " follow: the file is truncated");
  }
  return length;
}

}  // namespace

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

void read_safetensors_header(const InputFile& file, std::uint32_t file_number,
                             std::vector<TensorInfo>& tensors,
                             std::vector<std::uint32_t>& by_name) {
  const std::uint64_t length = read_header_length(file);
  const std::uint64_t data_begin = kLengthBytes + length;
  HeaderHandler handler(file, file_number, data_begin, tensors);
  {
    const std::string text = file.read(kLengthBytes, length);
    if (text.empty() || text.front() != '{') {
      throw CheckpointError(file.name(), "", kLengthBytes, "the header must begin with '{'");
    }
    parse_json(text, file.name(), kLengthBytes, handler);
  }
  const std::span<const TensorInfo> added = std::span(tensors).subspan(handler.first());
  const NameOrder names = check_names(file, handler, added);
  check_coverage(file, handler, data_begin, added);
  for (const std::uint32_t i : names.order) {
    by_name.push_back(static_cast<std::uint32_t>(handler.first()) + i);
  }
}

}  // namespace dsfp4::checkpoint
