#include "engine/bench_timer.h"

#include <algorithm>
#include <vector>

namespace dsfp4::engine {

double CudaTimer::seconds_of(int rotate, const std::function<void(int)>& call) {
  float milliseconds = 0.0f;
  check(plugin_.synchronize(device_));
  for (int i = 0; i < rotate; ++i) call(i);
  check(plugin_.mark(device_, 0));
  call(0);
  check(plugin_.mark(device_, 1));
  check(plugin_.elapsed(device_, 0, 1, &milliseconds));
  if (milliseconds > 200.0f) return milliseconds * 1e-3;  // too slow to be worth repeating
  const int repeat =
      std::clamp(static_cast<int>(4.0f / (milliseconds * static_cast<float>(rotate))), 1, 8);
  check(plugin_.begin_capture(device_));
  for (int r = 0; r < repeat; ++r) {
    for (int i = 0; i < rotate; ++i) call(i);
  }
  void* graph = nullptr;
  check(plugin_.end_capture(device_, &graph));
  const double seconds = median_seconds([&] { check(plugin_.launch_graph(device_, graph)); });
  check(plugin_.free_graph(device_, graph));
  return seconds / (rotate * repeat);
}

double CudaTimer::seconds_queued(const std::function<void()>& call) {
  constexpr int kCalls = 8;
  const double seconds = median_seconds([&] {
    for (int i = 0; i < kCalls; ++i) call();
  });
  return seconds / kCalls;
}

double CudaTimer::median_seconds(const std::function<void()>& queue) {
  const auto run = [&] {
    float milliseconds = 0.0f;
    check(plugin_.mark(device_, 0));
    queue();
    check(plugin_.mark(device_, 1));
    check(plugin_.elapsed(device_, 0, 1, &milliseconds));
    return milliseconds;
  };
  // Until the clock is the one that this case runs at, not what the case before left.
  for (float warm = 0.0f; warm < 100.0f;) warm += run();
  std::vector<float> times(9);
  for (float& time : times) time = run();
  std::nth_element(times.begin(), times.begin() + 4, times.end());
  return times[4] * 1e-3;
}

}  // namespace dsfp4::engine
