#include "fake_quantize_loops.h"

#define QK_LOOPS "fake_quantize_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const FakeQuantizeLoops& fake_quantize_loops() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512:
      return avx512::fake_quantize_loops;
    case Isa::kAvx2:
      return avx2::fake_quantize_loops;
    case Isa::kBaseline:
      break;
  }
#endif
  return baseline::fake_quantize_loops;
}

}  // namespace quantkern::cpu
