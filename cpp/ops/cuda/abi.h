// What the core and the CUDA plugin (libdsfp4_cuda.so) agree on: one table of functions. The core
// has no CUDA in it and the plugin nothing of the core but plain structs, so either may be missing.
//
// Every function that returns bool gives false when it failed; failure() then says why. Matrices,
// vectors and weights lie in device memory; what is said to be on the host does not. Work is
// queued on the compute queue in call order; only the functions that say so wait. Every call leaves
// the calling thread's current device as it was.
//
// Bytes that change between steps (an expert's slot, a streamed layer). A copy is seen by an op if
// it comes before the op's first kernel: earlier in the compute queue, or by wait() for an event
// recorded after it. A kernel that begins early passes by the kernel right before it only, never by
// a copy or by wait(). But linear(), linear_pair() and routed_experts() read weights before that
// kernel has ended, and block scales then through the first-level cache, which may still hold what
// lay there before: only expert_tasks() is safe with bytes that it has read and that were written
// again, as it reads nothing of an expert before then.
// A copy over bytes that queued ops still read must wait for an event recorded after these.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/device.h"
#include "ops/raw.h"

namespace dsfp4::ops::cuda {

// Addresses of the device as the plugin takes them.
using raw::ConstMatrix;
using raw::ExpertTask;
using raw::ExpertView;
using raw::Matrix;

/// Raised whenever the table or a struct in it changes.
inline constexpr std::uint32_t kAbiVersion = 9;

struct Device;  // the plugin's own

/// The last failure of the calling thread.
struct Failure {
  int code = 0;  // cudaError_t
  int line = 0;
  const char* call = "";
  const char* source = "";
  const char* problem = "";
};

struct DeviceInfo {
  char name[256] = {};
  int count = 0;  // devices present
  int major = 0, minor = 0;
  int multiprocessors = 0;
  int driver_version = 0, runtime_version = 0;  // 13000 is 13.0
  std::uint64_t total_bytes = 0;
  std::uint64_t free_bytes = 0;
};

/// One row (token) of a step: its place in the sequence and where its sequence's blocks begin in
/// the table of block pointers.
struct RowPlace {
  std::int32_t position = 0;
  std::int32_t first_block = 0;
};

/// The rows of a step and their caches, on the device but for the plain numbers.
struct KvRows {
  const RowPlace* rows = nullptr;
  std::byte* const* blocks = nullptr;
  std::int64_t count = 0;       // rows
  std::int64_t max_length = 0;  // tokens that the longest row may look at
  std::size_t layer_offset = 0;
  KvFormat format = KvFormat::kBf16;
  float scale = 1.0f;
};

/// The rows of a step that belong to one sequence, for prefill.
struct SequencePart {
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t position = 0;
  std::int64_t first_block = 0;
};

/// Chosen experts on the device, [tokens, top_k].
struct DeviceRouting {
  std::int32_t* experts = nullptr;
  std::int32_t* used = nullptr;
  float* weights = nullptr;
};

/// Of the lists that one expert_tasks() copies to the device: about 8 bytes a pair, 192 a task.
inline constexpr std::size_t kMostTaskBytes = std::size_t{2} << 20;
/// Of use_ring().
inline constexpr std::size_t kRingBytes = 2 * kMostTaskBytes;

struct Plugin {
  std::uint32_t version;
  std::uint32_t bytes;  // of this struct

  const Failure* (*failure)();
  /// Says what is there, without making a context; info->count 0 is no failure.
  bool (*probe)(int index, DeviceInfo* info);
  /// Makes a context on device `index` and a stream. `portable`: without the kernels that only some
  /// GPUs can run.
  bool (*open)(int index, bool portable, Device** device);
  void (*close)(Device*);
  /// kRingBytes of the host's memory that `upload` and lists of tasks pass through, best pinned.
  /// Given before these are called, and there until `close`.
  bool (*use_ring)(Device*, std::byte* ring);

