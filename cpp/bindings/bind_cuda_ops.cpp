// Single ops on tensors that lie on an NVIDIA GPU, DLPack in and out: what dsfp4.ops.cuda builds
// on. For tests. Every op waits for its results.
#include <memory>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/expert_tasks.h"
#include "format/block.h"
#include "ops/cuda_backend.h"
#include "ops/cuda_plugin.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;
using format::EncodedMatrix;
using Tensor = nb::ndarray<const float, nb::c_contig, nb::device::cuda>;
using SharedBackend = std::shared_ptr<ops::CudaBackend>;

/// Memory on the device, given back at the end.
class OnDevice {
 public:
  OnDevice(SharedBackend backend, std::size_t bytes, const char* purpose)
      : backend_(std::move(backend)), bytes_(std::max<std::size_t>(bytes, 1)) {
    memory_ = backend_->device().memory().take(bytes_, purpose);
  }
  OnDevice(OnDevice&& other) noexcept
      : backend_(std::move(other.backend_)),
        memory_(std::exchange(other.memory_, nullptr)),
        bytes_(other.bytes_) {}
  OnDevice& operator=(OnDevice&&) = delete;
  ~OnDevice() {
    if (memory_ != nullptr) backend_->device().memory().release(memory_, bytes_);
  }

  void fill(const void* from, std::size_t bytes) {
    backend_->device().upload(from, memory_, bytes);
  }
  std::byte* memory() const { return memory_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_);
  }

 private:
  SharedBackend backend_;
  std::byte* memory_ = nullptr;
  std::size_t bytes_;
};

/// A float matrix on the device that becomes the tensor that is returned.
class Result {
 public:
  Result(const SharedBackend& backend, std::int64_t rows, std::int64_t cols)
      : memory_(backend, static_cast<std::size_t>(rows * cols) * sizeof(float), "a result"),
        rows_(rows),
        cols_(cols) {}
  ops::Matrix view() const { return {memory_.as<float>(), rows_, cols_, cols_}; }
  nb::object tensor(int index) && {
    float* data = memory_.as<float>();
    auto kept = std::make_unique<OnDevice>(std::move(memory_));
    const nb::capsule owner(kept.get(),
                            [](void* memory) noexcept { delete static_cast<OnDevice*>(memory); });
    [[maybe_unused]] const OnDevice* owned = kept.release();  // by the capsule
    const std::size_t shape[] = {static_cast<std::size_t>(rows_), static_cast<std::size_t>(cols_)};
    return nb::cast(nb::ndarray<nb::array_api, float, nb::device::cuda>(
        data, 2, shape, owner, nullptr, nb::dtype<float>(), nb::device::cuda::value, index));
  }

 private:
  OnDevice memory_;
  std::int64_t rows_, cols_;
};

/// A weight whose bytes lie on the device.
struct CudaWeight {
  CudaWeight(const SharedBackend& backend, const EncodedMatrix& from)
      : data(backend, from.data.size(), "a weight"),
        scales(backend, from.scales.size(), "a weight's scales"),
        view(from.view()) {
    data.fill(from.data.data(), from.data.size());
    scales.fill(from.scales.data(), from.scales.size());
    view.data = data.memory();
    view.scales = scales.memory();
  }
  OnDevice data, scales;
  ops::WeightView view;
};

class CudaOps {
 public:
  explicit CudaOps(int index)
      : index_(index), backend_(std::make_shared<ops::CudaBackend>(ops::cuda_plugin(), index, 0)) {}

  std::uintptr_t stream() const {
    return reinterpret_cast<std::uintptr_t>(backend_->device().stream());
  }

  std::shared_ptr<CudaWeight> weight(const EncodedMatrix& from) const {
    return std::make_shared<CudaWeight>(backend_, from);
  }

  nb::object upload(const ConstArray<float>& array) const {
    require(array.ndim() == 2, "array", "must be two-dimensional");
    Result result(backend_, static_cast<std::int64_t>(array.shape(0)),
                  static_cast<std::int64_t>(array.shape(1)));
    backend_->device().upload(array.data(), result.view().data, array.nbytes());
    return done(std::move(result));
  }

  nb::object download(const Tensor& tensor) const {
    const ops::ConstMatrix x = matrix_of(tensor, "tensor");
    std::vector<float> values(tensor.size());
    backend_->device().download(x.data, values.data(), tensor.nbytes());
    return own_array(std::move(values), {tensor.shape(0), tensor.shape(1)});
  }

  nb::object linear(const CudaWeight& weight, const Tensor& tensor, bool exact_inputs) const {
    const ops::ConstMatrix x = matrix_of(tensor, "x");
    require(x.cols == weight.view.cols, "x", "must have as many columns as the weight");
    Result y(backend_, x.rows, weight.view.rows);
    backend_->linear(weight.view, x, y.view(), ops::Phase::kDecode,
                     exact_inputs ? ops::Inputs::kF32 : ops::Inputs::kBf16);
    return done(std::move(y));
  }

