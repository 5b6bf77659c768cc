// The number formats on arrays. dsfp4.ops.formats is their face: it checks and gives shapes.
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/stl/string.h>

#include "base/checked.h"
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "dsfp4/error.h"
#include "format/block.h"
#include "format/scalar.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;
using format::EncodedMatrix;
using format::WeightFormat;
using Floats = ConstArray<float>;
using Bytes = ConstArray<std::uint8_t>;

// out[i] = code(in[i]), flat.
template <typename To, typename From>
nb::object each(const ConstArray<From>& in, To (*code)(From)) {
  std::vector<To> out(in.size());
  {
    const ReleasedGil released;
    const From* from = in.data();
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = code(from[i]);
  }
  return own_array(std::move(out), {in.size()});
}

template <auto code, typename From>
void def_each(nb::module_& m, const char* name) {
  m.def(name, [](const ConstArray<From>& in) { return each(in, code); }, nb::arg("values"));
}

WeightFormat block_format(const std::string& name) {
  for (const WeightFormat candidate :
       {WeightFormat::kFp8Block, WeightFormat::kNvfp4, WeightFormat::kMxfp4}) {
    if (format::weight_format_name(candidate) == name) return candidate;
  }
  throw ParameterError("format", "'" + name + "' is not one of fp8, nvfp4, mxfp4");
}

EncodedMatrix encode_as(WeightFormat format, std::span<const float> values, std::int64_t rows,
                        std::int64_t cols, float global_scale) {
  if (format == WeightFormat::kNvfp4) {
    return format::encode_nvfp4(values, rows, cols, global_scale);
  }
  if (format == WeightFormat::kMxfp4) return format::encode_mxfp4(values, rows, cols);
  return format::encode_fp8_block(values, rows, cols);
}

nb::tuple encode(const std::string& format, const Floats& x, float global_scale) {
  const WeightFormat encoding = block_format(format);
  if (x.ndim() != 2) throw ParameterError("x", "must be two-dimensional");
  const auto rows = static_cast<std::int64_t>(x.shape(0));
  const auto cols = static_cast<std::int64_t>(x.shape(1));
  EncodedMatrix matrix;
  {
    const ReleasedGil released;
    matrix = encode_as(encoding, {x.data(), x.size()}, rows, cols, global_scale);
  }
  const std::size_t data_bytes = matrix.data.size();
  const std::size_t scale_bytes = matrix.scales.size();
  return nb::make_tuple(own_array(std::move(matrix.data), {data_bytes}),
                        own_array(std::move(matrix.scales), {scale_bytes}));
}

nb::object decode(const std::string& format, std::int64_t rows, std::int64_t cols,
                  const Bytes& data, const Bytes& scales, float global_scale) {
  const WeightFormat encoding = block_format(format);
  const std::int64_t group = encoding == WeightFormat::kNvfp4   ? format::kNvfp4Group
                             : encoding == WeightFormat::kMxfp4 ? format::kMxfp4Group
                                                                : 1;
  if (rows < 0 || cols < 0 || cols % group != 0 || !checked_mul(rows, cols)) {
    throw ParameterError("cols", std::to_string(cols) + " columns in " + std::to_string(rows) +
                                     " rows are not a " + format + " matrix");
  }
  if (data.size() != format::data_bytes(encoding, rows, cols)) {
    throw ParameterError("data", "has not the size of a " + format + " matrix of this shape");
  }
  if (scales.size() != format::scale_bytes(encoding, rows, cols)) {
    throw ParameterError("scales", "have not the size of a " + format + " matrix of this shape");
  }
  std::vector<float> values;
  {
    const ReleasedGil released;
    values = format::decode({encoding, rows, cols, reinterpret_cast<const std::byte*>(data.data()),
                             reinterpret_cast<const std::byte*>(scales.data()), global_scale});
  }
  return own_array(std::move(values),
                   {static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)});
}

}  // namespace

void bind_format(nb::module_& m) {
  def_each<&format::e2m1_to_float, std::uint8_t>(m, "decode_e2m1");
  def_each<&format::float_to_e2m1, float>(m, "encode_e2m1");
  def_each<&format::e4m3_to_float, std::uint8_t>(m, "decode_e4m3");
  def_each<&format::float_to_e4m3, float>(m, "encode_e4m3");
  def_each<&format::e8m0_to_float, std::uint8_t>(m, "decode_e8m0");
  def_each<&format::mx_scale_code, float>(m, "mx_scale_code");
  def_each<&format::bf16_to_float, std::uint16_t>(m, "decode_bf16");
  def_each<&format::float_to_bf16, float>(m, "encode_bf16");
  m.def("nvfp4_global_scale", &format::nvfp4_global_scale, nb::arg("amax"));
  m.def("encode_blocks", &encode, nb::arg("format"), nb::arg("x"), nb::arg("global_scale") = 1.0f,
        "(data, scales) as flat bytes; format is 'nvfp4', 'mxfp4' or 'fp8'.");
  m.def("decode_blocks", &decode, nb::arg("format"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("data"), nb::arg("scales"), nb::arg("global_scale") = 1.0f,
        "float32 [rows, cols] of the flat bytes that encode_blocks gives.");
}

}  // namespace dsfp4::bindings
