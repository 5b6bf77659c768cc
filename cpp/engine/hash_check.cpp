#include "engine/hash_check.h"

#include "base/thread_pool.h"
#include "checkpoint/hashes.h"

namespace dsfp4::engine {

void check_hashes(const checkpoint::Catalogue& catalogue, std::span<const ReadTensor> tensors,
                  int threads) {
  const auto hashes = checkpoint::TensorHashes::read(catalogue.folder());
  if (!hashes) return;
  ThreadPool pool(threads);
  pool.parallel_for(static_cast<std::int64_t>(tensors.size()), 1,
                    [&](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t i = begin; i < end; ++i) {
                        const ReadTensor& read = tensors[static_cast<std::size_t>(i)];
                        hashes->check(catalogue, *read.tensor, {read.bytes, read.tensor->bytes});
                      }
                    });
}

}  // namespace dsfp4::engine
