// A loop of torch's on std::thread, for ThreadSanitizer, which cannot see how torch's own threads synchronise.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

static int64_t visits = 0;  // of a loop with a planted race, in which every part changes it

// Calls f on as many parts of [begin, end), each on a thread of its own.
static void loop_on_threads(
    int64_t parts, int64_t begin, int64_t end, void (*f)(int64_t, int64_t, void*), void* context, bool planted_race) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i) {
    threads.emplace_back([=] {
      if (planted_race) ++visits;
      f(begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
}
