// Compiles the loops in the file QK_LOOPS once per instruction set, each in a namespace of its own:
// quantkern::cpu::{baseline,avx2,avx512}. No compiler flag of the library changes, so nothing outside these
// namespaces can end up using instructions the processor lacks.
#include <array>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../numerics/dtype.h"
#include "../numerics/ranges.h"
#include "float_bits.h"
#include "stream_fence.h"

#ifndef QK_LOOPS
#error "define QK_LOOPS as the file with the loops"
#endif

#define QK_LANE static inline __attribute__((always_inline))
#define QK_MEMBER inline __attribute__((always_inline))

namespace quantkern::cpu::baseline {
#include "vec_generic.h"
#include "../numerics/affine_lane.h"
#include "../numerics/lsq_lane.h"
#include "../numerics/dorefa_lane.h"
using FloatVec = Lanes<float>;
#include "vec_of.h"
#include QK_LOOPS
}  // namespace quantkern::cpu::baseline

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace quantkern::cpu::avx2 {
#include "vec_generic.h"
#include "vec_avx2.h"
#include "../numerics/affine_lane.h"
#include "../numerics/lsq_lane.h"
#include "../numerics/dorefa_lane.h"
using FloatVec = Vec8;
#include "vec_of.h"
#include QK_LOOPS
}  // namespace quantkern::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
namespace quantkern::cpu::avx512 {
#include "vec_generic.h"
#include "vec_avx512.h"
#include "../numerics/affine_lane.h"
#include "../numerics/lsq_lane.h"
#include "../numerics/dorefa_lane.h"
using FloatVec = Vec16;
#include "vec_of.h"
#include QK_LOOPS
}  // namespace quantkern::cpu::avx512
#pragma GCC pop_options
#endif

#undef QK_LANE
#undef QK_MEMBER
