// torch's loop over threads on std::thread, preloaded for ThreadSanitizer, which does not see how OpenMP's synchronise.
// DIL_PLANTED_RACE=1: every part of a loop changes one number.
#include <cstdlib>

#include "../emulation/loop_on_threads.h"

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  static const bool planted_race = std::getenv("DIL_PLANTED_RACE") != nullptr;
  const int64_t parts = end - begin < 4 ? end - begin : 4;  // whatever the grain: the problems of tests are small
  loop_on_threads(parts, begin, end, f, context, planted_race);
  return 0;
}
