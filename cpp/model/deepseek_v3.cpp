// DeepSeek-V3, R1 and V3.1: sigmoid scores; a bias learned for load balance takes part in the
// choice only; groups are ranked by the sum of their best two; the weights are normalised.
#include "dsfp4/error.h"
#include "model/spec.h"

namespace dsfp4::model {

ops::RouterSpec deepseek_v3_router(const checkpoint::ModelConfig& config) {
  if (config.scoring_func != checkpoint::Scoring::kSigmoid ||
      config.topk_method != checkpoint::TopkMethod::kNoauxTc) {
    throw UnsupportedError(
        "a deepseek_v3 checkpoint must have scoring_func 'sigmoid' and topk_method 'noaux_tc'");
  }
  ops::RouterSpec router;
  router.experts = config.n_routed_experts;
  router.top_k = config.num_experts_per_tok;
  router.groups = config.n_group;
  router.kept_groups = config.topk_group;
  router.scoring = ops::RouterSpec::Scoring::kSigmoid;
  router.group_score = ops::RouterSpec::GroupScore::kSumOfTop2;
  router.normalize = config.norm_topk_prob;
  router.scaling_factor = static_cast<float>(config.routed_scaling_factor);
  return router;
}

}  // namespace dsfp4::model
