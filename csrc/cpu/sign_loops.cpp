#include "sign_loops.h"

#include "../numerics/affine.h"
#include "../numerics/binary.h"
#include "fake_quantize_loops.h"

#define QK_LOOPS "sign_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const SignLoops& sign_loops() { return QK_PICK_ISA(sign_loops); }

}  // namespace quantkern::cpu
