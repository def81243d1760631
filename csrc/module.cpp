// The Python module quantkern._C: what was built, and which CPU instruction set runs. Operators live in torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

#ifndef QK_CUDA_ARCHS
#define QK_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_C, m) {
  namespace cpu = quantkern::cpu;
  m.attr("CUDA_ARCHS") = QK_CUDA_ARCHS;
  m.def(
      "cpu_capability", [] { return cpu::isa_name(cpu::current_isa()); },
      "The instruction set the CPU kernels run on.");
  m.def("supported_cpu_capabilities", &cpu::supported_isas, "Those this processor has, slowest first.");
  m.def("set_cpu_capability", &cpu::set_isa, "Lower the instruction set; for tests.");
}
