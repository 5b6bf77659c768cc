// Reading speed as Python sees it.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "dsfp4/error.h"
#include "storage/measure.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;

storage::ReaderKind kind_of(const std::string& reader) {
  if (reader == "io_uring") return storage::ReaderKind::kUring;
  if (reader == "pread") return storage::ReaderKind::kPread;
  throw ParameterError("reader", "'" + reader + "' is not one of io_uring, pread");
}

nb::dict measure_raw_rate(const std::vector<std::filesystem::path>& files,
                          const std::string& reader, std::uint64_t block_bytes, int depth,
                          double seconds, std::uint64_t seed) {
  storage::ReaderOptions options;
  options.kind = kind_of(reader);
  options.piece_bytes = block_bytes;
  options.depth = depth;
  storage::RawRate rate;
  {
    const ReleasedGil released;
    rate = storage::measure_raw_rate(files, options, seconds, seed);
  }
  nb::dict result;
  result["bytes"] = rate.bytes;
  result["seconds"] = rate.seconds;
  result["gb_per_second"] = rate.gb_per_second();
  result["cpu_seconds_per_gb"] = rate.cpu_seconds_per_gb();
  return result;
}

nb::dict measure_demand_beside_speculation(const std::vector<std::filesystem::path>& files,
                                           const std::string& reader, std::uint64_t expert_bytes,
                                           int experts, int rounds, std::uint64_t seed) {
  storage::ReaderOptions options;
  options.kind = kind_of(reader);
  storage::DemandLatency latency;
  {
    const ReleasedGil released;
    latency = storage::measure_demand_beside_speculation(files, options, expert_bytes, experts,
                                                         rounds, seed);
  }
  nb::dict result;
  result["idle_seconds"] = latency.idle_seconds;
  result["beside_seconds"] = latency.beside_seconds;
  result["speculative_beside_demand"] = latency.stats.speculative_beside_demand;
  result["peak_speculative_in_flight_bytes"] = latency.stats.peak_speculative_in_flight_bytes;
  result["speculative_bytes"] = latency.stats.bytes_speculative;
  return result;
}

}  // namespace

void bind_storage(nb::module_& m) {
  m.def("measure_raw_rate", &measure_raw_rate, nb::arg("files"), nb::kw_only(), nb::arg("reader"),
        nb::arg("block_bytes"), nb::arg("depth"), nb::arg("seconds"), nb::arg("seed") = 1,
        "Random direct reads of blocks of `files` for some seconds: bytes, seconds, GB/s (10^9), "
        "processor seconds per GB.");
  m.def("measure_demand_beside_speculation", &measure_demand_beside_speculation, nb::arg("files"),
        nb::kw_only(), nb::arg("reader"), nb::arg("expert_bytes"), nb::arg("experts"),
        nb::arg("rounds"), nb::arg("seed") = 1,
        "Seconds of each demand for some experts, alone and issued during speculation.");
}

}  // namespace dsfp4::bindings
