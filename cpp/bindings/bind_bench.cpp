// Timings for `dsfp4 bench kernels` and `dsfp4 bench cuda`, and the wires of `dsfp4 bench decode`.
#include <algorithm>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "base/cores.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "dsfp4/error.h"
#include "engine/bench_cuda.h"
#include "engine/bench_wires.h"
#include "ops/measure/kernel_bench.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;
using format::WeightFormat;
using ops::measure::KernelBench;
using ops::measure::Seconds;

constexpr std::int64_t kMost = std::int64_t{1} << 24;  // no product of three sizes overflows

void check(std::int64_t value, const char* parameter) {
  if (value < 1 || value > kMost) {
    throw ParameterError(parameter, "must be 1 to 2^24, not " + std::to_string(value));
  }
}

WeightFormat format_named(const std::string& name) {
  for (const WeightFormat format :
       {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kFp8Block, WeightFormat::kNvfp4,
        WeightFormat::kMxfp4}) {
    if (format::weight_format_name(format) == name) return format;
  }
  throw ParameterError("format", "'" + name + "' is not one of f32, bf16, fp8, nvfp4, mxfp4");
}

ops::KvFormat cache_named(const std::string& name) {
  if (name == "bf16") return ops::KvFormat::kBf16;
  if (name == "fp8") return ops::KvFormat::kFp8;
  throw ParameterError("cache", "'" + name + "' is not one of bf16, fp8");
}

std::unique_ptr<KernelBench> make(const std::string& device, int threads) {
  if (threads == 0) threads = available_cores();
  if (device == "cpu") {
    return std::make_unique<KernelBench>(ops::make_cpu_ops(threads), threads);
  }
  if (device == "reference") {
    return std::make_unique<KernelBench>(ops::make_reference_ops(threads), threads);
  }
  throw ParameterError("device", "'" + device + "' is not one of cpu, reference");
}

Seconds linear(KernelBench& bench, const std::string& format, std::int64_t rows, std::int64_t cols,
               std::int64_t tokens, std::int64_t copies, int runs) {
  check(rows, "rows");
  check(cols, "cols");
  check(tokens, "tokens");
  check(copies, "copies");
  return bench.linear(format_named(format), rows, cols, tokens, copies, runs);
}

Seconds experts(KernelBench& bench, const std::string& format, std::int64_t hidden,
                std::int64_t intermediate, std::int64_t slots, std::int64_t tokens,
                std::int64_t top_k, const std::vector<std::int32_t>& chosen, int runs) {
  check(hidden, "hidden");
  check(intermediate, "intermediate");
  check(slots, "slots");
  check(tokens, "tokens");
  check(top_k, "top_k");
  if (chosen.size() != static_cast<std::size_t>((runs + 1) * tokens * top_k) ||
      std::ranges::any_of(chosen, [](std::int32_t e) { return e < 0; })) {
    throw ParameterError("chosen", "must be [runs + 1, tokens, top_k] experts");
  }
  return bench.experts(format_named(format), hidden, intermediate, slots, tokens, top_k, chosen,
                       runs);
}

nb::list profile(KernelBench& bench, std::int64_t position, std::int64_t rows, bool decode,
                 std::int64_t slots, const std::string& expert, int runs) {
  check(position + 1, "position");
  check(rows, "rows");
  check(slots, "slots");
  ops::measure::LayerShape shape;
  shape.expert_slots = slots;
  shape.expert = format_named(expert);
  std::vector<ops::measure::ProfiledOp> ops;
  {
    const ReleasedGil released;
    ops = bench.layer(shape, position, rows, decode, runs);
  }
  nb::list list;
  for (const auto& op : ops) {
    list.append(nb::make_tuple(op.name, op.bytes, op.flops, nb::cast(op.seconds)));
  }
  return list;
}

nb::dict measure_wires(const std::string& device, const std::string& format,
                       std::int64_t hidden_size, std::int64_t moe_intermediate_size,
                       std::int64_t top_k, int threads, std::uint64_t memory_limit,
                       double seconds) {
  engine::WireOptions options;
  options.format = format_named(format);
  options.hidden_size = hidden_size;
  options.moe_intermediate_size = moe_intermediate_size;
  options.top_k = top_k;
  options.seconds = seconds;
  if (device != "cuda") {
    throw ParameterError("device",
                         "'" + device + "' has no wire to the processor; it must be cuda");
  }
  engine::WireRates rates;
  {
    const ReleasedGil released;
    const auto ops = ops::make_cuda_ops(0, memory_limit);
    const auto host = ops::make_cpu_ops(threads == 0 ? available_cores() : threads);
    rates = engine::measure_wires(*ops, *host, options);
  }
  nb::dict result;
  result["copies"] = rates.copies;
  result["host"] = rates.host;
  result["copies_beside"] = rates.copies_beside;
  result["host_beside"] = rates.host_beside;
  result["together"] = rates.together();
  return result;
}

