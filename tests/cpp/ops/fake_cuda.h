// A plugin's table without a GPU: device memory is the host's, streams are counted, and calls fail
// when a test says so. What it does not need is null.
#pragma once

#include <cstdlib>
#include <cstring>

#include "ops/cuda/abi.h"

namespace dsfp4::ops::testing {

struct FakeCuda {
  static constexpr int kIndex =
      7;  // the numbers that are kept for device 0 are those of a real one

  bool opens = true;
  bool tells_memory = true;
  bool embeds = true;
  int devices = 0;      // open
  int allocations = 0;  // not freed
  int recordings = 0;   // of streams that are being recorded
  int recorded = 0;     // in all

  static FakeCuda& state() {
    static FakeCuda fake;
    return fake;
  }
  /// The table, with all that state() counts at its start.
  static const cuda::Plugin& plugin() {
    static const cuda::Plugin table = make();
    state() = {};
    return table;
  }

 private:
  static cuda::Plugin make() {
    using cuda::Device;
    cuda::Plugin table{};
    table.version = cuda::kAbiVersion;
    table.bytes = sizeof(cuda::Plugin);
    table.failure = [] {
      static const cuda::Failure failure{1, 2, "call", "source", "refused"};
      return &failure;
    };
    table.probe = [](int, cuda::DeviceInfo* info) {
      *info = {};
      info->count = kIndex + 1;
      info->major = 9;
      info->driver_version = info->runtime_version = 13000;
      info->free_bytes = 2'000'000'000;
      return true;
    };
    table.open = [](int, bool, Device** device) {
      if (!state().opens) return false;
      ++state().devices;
      *device = reinterpret_cast<Device*>(&state());
      return true;
    };
    table.close = [](Device*) { --state().devices; };
    table.memory = [](Device*, std::uint64_t* free, std::uint64_t* total) {
      *free = *total = 1'900'000'000;
      return state().tells_memory;
    };
    table.allocate = [](Device*, std::size_t bytes, std::byte** memory) {
      ++state().allocations;
      *memory = static_cast<std::byte*>(std::malloc(bytes));
      return *memory != nullptr;
    };
    table.free = [](Device*, std::byte* memory) {
      --state().allocations;
      std::free(memory);
      return true;
    };
    table.upload = [](Device*, const void* host, void* to, std::size_t bytes) {
      std::memcpy(to, host, bytes);
      return true;
    };
    table.synchronize = [](Device*) { return true; };
    table.embed = [](Device*, const format::WeightView*, const std::int32_t*, Matrix) {
      return state().embeds;
    };
    table.begin_capture = [](Device*) {
      ++state().recorded;
      ++state().recordings;
      return true;
    };
    table.end_capture = [](Device*, void** graph) {
      --state().recordings;
      *graph = &state();
      return true;
    };
    table.free_graph = [](Device*, void*) { return true; };
    return table;
  }
};

}  // namespace dsfp4::ops::testing
