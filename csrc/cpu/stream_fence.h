// Orders streamed stores before whatever the thread does next.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quantkern::cpu {

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace quantkern::cpu
