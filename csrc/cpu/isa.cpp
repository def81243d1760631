#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace quantkern::cpu {
namespace {

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return is_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa best_isa() {
  if (is_supported(Isa::kAvx512)) return Isa::kAvx512;
  return is_supported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool has_vector_popcount() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

std::string isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (is_supported(isa)) names.push_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  for (Isa isa : kAll) {
    if (isa_name(isa) != name || !is_supported(isa)) continue;
    chosen().store(isa, std::memory_order_relaxed);
    return;
  }
  std::string have;
  for (const auto& each : supported_isas()) have += (have.empty() ? "" : ", ") + each;
  throw std::invalid_argument("this processor runs " + have + "; got " + name);
}

}  // namespace quantkern::cpu
