// The dense weights of layers that do not lie in the model's memory all the time.
#pragma once

#include <cstdint>

namespace dsfp4::residency {

class DenseLayers {
 public:
  virtual ~DenseLayers() = default;
  DenseLayers(const DenseLayers&) = delete;
  DenseLayers& operator=(const DenseLayers&) = delete;

  /// Brings the layer's weights to where its views point, for ops that follow; waits for at most
  /// kPollPeriod: false, they are not there yet, ask again. Called for every layer of a step, in
  /// order; one that is in memory all the time takes nothing. Who needs a layer over several turns
  /// enters it again at each: it may have been given up for another step's, and is then brought
  /// anew. What it throws names the layer, which may be entered again then.
  virtual bool enter(std::int64_t layer) = 0;
  /// The weights are no longer needed in this step, or no longer waited for.
  virtual void leave(std::int64_t layer) noexcept = 0;

  /// A layer that is waited for and then entered, until this is destroyed. `layers` may be null.
  class Use {
   public:
    Use(DenseLayers* layers, std::int64_t layer) : layers_(layers), layer_(layer) {}
    ~Use() {
      if (layers_ != nullptr) layers_->leave(layer_);
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

    bool enter() { return layers_ == nullptr || layers_->enter(layer_); }

   private:
    DenseLayers* layers_;
    std::int64_t layer_;
  };

 protected:
  DenseLayers() = default;
};

}  // namespace dsfp4::residency
