#include "dorefa_loops.h"

#include "../numerics/dorefa.h"
#include "../numerics/philox.h"
#include "fake_quantize_loops.h"

#define QK_LOOPS "dorefa_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const DorefaLoops& dorefa_loops() { return QK_PICK_ISA(dorefa_loops); }

}  // namespace quantkern::cpu
