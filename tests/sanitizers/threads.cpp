// torch's loop over threads on std::thread, preloaded for ThreadSanitizer, which does not see how OpenMP's synchronise.
// DIL_PLANTED_RACE=1: every part of a loop changes one number.
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

static int64_t visits = 0;

extern "C" int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  static const bool planted_race = std::getenv("DIL_PLANTED_RACE") != nullptr;
  const int64_t parts = end - begin < 4 ? end - begin : 4;  // whatever the grain: the problems of tests are small
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i) {
    threads.emplace_back([=] {
      if (planted_race) ++visits;
      f(begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
