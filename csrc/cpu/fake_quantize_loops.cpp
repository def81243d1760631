#include "fake_quantize_loops.h"

#define QK_LOOPS "fake_quantize_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const FakeQuantizeLoops& fake_quantize_loops() { return QK_PICK_ISA(fake_quantize_loops); }

}  // namespace quantkern::cpu
