"""The kinds of kernels an operation can run on, and the only place that chooses among them."""

from __future__ import annotations

import enum
import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkern import ops  # noqa: F401  has_native asks for the operators
from quantkern import triton as triton_twins


class Backend(enum.Enum):
    """Which kernels compute an operation; pass one as ``backend=`` to any function of quantkern.functional.

    AUTO takes the native kernels where this build has them for the tensor's device, else Triton where it can run,
    else the reference; a fallback to Triton or the reference is announced once. ``quantkern.backends()`` shows what
    AUTO means here.

    >>> Backend.REFERENCE.value
    'reference'
    """

    AUTO = "auto"
    NATIVE = "native"
    TRITON = "triton"
    REFERENCE = "reference"


@functools.cache
def has_native(device_type: str) -> bool:
    """Whether this build has compiled kernels for tensors on ``device_type``."""
    if device_type == "meta":
        return True
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("quantkern::fake_quantize_forward", key)


def _automatic(device_type: str) -> tuple[Backend, str]:
    """What AUTO means for tensors on a device, and why."""
    if has_native(device_type):
        return Backend.NATIVE, f"compiled kernels for {device_type} are in this build"
    runs, why = triton_twins.available(device_type)
    choice = Backend.TRITON if runs else Backend.REFERENCE
    return choice, f"this build has no compiled kernels for {device_type}; Triton: {why}"


@functools.cache
def choose_backend(device_type: str) -> tuple[Backend, str]:
    """What AUTO means for tensors on a device, and why; a fallback is announced, once."""
    choice, reason = _automatic(device_type)
    if choice is not Backend.NATIVE:
        slow = " (plain PyTorch, slow)" if choice is Backend.REFERENCE else ""
        warnings.warn(f"quantkern runs its {choice.value} kernels{slow} on {device_type}: {reason}", stacklevel=4)
    return choice, reason


@dataclass(frozen=True)
class Backends:
    """What ``backends()`` found; print it for a readable list.

    chosen: device type -> what AUTO runs there and why. triton: device type -> whether the Triton kernels can run
    and why. cpu_capability: the instruction set the CPU kernels run on, of cpu_capabilities, slowest first.
    cuda_archs: what the CUDA kernels were compiled for, empty in a CPU build.
    """

    chosen: dict[str, tuple[Backend, str]]
    triton: dict[str, tuple[bool, str]]
    cpu_capability: str
    cpu_capabilities: tuple[str, ...]
    cuda_archs: tuple[str, ...]
    torch_version: str

    def __str__(self) -> str:
        lines = [f"{device}: {choice.value} ({reason})" for device, (choice, reason) in self.chosen.items()]
        lines += [
            f"triton on {device}: {'yes' if runs else 'no'} ({why})" for device, (runs, why) in self.triton.items()
        ]
        lines.append(f"CPU kernels run on {self.cpu_capability}; this processor has {', '.join(self.cpu_capabilities)}")
        lines.append(f"CUDA kernels compiled for: {', '.join(self.cuda_archs) or 'none, this is a CPU build'}")
        return "\n".join([*lines, f"built for torch {self.torch_version}"])


def backends() -> Backends:
    """Which kernels exist here, which run for what, and why.

    >>> print(backends())  # doctest: +ELLIPSIS
    cpu: native (compiled kernels for cpu are in this build)
    cuda: ...
    """
    from quantkern import _C

    devices = ("cpu", "cuda")
    return Backends(
        chosen={device: _automatic(device) for device in devices},
        triton={device: triton_twins.available(device) for device in devices},
        cpu_capability=_C.cpu_capability(),
        cpu_capabilities=tuple(_C.supported_cpu_capabilities()),
        cuda_archs=tuple(arch for arch in _C.CUDA_ARCHS.split(";") if arch),
        torch_version=torch.__version__,
    )


# Looked up on the path of every small call, and by torch.compile, which must not trace the question.
_NATIVE = {device: Backend.NATIVE for device in ("cpu", "cuda", "meta") if has_native(device)}


def resolve(x: Tensor, backend: Backend) -> Backend:
    """The backend that will run; asking for one that cannot is an error."""
    if backend is Backend.AUTO:
        return _NATIVE.get(x.device.type) or choose_backend(x.device.type)[0]
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be a member of quantkern.Backend, got {backend!r}")
    if backend is Backend.NATIVE and not has_native(x.device.type):
        raise RuntimeError(
            f"backend=Backend.NATIVE: this build has no compiled kernels for {x.device.type}; "
            "use Backend.AUTO, or rebuild with QUANTKERN_CUDA=1 for CUDA tensors"
        )
    if backend is Backend.TRITON:
        runs, why = triton_twins.available(x.device.type)
        if not runs:
            raise RuntimeError(f"backend=Backend.TRITON cannot run on {x.device.type}: {why}")
    return backend
