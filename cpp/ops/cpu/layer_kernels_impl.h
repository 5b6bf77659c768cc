// The bodies of the layer kernels, written once in vector types and compiled once for each
// instruction set by the files that include this one. Products keep a tile of C in registers
// (DSFP4_TILE_ROWS x DSFP4_TILE_VECTORS registers), read B one register row a step and broadcast A:
// a step moves (rows + vectors) values for rows * vectors multiply-adds, so that operands in L1 or
// L2 keep up with the multipliers.
//
// Everything here has internal linkage and calls no inline function from elsewhere: a shared inline
// function compiled here could be linked into code that runs on older CPUs.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "ops/cpu/layer_kernels.h"
#include "ops/cpu/multiply_add.h"

namespace dsfp4::ops::cpu {
namespace {

// The including file says how many floats a register holds and the tile's rows and registers a row.
constexpr std::int64_t kLanes = DSFP4_LANES;
constexpr int kTileRows = DSFP4_TILE_ROWS;
constexpr int kTileVectors = DSFP4_TILE_VECTORS;
constexpr std::int64_t kPanel = kLanes * kTileVectors;
constexpr int kSums = 4;  // independent sums of a dot product, to hide the latency of an addition
// Aligned like a float: rows start anywhere.
using Vec =
    float __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
using IntVec = std::int32_t
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
using Uint16Vec = std::uint16_t
    __attribute__((vector_size(kLanes * sizeof(std::uint16_t)), aligned(1), may_alias));
using Uint8Vec = std::uint8_t __attribute__((vector_size(kLanes), aligned(1), may_alias));
using UintVec = std::uint32_t
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
void store(Vec value, float* to) { *reinterpret_cast<Vec*>(to) = value; }
Vec as_floats(IntVec bits) { return reinterpret_cast<Vec>(bits); }
Vec as_floats(UintVec bits) { return reinterpret_cast<Vec>(bits); }
IntVec as_bits(Vec value) { return reinterpret_cast<IntVec>(value); }

// e^x to 2 units in the last place by 2^n e^r with r in [-ln 2 / 2, ln 2 / 2]; 0 below -87.3, where
// FP32 leaves its normal range, and infinity above 88.7. Coefficients: Taylor's, to r^7.
Vec exponential(Vec x) {
  const Vec limited = x > 89.0f ? Vec{} + 89.0f : x;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = multiply_add(limited, Vec{} + 1.44269504f, magic);
  const Vec n = shifted - magic;
  const Vec high = multiply_add(n, Vec{} - 0.693145752f, limited);
  const Vec r = multiply_add(n, Vec{} - 1.42860677e-6f, high);
  Vec p = Vec{} + 1.0f / 5040.0f;
  for (const float c :
       {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    p = multiply_add(p, r, Vec{} + c);
  }
  // 2^n in two steps, as 2^128 is not a float though 2^127 * 1.9 is.
  const IntVec exponent = as_bits(shifted) - as_bits(magic);
  const IntVec half = exponent >> 1;
  const Vec power = as_floats((half + 127) << 23);
  const Vec rest = as_floats((exponent - half + 127) << 23);
  const Vec value = p * power * rest;
  return x < -87.3f ? Vec{} : value;
}

// ---- products
// ------------------------------------------------------------------------------------

template <int rows, int vectors, bool a_by_column, bool add>
void tile(const SmallProduct& product, const float* a, const float* b, float* c) {
  const std::int64_t stride = a_by_column ? product.a_col : product.a_row;
  Vec sum[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = add ? load(c + r * product.c_row + v * kLanes) : Vec{};
    }
  }
  for (std::int64_t k = 0; k < product.k; ++k) {
    Vec from[vectors];
    for (int v = 0; v < vectors; ++v) from[v] = load(b + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const Vec factor = Vec{} + (a_by_column ? a[r] : a[r * stride]);
      for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(factor, from[v], sum[r][v]);
    }
    a += a_by_column ? stride : 1;
    b += product.b_row;
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) store(sum[r][v], c + r * product.c_row + v * kLanes);
  }
}

template <int rows, int vectors, bool a_by_column, bool add>
void tile_of(int row_count, const SmallProduct& product, const float* a, const float* b, float* c) {
  if (row_count == rows) {
    tile<rows, vectors, a_by_column, add>(product, a, b, c);
  } else if constexpr (rows > 1) {
    tile_of<rows - 1, vectors, a_by_column, add>(row_count, product, a, b, c);
  }
}

template <int vectors, bool a_by_column, bool add>
void panel_of(int vector_count, const SmallProduct& product, const float* b, float* c) {
  if (vector_count == vectors) {
    for (std::int64_t i = 0; i < product.m; i += kTileRows) {
      const std::int64_t left = product.m - i;
      tile_of<kTileRows, vectors, a_by_column, add>(
          left < kTileRows ? static_cast<int>(left) : kTileRows, product,
          product.a + i * product.a_row, b, c + i * product.c_row);
    }
  } else if constexpr (vectors > 1) {
    panel_of<vectors - 1, a_by_column, add>(vector_count, product, b, c);
  }
}

template <bool add>
void multiply(const SmallProduct& product) {
  for (std::int64_t j = 0; j < product.n; j += kPanel) {
    const std::int64_t left = product.n - j;
    const int vectors =
        left >= kPanel ? kTileVectors : static_cast<int>((left + kLanes - 1) / kLanes);
    const float* b = product.b + j / kPanel * product.b_panel;
    if (product.a_col == 1) {
      panel_of<kTileVectors, false, add>(vectors, product, b, product.c + j);
    } else {
      panel_of<kTileVectors, true, add>(vectors, product, b, product.c + j);
    }
  }
}

float horizontal_sum(Vec value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof(lanes));
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <int count>
void dot_some(const float* w, std::int64_t k, const float* x, std::int64_t x_stride, float scale,
              float* y, std::int64_t y_stride) {
  Vec sum[count][kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums * kLanes <= k; i += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const Vec weights = load(w + i + s * kLanes);
      for (int t = 0; t < count; ++t) {
        sum[t][s] = multiply_add(weights, load(x + t * x_stride + i + s * kLanes), sum[t][s]);
      }
    }
  }
  for (int t = 0; t < count; ++t) {
    float tail = 0.0f;
    for (std::int64_t j = i; j < k; ++j) tail += w[j] * x[t * x_stride + j];
    const float whole = horizontal_sum((sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]));
    y[t * y_stride] = (whole + tail) * scale;
  }
}