nb::list bench_cuda(const std::string& only) {
  std::vector<engine::KernelTime> times;
  {
    const ReleasedGil released;
    times = engine::bench_cuda(0, only);
  }
  nb::list rows;
  for (const engine::KernelTime& time : times) {
    nb::dict row;
    row["name"] = time.name;
    row["seconds"] = time.seconds;
    row["bytes"] = time.bytes;
    row["flops"] = time.flops;
    row["floor"] = time.floor;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void bind_bench(nb::module_& m) {
  const auto unlocked = nb::call_guard<ReleasedGil>();
  nb::class_<KernelBench>(m, "KernelBench", "Times single ops; see dsfp4.cli.bench_kernels.")
      .def(nb::new_(&make), nb::arg("device"), nb::arg("threads"))
      .def_prop_ro("isa", &KernelBench::isa)
      .def(
          "read_memory",
          [](KernelBench& bench, std::int64_t bytes, int runs) {
            return bench.read_memory(static_cast<std::size_t>(bytes), runs);
          },
          nb::arg("bytes"), nb::arg("runs"), unlocked)
      .def("peaks", &KernelBench::peaks, unlocked)
      .def("linear", &linear, nb::arg("format"), nb::arg("rows"), nb::arg("cols"),
           nb::arg("tokens"), nb::arg("copies"), nb::arg("runs"), unlocked)
      .def("experts", &experts, nb::arg("format"), nb::arg("hidden"), nb::arg("intermediate"),
           nb::arg("slots"), nb::arg("tokens"), nb::arg("top_k"), nb::arg("chosen"),
           nb::arg("runs"), unlocked)
      .def(
          "decode_attention",
          [](KernelBench& bench, const ops::MlaShape& shape, const std::string& format,
             const std::string& cache, std::int64_t context, std::int64_t copies, int runs) {
            check(context, "context");
            check(copies, "copies");
            return bench.decode_attention(shape, format_named(format), cache_named(cache), context,
                                          copies, runs);
          },
          nb::arg("shape"), nb::arg("format"), nb::arg("cache"), nb::arg("context"),
          nb::arg("copies"), nb::arg("runs"), unlocked)
      .def(
          "prefill_attention",
          [](KernelBench& bench, const ops::MlaShape& shape, const std::string& format,
             const std::string& cache, std::int64_t position, std::int64_t rows,
             std::int64_t copies, int runs) {
            check(position + 1, "position");
            check(rows, "rows");
            check(copies, "copies");
            return bench.prefill_attention(shape, format_named(format), cache_named(cache),
                                           position, rows, copies, runs);
          },
          nb::arg("shape"), nb::arg("format"), nb::arg("cache"), nb::arg("position"),
          nb::arg("rows"), nb::arg("copies"), nb::arg("runs"), unlocked)
      .def("profile", &profile, nb::arg("position"), nb::arg("rows"), nb::arg("decode"),
           nb::arg("slots"), nb::arg("expert"), nb::arg("runs"));
  m.def("bench_cuda", &bench_cuda, nb::arg("only") = "",
        "Times the CUDA kernels: dicts of name, seconds, bytes, flops, floor.");
  m.def("measure_wires", &measure_wires, nb::arg("device"), nb::kw_only(), nb::arg("format"),
        nb::arg("hidden_size"), nb::arg("moe_intermediate_size"), nb::arg("top_k"),
        nb::arg("threads") = 0, nb::arg("memory_limit") = 0, nb::arg("seconds") = 1.0,
        "Bytes/s of experts in 1 GiB of pinned RAM: `copies` to the device and `host`, computed by "
        "the processor, alone; `copies_beside` and `host_beside`, both at once; `together`, their "
        "sum. memory_limit: bytes of VRAM, 0 for what is free.");
  m.def("available_cores", &available_cores,
        "Threads by default: physical cores in the affinity mask, or the CPU quota.");
}

}  // namespace dsfp4::bindings
