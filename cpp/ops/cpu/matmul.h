// Matrix products of the CPU backend: what one thread does with a block of rows. One table of
// functions for each arithmetic; isa.h says which of them an instruction set uses.
//
// An arithmetic fixes how activations are packed (once for each product, into a layout that suits
// the decoder of the weights) and the order of every sum: lanes run along the columns, one
// accumulator for each (row, token) walks the columns in order, and its lanes are added in a fixed
// tree. So the result of a token depends neither on its company nor on the split into blocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/weight.h"

namespace dsfp4::ops::cpu {

/// y[t][r] = global scale * sum over i of w[r, i] x[t, i], for r in [row_begin, row_end).
struct Product {
  const format::WeightView* weight = nullptr;
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  /// Packed rows: token t is x_row(t). `x_index` null: 0, 1, 2, ...
  const std::byte* x = nullptr;
  std::size_t x_stride = 0;  // bytes
  const std::int32_t* x_index = nullptr;
  /// Results: row r of token t is y[row(t) * y_stride + r - row_begin], row(t) as for x.
  float* y = nullptr;
  std::int64_t y_stride = 0;  // floats
  const std::int32_t* y_index = nullptr;
  std::int64_t tokens = 0;
  /// What this thread multiplies next, with the same format, columns and rows: its bytes may be
  /// asked for at the end of these. Null: not known.
  const format::WeightView* next = nullptr;
};

struct Matmul {
  const char* name;           // e.g. "fp4_i16_avx2"
  int packing;                // 0 .. kPackings - 1: tables with the same number pack alike
  std::size_t scratch_bytes;  // what `multiply` needs, on a 64-byte boundary

  /// Bytes of a packed row, a multiple of 64.
  std::size_t (*packed_bytes)(std::int64_t cols);
  /// Packs a row of `cols` columns. `round`: to BF16 first (arithmetics that need no less precision
  /// do as they must).
  void (*pack)(const float* x, std::int64_t cols, bool round, std::byte* out);
  void (*multiply)(const Product& product, std::byte* scratch);
};

inline constexpr int kPackings = 5;

extern const Matmul kMatmulF32Baseline;
extern const Matmul kMatmulF32Avx2;
extern const Matmul kMatmulF32Avx512;
extern const Matmul kMatmulFp4Avx2;
extern const Matmul kMatmulFp4Avx512Vnni;
extern const Matmul kMatmulFp4Avx512Bf16;
extern const Matmul kMatmulFp8Avx512Bf16;
extern const Matmul kMatmulBf16Avx512Bf16;

}  // namespace dsfp4::ops::cpu