  nb::object rms_norm(const Tensor& tensor, const ConstArray<float>& weight, float eps) const {
    const ops::ConstMatrix x = matrix_of(tensor, "x");
    require(weight.size() == static_cast<std::size_t>(x.cols), "weight",
            "must have one value a column of x");
    OnDevice there(backend_, weight.nbytes(), "a norm's weight");
    there.fill(weight.data(), weight.nbytes());
    Result y(backend_, x.rows, x.cols);
    backend_->rms_norm(x, {there.as<const float>(), weight.size()}, eps, y.view());
    return done(std::move(y));
  }

  nb::object silu_mul(const Tensor& gate_tensor, const Tensor& up_tensor) const {
    const ops::ConstMatrix gate = matrix_of(gate_tensor, "gate");
    const ops::ConstMatrix up = matrix_of(up_tensor, "up");
    require(gate.rows == up.rows && gate.cols == up.cols, "up", "must have gate's shape");
    Result y(backend_, gate.rows, gate.cols);
    backend_->zero(y.view());
    backend_->add(gate, y.view());
    backend_->silu_mul(y.view(), up);
    return done(std::move(y));
  }

  /// `experts`: gate, up and down of each. `chosen`, `weights`: [rows of x, top_k], on the host.
  nb::object moe(const std::vector<std::shared_ptr<CudaWeight>>& weights_of_experts,
                 const Tensor& tensor, const ConstArray<std::int32_t>& chosen,
                 const ConstArray<float>& weights) const {
    const ops::ConstMatrix x = matrix_of(tensor, "x");
    std::vector<ops::WeightView> matrices;
    matrices.reserve(weights_of_experts.size());
    for (const auto& weight : weights_of_experts) matrices.push_back(weight->view);
    const ExpertTasks given(matrices, x, chosen, weights);
    OnDevice mixing(backend_, weights.nbytes(), "mixing weights");
    mixing.fill(weights.data(), weights.nbytes());
    const Result hidden(backend_, x.rows * given.top_k, given.experts.front().gate_proj.rows);
    const Result routed(backend_, x.rows * given.top_k, x.cols);
    Result y(backend_, x.rows, x.cols);
    backend_->zero(y.view());
    backend_->experts(given.tasks, given.top_k, x, hidden.view(), routed.view(),
                      ops::Phase::kDecode);
    backend_->combine(routed.view(), {mixing.as<const float>(), weights.size()}, given.top_k,
                      y.view());
    return done(std::move(y));
  }

 private:
  static ops::ConstMatrix matrix_of(const Tensor& tensor, const char* parameter) {
    require(tensor.ndim() == 2, parameter, "must be two-dimensional");
    const auto cols = static_cast<std::int64_t>(tensor.shape(1));
    return {tensor.data(), static_cast<std::int64_t>(tensor.shape(0)), cols, cols};
  }
  nb::object done(Result&& result) const {
    backend_->device().synchronize();
    return std::move(result).tensor(index_);
  }

  int index_;
  SharedBackend backend_;
};

}  // namespace

void bind_cuda_ops(nb::module_& m) {
  nb::class_<CudaWeight>(m, "CudaWeight", "A weight on the GPU; see dsfp4.ops.cuda.")
      .def_prop_ro("rows", [](const CudaWeight& weight) { return weight.view.rows; })
      .def_prop_ro("cols", [](const CudaWeight& weight) { return weight.view.cols; });
  nb::class_<CudaOps>(m, "CudaOps", "Computes single ops on the GPU; see dsfp4.ops.cuda.")
      .def(nb::init<int>(), nb::arg("index"))
      .def_prop_ro("stream", &CudaOps::stream)
      .def("weight", &CudaOps::weight, nb::arg("weight"))
      .def("upload", &CudaOps::upload, nb::arg("array"))
      .def("download", &CudaOps::download, nb::arg("tensor").noconvert())
      .def("linear", &CudaOps::linear, nb::arg("weight"), nb::arg("x").noconvert(),
           nb::arg("exact_inputs") = false)
      .def("rms_norm", &CudaOps::rms_norm, nb::arg("x").noconvert(), nb::arg("weight"),
           nb::arg("eps"))
      .def("silu_mul", &CudaOps::silu_mul, nb::arg("gate").noconvert(), nb::arg("up").noconvert())
      .def("moe", &CudaOps::moe, nb::arg("experts"), nb::arg("x").noconvert(), nb::arg("chosen"),
           nb::arg("weights"));
}

}  // namespace dsfp4::bindings
