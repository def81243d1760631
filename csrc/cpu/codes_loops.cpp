#include "codes_loops.h"

#include "../numerics/affine.h"

#define QK_LOOPS "codes_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const CodesLoops& codes_loops() { return QK_PICK_ISA(codes_loops); }

}  // namespace quantkern::cpu
