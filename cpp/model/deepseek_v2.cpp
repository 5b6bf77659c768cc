// DeepSeek-V2 and V2-Lite: softmax over all experts; V2 keeps the groups whose best expert scores
// highest. The weights are the scores themselves, not normalised.
#include "dsfp4/error.h"
#include "model/spec.h"

namespace dsfp4::model {

ops::RouterSpec deepseek_v2_router(const checkpoint::ModelConfig& config) {
  if (config.scoring_func != checkpoint::Scoring::kSoftmax ||
      config.topk_method == checkpoint::TopkMethod::kNoauxTc || config.norm_topk_prob) {
    throw UnsupportedError(
        "a deepseek_v2 checkpoint must have scoring_func 'softmax', topk_method 'greedy' or "
        "'group_limited_greedy' and norm_topk_prob false");
  }
  ops::RouterSpec router;
  router.experts = config.n_routed_experts;
  router.top_k = config.num_experts_per_tok;
  if (config.topk_method == checkpoint::TopkMethod::kGroupLimitedGreedy) {
    router.groups = config.n_group;
    router.kept_groups = config.topk_group;
  }
  router.scoring = ops::RouterSpec::Scoring::kSoftmax;
  router.group_score = ops::RouterSpec::GroupScore::kMax;
  router.normalize = false;
  router.scaling_factor = static_cast<float>(config.routed_scaling_factor);
  return router;
}

}  // namespace dsfp4::model
