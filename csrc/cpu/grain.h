#pragma once

#include <cstdint>

namespace dil {

// Items for one thread at least, when each is `size` elements of work: less is not worth waking another thread.
inline int64_t grain(int64_t size) {
  constexpr int64_t kElements = 32768;
  return size >= kElements ? 1 : kElements / (size > 0 ? size : 1);
}

}  // namespace dil
