// A plugin's table without a GPU: device memory is the host's, everything runs at once, streams are
// counted, and calls fail when a test says so. What it does not need is null.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "ops/cuda/abi.h"

namespace dsfp4::ops::testing {

struct FakeCuda {
  static constexpr int kIndex =
      7;  // the numbers that are kept for device 0 are those of a real one

  bool opens = true;
  bool tells_memory = true;
  std::uint64_t free_before = 2'000'000'000;  // as probe() has it
  bool embeds = true;
  std::size_t pinnable = SIZE_MAX;  // bytes in all
  bool unpins = true;
  bool tells_time = true;
  double event_time = 0.0;  // of every event
  int devices = 0;          // open
  int allocations = 0;      // not freed
  int events = 0;           // not freed
  int timed_events = 0;     // in all
  int clocks = 0;           // set
  int uploads = 0;
  int recordings = 0;          // of streams that are being recorded
  int recorded = 0;            // in all
  int events_recorded = 0;     // in the queue of the ops
  int caught_in_capture = 0;   // of these, while that queue was recorded
  int launches = 0;            // of graphs
  std::int32_t embedded = -1;  // the first id of the last embed()
  std::set<void*> graphs;      // not freed
  std::map<std::byte*, std::size_t> pinned;
  std::vector<std::string> pin_calls;  // "pin 4096", "unpin", and "refused 4096"
  // Of the device, freed or not, so that no address comes twice.
  std::vector<std::unique_ptr<std::byte[]>> memory;

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
    cuda::Plugin table{};
    table.version = cuda::kAbiVersion;
    table.bytes = sizeof(cuda::Plugin);
    table.failure = [] {
      static const cuda::Failure failure{1, 2, "call", "source", "refused"};
      return &failure;
    };
    add_device(table);
    add_queues(table);
    add_graphs(table);
    table.embed = [](cuda::Device*, const format::WeightView*, const std::int32_t* ids,
                     cuda::Matrix) {
      if (state().embeds) state().embedded = *ids;
      return state().embeds;
    };
    return table;
  }

  static void add_device(cuda::Plugin& table) {
    using cuda::Device;
    table.probe = [](int, cuda::DeviceInfo* info) {
      *info = {};
      info->count = kIndex + 1;
      info->major = 9;
      info->driver_version = info->runtime_version = 13000;
      info->free_bytes = state().free_before;
      return true;
    };
    table.open = [](int, bool, Device** device) {
      if (!state().opens) return false;
      ++state().devices;
      *device = reinterpret_cast<Device*>(&state());
      return true;
    };
    table.close = [](Device*) { --state().devices; };
    table.use_ring = [](Device*, std::byte*) { return true; };
    table.memory = [](Device*, std::uint64_t* free, std::uint64_t* total) {
      *free = *total = 1'900'000'000;
      return state().tells_memory;
    };
    table.allocate = [](Device*, std::size_t bytes, std::byte** memory) {
      ++state().allocations;
      state().memory.push_back(std::make_unique<std::byte[]>(bytes));
      *memory = state().memory.back().get();
      return true;
    };
    table.free = [](Device*, std::byte*) {
      --state().allocations;
      return true;
    };
    table.pin = [](Device*, std::byte* memory, std::size_t bytes) {
      std::size_t taken = 0;
      for (const auto& block : state().pinned) taken += block.second;
      const bool pins = bytes <= state().pinnable && taken <= state().pinnable - bytes;
      state().pin_calls.push_back((pins ? "pin " : "refused ") + std::to_string(bytes));
      return pins && state().pinned.emplace(memory, bytes).second;
    };
    table.unpin = [](Device*, std::byte* memory) {
      state().pin_calls.emplace_back("unpin");
      return state().unpins && state().pinned.erase(memory) == 1;
    };
  }

  static void add_queues(cuda::Plugin& table) {
    using cuda::Device;
    table.upload = [](Device*, const void* host, void* to, std::size_t bytes) {
      ++state().uploads;
      if (bytes > 0) std::memcpy(to, host, bytes);
      return true;
    };
    table.download = [](Device*, const void* from, void* host, std::size_t bytes) {
      std::memcpy(host, from, bytes);
      return true;
    };
    table.copy_in = [](Device*, Queue, const void* host, void* to, std::size_t bytes) {
      std::memcpy(to, host, bytes);
      return true;
    };
    table.copy_out = [](Device*, Queue, const void* from, void* host, std::size_t bytes) {
      std::memcpy(host, from, bytes);
      return true;
    };
    table.synchronize = [](Device*) { return true; };
    table.make_event = [](Device*, bool timed, void** event) {
      ++state().events;
      state().timed_events += timed;
      *event = &state();
      return true;
    };
    table.free_event = [](Device*, void*) {
      --state().events;
      return true;
    };
    table.record = [](Device*, Queue queue, void*) {
      if (queue != Queue::kCompute) return true;
      ++state().events_recorded;
      state().caught_in_capture += state().recordings;
      return true;
    };
    table.wait = [](Device*, Queue, void*) { return true; };
    table.event_passed = [](Device*, void*, bool* passed) {
      *passed = true;
      return true;
    };
    table.wait_event = [](Device*, void*) { return true; };
    table.set_clock = [](Device*) {
      ++state().clocks;
      return state().tells_time;
    };
    table.event_time = [](Device*, void*, double* seconds) {
      *seconds = state().event_time;
      return state().tells_time;
    };
  }

  static void add_graphs(cuda::Plugin& table) {
    using cuda::Device;
    table.begin_capture = [](Device*) {
      ++state().recorded;
      ++state().recordings;
      return true;
    };
    table.end_capture = [](Device*, void** graph) {
      --state().recordings;
      *graph = reinterpret_cast<void*>(static_cast<std::uintptr_t>(state().recorded));
      state().graphs.insert(*graph);
      return true;
    };
    table.launch_graph = [](Device*, void* graph) {
      ++state().launches;
      return state().graphs.contains(graph);
    };
    table.free_graph = [](Device*, void* graph) { return state().graphs.erase(graph) == 1; };
  }
};

}  // namespace dsfp4::ops::testing
