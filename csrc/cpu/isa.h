// Which instruction set the CPU kernels run on: the best one this processor has, found once. Tests lower it.
#pragma once

#include <string>
#include <vector>

namespace quantkern::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa current_isa();
// Throws std::invalid_argument for a name that is unknown or that this processor lacks.
void set_isa(const std::string& name);
std::vector<std::string> supported_isas();
std::string isa_name(Isa isa);

}  // namespace quantkern::cpu
