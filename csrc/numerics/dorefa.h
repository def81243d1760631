// The formulas of dorefa_lane.h for scalars, on the host and on a device.
#pragma once

#include "affine.h"

namespace quantkern {
#include "dorefa_lane.h"
}  // namespace quantkern