void dot(const float* w, std::int64_t k, const float* x, std::int64_t x_stride, std::int64_t rows,
         float scale, float* y, std::int64_t y_stride) {
  std::int64_t t = 0;
  for (; t + 2 <= rows; t += 2) {
    dot_some<2>(w, k, x + t * x_stride, x_stride, scale, y + t * y_stride, y_stride);
  }
  if (t < rows) dot_some<1>(w, k, x + t * x_stride, x_stride, scale, y + t * y_stride, y_stride);
}

// ---- softmax
// -------------------------------------------------------------------------------------

template <bool masked>
void softmax_lanes(const SoftmaxStep& step, std::int64_t lane) {
  float* scores = step.scores + lane;
  IntVec visible = {};
  if (masked) std::memcpy(&visible, step.visible + lane, sizeof(visible));
  const Vec lowest = Vec{} - __builtin_inff();
  const Vec before = load(step.maximum + lane);
  Vec largest = before;
  for (std::int64_t s = 0; s < step.keys; ++s) {
    Vec score = load(scores + s * step.stride) * step.scale;
    if (masked) score = visible > static_cast<std::int32_t>(s) ? score : lowest;
    largest = score > largest ? score : largest;
  }
  const Vec rescale = exponential(before - largest);
  Vec sum = load(step.sum + lane) * rescale;
  for (std::int64_t s = 0; s < step.keys; ++s) {
    Vec p = exponential(load(scores + s * step.stride) * step.scale - largest);
    if (masked) p = visible > static_cast<std::int32_t>(s) ? p : Vec{};
    store(p, scores + s * step.stride);
    sum += p;
  }
  store(largest, step.maximum + lane);
  store(sum, step.sum + lane);
  store(rescale, step.rescale + lane);
}

