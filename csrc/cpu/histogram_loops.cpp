#include "histogram_loops.h"

#include "../numerics/affine.h"
#include "fake_quantize_loops.h"

#define QK_LOOPS "histogram_loops_body.h"
#include "foreach_isa.h"
#include "isa.h"

namespace quantkern::cpu {

const HistogramLoops& histogram_loops() { return QK_PICK_ISA(histogram_loops); }

}  // namespace quantkern::cpu
