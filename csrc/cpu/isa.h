// Which instruction set the CPU kernels run on: the best one this processor has, found once. Tests lower it.
#pragma once

#include <string>
#include <vector>

namespace quantkern::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa current_isa();
// Whether AVX-512 has VPOPCNTDQ here, which its first processors lack.
bool has_vector_popcount();
// Throws std::invalid_argument for a name that is unknown or that this processor lacks.
void set_isa(const std::string& name);
std::vector<std::string> supported_isas();
std::string isa_name(Isa isa);

}  // namespace quantkern::cpu

// `name` of the instruction set in force, one of those that foreach_isa.h compiled.
#if defined(__x86_64__)
#define QK_PICK_ISA(name) \
  (current_isa() == Isa::kAvx512 ? avx512::name : current_isa() == Isa::kAvx2 ? avx2::name : baseline::name)
#else
#define QK_PICK_ISA(name) baseline::name
#endif