void softmax_step(const SoftmaxStep& step) {
  for (std::int64_t lane = 0; lane < step.lanes; lane += kLanes) {
    if (step.visible == nullptr) {
      softmax_lanes<false>(step, lane);
    } else {
      softmax_lanes<true>(step, lane);
    }
  }
}

// ---- conversions
// ---------------------------------------------------------------------------------

// n values of one type, kLanes at a time; the last ones through a padded copy, so that a value's
// result does not depend on its place.
template <typename From, typename Convert>
void convert(const From* x, float* y, std::int64_t n, const Convert& convert_lanes) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(convert_lanes(x + i), y + i);
  if (i == n) return;
  From last[kLanes] = {};
  float result[kLanes];
  std::memcpy(last, x + i, static_cast<std::size_t>(n - i) * sizeof(From));
  store(convert_lanes(last), result);
  std::memcpy(y + i, result, static_cast<std::size_t>(n - i) * sizeof(float));
}

void bf16_to_float(const std::uint16_t* x, float* y, std::int64_t n) {
  convert(x, y, n, [](const std::uint16_t* from) {
    const Uint16Vec codes = *reinterpret_cast<const Uint16Vec*>(from);
    return as_floats(__builtin_convertvector(codes, UintVec) << 16);
  });
}

// The code's exponent and mantissa, moved to those of a float, make the value times 2^-120; the
// product is exact, subnormal codes included. 0x7f and 0xff are NaN.
void e4m3_to_float(const std::uint8_t* x, float scale, float* y, std::int64_t n) {
  convert(x, y, n, [scale](const std::uint8_t* from) {
    const Uint8Vec codes = *reinterpret_cast<const Uint8Vec*>(from);
    const UintVec wide = __builtin_convertvector(codes, UintVec);
    const UintVec magnitude = wide & 0x7fu;
    const Vec value = as_floats(magnitude << 20) * 0x1p120f;
    const Vec with_nan = magnitude == 0x7fu ? Vec{} + __builtin_nanf("") : value;
    return as_floats(reinterpret_cast<UintVec>(with_nan) | (wide & 0x80u) << 24) * scale;
  });
}

// ---- element by element
// --------------------------------------------------------------------------

void scale_row(const float* x, float scale, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * scale;
}

void add(const float* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += x[i];
}

void add_scaled(float a, const float* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

void scale_by(const float* x, float scale, const float* weight, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// e^-x overflows to infinity for x below -88.7, where silu is 0 to FP32's precision.
Vec silu_mul_lanes(Vec gate, Vec up) { return gate / (exponential(-gate) + 1.0f) * up; }

void silu_mul(float* gate, const float* up, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(silu_mul_lanes(load(gate + i), load(up + i)), gate + i);
  }
  if (i == n) return;
  float last[2][kLanes] = {};
  const std::size_t bytes = static_cast<std::size_t>(n - i) * sizeof(float);
  std::memcpy(last[0], gate + i, bytes);
  std::memcpy(last[1], up + i, bytes);
  store(silu_mul_lanes(load(last[0]), load(last[1])), last[0]);
  std::memcpy(gate + i, last[0], bytes);
}

// ---- the processor's peak
// ------------------------------------------------------------------------

double multiply_in_registers(std::int64_t steps, float* sink) {
  constexpr int kChains = 12;  // more than the latency times the number of multipliers
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = Vec{} + static_cast<float>(i);
  const Vec a = Vec{} + *sink;
  const Vec b = Vec{} + 0.5f;
  for (std::int64_t step = 0; step < steps; ++step) {
    for (Vec& sum : sums) sum = multiply_add(sum, b, a);
  }
  Vec total = {};
  for (const Vec& sum : sums) total += sum;
  *sink = horizontal_sum(total);
  return 2.0 * kChains * static_cast<double>(kLanes) * static_cast<double>(steps);
}

constexpr LayerKernels make_layer_kernels(std::string_view isa) noexcept {
  return {isa,          kLanes,     kPanel,        multiply<false>, multiply<true>,
          softmax_step, dot,        bf16_to_float, e4m3_to_float,   scale_row,
          add,          add_scaled, scale_by,      silu_mul,        multiply_in_registers};
}

}  // namespace
}  // namespace dsfp4::ops::cpu
