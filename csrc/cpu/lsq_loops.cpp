#include "lsq_loops.h"

#define QK_LOOPS "lsq_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const LsqLoops& lsq_loops() { return QK_PICK_ISA(lsq_loops); }

}  // namespace quantkern::cpu
