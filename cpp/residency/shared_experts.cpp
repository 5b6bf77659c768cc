#include "residency/shared_experts.h"

#include "residency/expert_tasks.h"

namespace dsfp4::residency {
namespace {

class Done final : public ExpertWork {
 public:
  bool advance() override { return false; }
};

}  // namespace

std::unique_ptr<ExpertWork> SharedExperts::start(const ExpertLayer& layer, memory::Arena& arena,
                                                 ReadAhead& /*ahead*/) {
  shared_into(layer, ops_, arena);
  return std::make_unique<Done>();
}

}  // namespace dsfp4::residency
