// The formulas of lsq_lane.h for scalars, on the host and on a device.
#pragma once

#include "affine.h"

namespace quantkern {
#include "lsq_lane.h"
}  // namespace quantkern