  bool (*memory)(Device*, std::uint64_t* free, std::uint64_t* total);
  bool (*allocate)(Device*, std::size_t bytes, std::byte** memory);
  bool (*free)(Device*, std::byte* memory);
  /// Pins pages of the host's memory, for fast copies; where it fails they are as they were. They
  /// must stay where they are until they are unpinned.
  bool (*pin)(Device*, std::byte* memory, std::size_t bytes);
  bool (*unpin)(Device*, std::byte* memory);
  /// Copies in the compute queue. The bytes of `upload` may change once it returns; `download`
  /// waits for the copy.
  bool (*upload)(Device*, const void* host, void* to, std::size_t bytes);
  bool (*download)(Device*, const void* from, void* host, std::size_t bytes);
  /// Return at once where `host` is pinned, else perhaps once the queue has come to the copy and
  /// made it. `host` lies in one block, pinned or not, and stays as it is, or is not read, until
  /// the copy has run.
  bool (*copy_in)(Device*, Queue queue, const void* host, void* to, std::size_t bytes);
  bool (*copy_out)(Device*, Queue queue, const void* from, void* host, std::size_t bytes);
  /// Waits until all queues are empty.
  bool (*synchronize)(Device*);
  /// An event passes when all that its queue held as it was recorded has run; one never recorded
  /// has passed. `wait` holds up the queue, `wait_event` the caller. Another thread may call these,
  /// copy_in and copy_out while ops are queued, but none of kCompute between begin_capture()
  /// and end_capture(), nor synchronize().
  bool (*make_event)(Device*, bool timed, void** event);
  bool (*free_event)(Device*, void* event);
  bool (*record)(Device*, Queue queue, void* event);
  bool (*wait)(Device*, Queue queue, void* event);
  bool (*event_passed)(Device*, void* event, bool* passed);
  bool (*wait_event)(Device*, void* event);
  /// Seconds from the device's last set_clock() to when an event passed, less than 0 if it was
  /// before. The event is a timed one that has passed. set_clock() waits for no queue; two threads
  /// may not be in these at once.
  bool (*set_clock)(Device*);
  bool (*event_time)(Device*, void* event, double* seconds);
  /// The stream of the compute queue, a cudaStream_t.
  void* (*stream)(Device*);

  bool (*embed)(Device*, const format::WeightView* table, const std::int32_t* ids, Matrix out);
  bool (*rms_norm)(Device*, ConstMatrix x, const float* weight, float eps, Matrix y);
  bool (*silu_mul)(Device*, Matrix gate, ConstMatrix up);
  bool (*zero)(Device*, Matrix y);
  bool (*add)(Device*, ConstMatrix x, Matrix y);
  bool (*rope)(Device*, Matrix x, std::int64_t heads, std::int64_t head_stride,
               ConstMatrix cos_sin);
  bool (*combine)(Device*, ConstMatrix pairs, const float* weights, std::int64_t top_k, Matrix y);
  bool (*route)(Device*, const RouterSpec* spec, ConstMatrix logits, const float* bias,
                const std::int32_t* forced, DeviceRouting out);

  /// Here as below, `workspace` has the bytes that workspaces.h says.
  bool (*linear)(Device*, const format::WeightView* weight, ConstMatrix x, Matrix y, Inputs inputs,
                 std::byte* workspace);
  /// Two products of one x; with the larger workspace.
  bool (*linear_pair)(Device*, const format::WeightView* first, Matrix y_first,
                      const format::WeightView* second, Matrix y_second, ConstMatrix x,
                      std::byte* workspace);

  bool (*kv_append)(Device*, const KvRows* kv, ConstMatrix x);
  bool (*mla_inputs)(Device*, const MlaShape* shape, const KvRows* kv, ConstMatrix cos_sin,
                     const float* kv_norm, float eps, Matrix q, Matrix x);
  bool (*prefill_attention)(Device*, const MlaShape* shape, const format::WeightView* kv_b_proj,
                            const KvRows* kv, SequencePart part, ConstMatrix q, Matrix out,
                            std::byte* workspace);
  bool (*absorb_query)(Device*, const MlaShape* shape, const format::WeightView* kv_b_proj,
                       ConstMatrix q, Matrix q_abs);
  /// Reads the cache before the kernel before it has ended: absorb_query(), or something else, must
  /// come between mla_inputs() or kv_append() and latent_attention().
  bool (*latent_attention)(Device*, const MlaShape* shape, const KvRows* kv, ConstMatrix q_abs,
                           ConstMatrix q, Matrix out, std::byte* workspace);
  bool (*expand_value)(Device*, const MlaShape* shape, const format::WeightView* kv_b_proj,
                       ConstMatrix attended, Matrix out);

