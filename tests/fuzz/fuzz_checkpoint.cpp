// libFuzzer target: arbitrary bytes in the place of one file of a sound checkpoint. The first byte
// of an input says which file; for a header without its length prefix, the next two bytes are how
// many bytes of data follow it (little endian).
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string_view>

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"
#include "checkpoint/summary.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "fuzz_input.h"

namespace {

using dsfp4::testing::TinyCheckpoint;
namespace fs = std::filesystem;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

// A sound checkpoint in a folder, with one file at a time replaced.
class Target {
 public:
  Target() : sound_(dsfp4::testing::make_tiny_checkpoint(dsfp4::testing::TinyKind::kNvfp4)) {
    sound_.write(folder_.path());
  }

  void run(std::string_view input) {
    const dsfp4::fuzz::Input part = dsfp4::fuzz::take_apart(input, sound_);
    if (part.file != damaged_.file) mend();
    damaged_ = part;
    dsfp4::testing::write_file(folder_.path() / part.file, part.bytes);
    try {
      open();
    } catch (const dsfp4::CheckpointError& error) {
      expect(!error.file().empty(), "a CheckpointError names its file");
      expect(*error.what() != '\0', "an error has a message");
    } catch (const dsfp4::Error& error) {
      expect(*error.what() != '\0', "an error has a message");
    }
  }

 private:
  void mend() const {
    if (!damaged_.file.empty()) {
      dsfp4::testing::write_file(folder_.path() / damaged_.file, damaged_.sound);
    }
  }

  void open() const {
    const auto catalogue = dsfp4::checkpoint::Catalogue::open(folder_.path());
    for (const auto& tensor : catalogue.tensors()) {
      const std::uint64_t size = fs::file_size(catalogue.files().at(tensor.file));
      expect(tensor.offset <= size && tensor.bytes <= size - tensor.offset,
             "a tensor lies inside its file");
      expect(catalogue.find(tensor.name) == &tensor, "a tensor is found by its name");
    }
    const auto config = dsfp4::checkpoint::read_config(folder_.path());
    const auto layout = dsfp4::checkpoint::resolve_layout(catalogue, config);
    expect(layout.layers.size() == static_cast<std::size_t>(config.num_hidden_layers),
           "every layer is there");
    const auto summary = dsfp4::checkpoint::summarize(catalogue, config, layout);
    expect(summary.tensors == catalogue.tensors().size(), "every tensor is counted");
  }

  const TinyCheckpoint sound_;
  dsfp4::fuzz::Input damaged_;  // the last one
  dsfp4::testing::ScratchFolder folder_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Target target;
  target.run({reinterpret_cast<const char*>(data), size});
  return 0;
}