  /// y[t] += weighted sum of the chosen experts. `table` [experts] lies on the device (its pointers
  /// may change between steps, the bytes they point to may not), `first` is a copy of its first
  /// entry on the host: all experts of a layer have one shape and one set of formats. hidden:
  /// [pairs, moe_intermediate_size]; routed: [pairs, hidden_size]. `shared`, if not null, is added
  /// first, to nothing; a host struct with pointers of the device; hidden has a row more for each
  /// token then.
  bool (*routed_experts)(Device*, const ExpertView* table, const ExpertView* first,
                         std::int64_t experts, DeviceRouting routing, std::int64_t top_k,
                         ConstMatrix x, Matrix hidden, Matrix routed, Matrix y,
                         const ExpertView* shared, std::byte* workspace);
  bool (*takes_shared)(Device*, const ExpertView* first, const ExpertView* shared,
                       std::int64_t tokens, std::int64_t top_k);

  /// For every pair p of every task: row p of `out` = down(silu(gate x) * up x), x = row p / top_k;
  /// other rows of `out` stay. Tasks, their views and their pairs lie on the host and may change
  /// once this returns; weights may change between calls as said at the top. A pair's result
  /// depends on x.rows and which kernels take the call's experts, not on what else is in the call.
  /// Pairs are distinct and below x.rows * top_k; all experts have the shape of hidden [x.rows *
  /// top_k, moe_intermediate_size] and out [x.rows * top_k, hidden_size]; a call holds up to
  /// kMostTaskBytes of tasks and pairs; else it fails and nothing is queued. Experts of several
  /// formats, or one that the fast kernels cannot read (FP32, odd columns, data not on 16 bytes or
  /// scales not on 8), send the whole call through plain kernels. Not between begin_capture() and
  /// end_capture().
  bool (*expert_tasks)(Device*, const ExpertTask* tasks, std::int64_t count, std::int64_t top_k,
                       ConstMatrix x, Matrix hidden, Matrix out, std::byte* workspace);
  /// Task by task, in their order, as if one ended before the next: y[p / top_k] += weights[p] *
  /// what expert_tasks() gives for pair p. A task's tokens are distinct. hidden and out are scratch
  /// of at least as many rows as there are pairs, and out's rows stand for x.rows above: a pair's
  /// result does not depend on which tasks are in a call. Else as expert_tasks().
  bool (*add_expert_tasks)(Device*, const ExpertTask* tasks, std::int64_t count, std::int64_t top_k,
                           ConstMatrix x, const float* weights, Matrix hidden, Matrix out, Matrix y,
                           std::byte* workspace);

  /// `id` is on the host; waits for it.
  bool (*sample)(Device*, ConstMatrix logits, const SampleSpec* spec, std::byte* workspace,
                 std::int32_t* id);

  /// Ops as a graph: what is queued between the two is recorded, not run. A graph may be freed
  /// while it runs.
  bool (*begin_capture)(Device*);
  bool (*end_capture)(Device*, void** graph);
  bool (*launch_graph)(Device*, void* graph);
  bool (*free_graph)(Device*, void* graph);

  /// For floors: reads `bytes` bytes once; runs mma.sync alone, on registers, and says how many
  /// operations that was. `sink` is 4 bytes that may be written.
  bool (*read_all)(Device*, const std::byte* from, std::size_t bytes, std::byte* sink);
  bool (*multiply_loop)(Device*, int rounds, std::byte* sink, double* flops);
  /// Notes the time on the stream, in slot 0 or 1; and the time between two of them.
  bool (*mark)(Device*, int slot);
  bool (*elapsed)(Device*, int from, int to, float* milliseconds);
};

/// The plugin's one exported function: null if it does not speak `version`.
using PluginEntry = const Plugin* (*)(std::uint32_t version);
inline constexpr const char* kPluginEntry = "dsfp4_cuda_plugin";

}  // namespace dsfp4::ops::cuda
