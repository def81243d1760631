"""Runs every operation on a few numbers and compares it with the reference: ``python -m quantkern`` prints the result.

No test of the library, but of an installation: wrong kernels, a broken driver, a wheel for another machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkern import functional as F
from quantkern.backend import Backend, choose_backend
from quantkern.triton import available

Call = Callable[[torch.device, Backend], Sequence[Tensor]]

SUMS = 1e-5
"""Relative; sums in another order, tanh and exp of another library."""


@dataclass(frozen=True)
class Verdict:
    """One operation on one device: ``differs`` is empty where it gives what the reference gives.

    >>> print(Verdict("lsq", "cpu", "native", ""))
    lsq                       cpu native     ok
    """

    operation: str
    device: str
    backend: str
    differs: str

    @property
    def ok(self) -> bool:
        """Whether results and gradients agree."""
        return not self.differs

    def __str__(self) -> str:
        return f"{self.operation:25} {f'{self.device} {self.backend}':14} {self.differs or 'ok'}"


def _numbers(device: torch.device, *shape: int) -> Tensor:
    """About +-3, with values between the steps, without ties; the same everywhere."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64).mul(2.399963).sin() * 3).view(shape).float().to(device)


def _packed(device: torch.device, backend: Backend, *shape: int) -> Tensor:
    packed = F.pack_signs(_numbers(device, *shape), backend=backend)
    assert isinstance(packed, Tensor)
    return packed


def _with_gradients(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The result, and the gradient of every argument."""
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = run(*inputs)
    torch.autograd.backward([y], [_numbers(y.device, *y.shape).cos()])
    return [y.detach(), *(leaf.grad for leaf in inputs if leaf.grad is not None)]


def _fake_quantize(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    scale, zero = torch.tensor([0.3, 0.7], device=device), torch.tensor([1, -2], dtype=torch.int32, device=device)
    one = _with_gradients(lambda x: F.fake_quantize(x, 0.4, 1, -4, 3, backend=backend), _numbers(device, 2, 19))
    return one + _with_gradients(
        lambda x: F.fake_quantize(x, scale, zero, -4, 3, 0, backend=backend), _numbers(device, 2, 19)
    )


def _weight(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    scale, zero = torch.zeros(3, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    run = functools.partial(F.fake_quantize_weight, symmetric=False, axis=0, backend=backend)
    return [*_with_gradients(lambda w: run(w, scale, zero, 0, 15), _numbers(device, 3, 17)), scale, zero]


def _weights(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    shapes: tuple[tuple[int, ...], ...] = ((), (4,))
    scales = [torch.zeros(shape, device=device) for shape in shapes]
    zeros = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]
    rules = [0, -7], [15, 7], [False, True], [None, 0]

    def run(*xs: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in F.fake_quantize_weights(xs, scales, zeros, *rules, backend=backend)])

    return [*_with_gradients(run, _numbers(device, 5, 7), _numbers(device, 4, 9)), *scales, *zeros]


def _lsq_weights(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    def run(x: Tensor, other: Tensor, scale: Tensor, scales: Tensor) -> Tensor:
        ys = F.lsq_weights([x, other], [scale, scales], [-4, -8], [3, 7], [None, 0], backend=backend)
        return torch.cat([y.flatten() for y in ys])

    steps = torch.tensor(0.3, device=device), torch.tensor([0.3, 0.7], device=device)
    return _with_gradients(run, _numbers(device, 3, 5), _numbers(device, 2, 19), *steps)


def _activation(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    low, high, scale = (torch.full((), value, device=device) for value in (-0.5, 0.5, 0.0))
    zero, observing = torch.zeros((), dtype=torch.int32, device=device), torch.ones((), dtype=torch.bool, device=device)

    def run(x: Tensor) -> Tensor:
        return F.fake_quantize_activation(x, low, high, scale, zero, observing, 0, 255, False, 0.9, backend=backend)

    return [*_with_gradients(run, _numbers(device, 5, 13)), low, high, scale, zero]


def _lsq(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    scale, zero = torch.tensor([0.3, 0.7], device=device), torch.tensor([0.25, -1.5], device=device)
    return _with_gradients(
        lambda x, s, z: F.lsq(x, s, -4, 3, 0, zero_point=z, backend=backend), _numbers(device, 2, 19), scale, zero
    )


def _gradient(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    return _with_gradients(lambda x: F.dorefa_gradient(x, 4, seed=7, backend=backend), _numbers(device, 3, 19))


def _quantize_gradient(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    return [F.quantize_gradient(_numbers(device, 3, 19), 4, torch.tensor(7, device=device), backend=backend)]


def _elementwise(function: Callable[..., Tensor], *arguments: float) -> Call:
    def call(device: torch.device, backend: Backend) -> Sequence[Tensor]:
        return _with_gradients(lambda x: function(x, *arguments, backend=backend), _numbers(device, 3, 19))

    return call


def _pack(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    found = F.pack_signs(_numbers(device, 2, 35, 3, 5), 1, counts=True, backend=backend)
    assert isinstance(found, tuple)
    return found


def _unpack(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    return [F.unpack_signs(_packed(device, backend, 3, 70), 70, backend=backend)]


def _thresholds(device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.int32, device=device) - 2, torch.tensor(
        [5], dtype=torch.int32, device=device
    )


def _matmul(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    a, b = _packed(device, backend, 5, 70), _packed(device, backend, 7, 70)
    return [F.binary_matmul(a, b, 70, scale=_numbers(device, 7), bias=_numbers(device, 7), backend=backend)]


def _arranged(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    a, b = _packed(device, backend, 5, 70), _packed(device, backend, 7, 70)
    arranged = None if backend is Backend.REFERENCE else F.arrange_signs(b)
    return [F.binary_matmul(a, b, 70, arranged=arranged, backend=backend)]


def _matmul_sign(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    a, b = _packed(device, backend, 5, 70), _packed(device, backend, 7, 70)
    return [F.binary_matmul_sign(a, b, 70, *_thresholds(device, 7), backend=backend)]


def _linear(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    weight = _packed(device, backend, 7, 70)
    return [F.binary_linear(_numbers(device, 2, 5, 70), weight, 70, _numbers(device, 7), backend=backend)]


def _conv(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    taps = _packed(device, backend, 5, 3, 3, 35)
    return [F.binary_conv2d(_numbers(device, 2, 35, 7, 6), taps, _numbers(device, 5), 2, 1, backend=backend)]


def _conv_sign(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    x, taps = _packed(device, backend, 2, 7, 6, 35), _packed(device, backend, 5, 3, 3, 35)
    return [F.binary_conv2d_sign(x, taps, 35, *_thresholds(device, 5), 1, 1, backend=backend)]


def _pool(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    flip = torch.tensor([9, 1], dtype=torch.int32, device=device)
    return [F.packed_max_pool2d(_packed(device, backend, 2, 6, 8, 35), flip, 2, backend=backend)]


def _sign_linear(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    run = functools.partial(F.sign_linear, backend=backend)
    return _with_gradients(run, _numbers(device, 4, 35), _numbers(device, 6, 35), _numbers(device, 6))


def _sign_conv(device: torch.device, backend: Backend) -> Sequence[Tensor]:
    run = functools.partial(F.sign_conv2d, padding=1, backend=backend)
    return _with_gradients(run, _numbers(device, 2, 5, 6, 5), _numbers(device, 3, 5, 3, 3), _numbers(device, 3))


OPERATIONS: dict[str, tuple[Call, float]] = {
    "fake_quantize": (_fake_quantize, 0),
    "fake_quantize_weight": (_weight, 0),
    "fake_quantize_weights": (_weights, 0),
    "fake_quantize_activation": (_activation, 0),
    "lsq": (_lsq, SUMS),
    "lsq_weights": (_lsq_weights, SUMS),
    "dorefa_weight": (_elementwise(F.dorefa_weight, 3), SUMS),
    "dorefa_activation": (_elementwise(F.dorefa_activation, 3), 0),
    "dorefa_gradient": (_gradient, 0),
    "quantize_gradient": (_quantize_gradient, 0),
    "clip_activation": (_elementwise(F.clip_activation, -1.0, 2.0), 0),
    "binarize": (_elementwise(F.binarize), 0),
    "pack_signs": (_pack, 0),
    "unpack_signs": (_unpack, 0),
    "arrange_signs": (_arranged, 0),
    "binary_matmul": (_matmul, 0),
    "binary_matmul_sign": (_matmul_sign, 0),
    "binary_linear": (_linear, 0),
    "binary_conv2d": (_conv, 0),
    "binary_conv2d_sign": (_conv_sign, 0),
    "packed_max_pool2d": (_pool, 0),
    "sign_linear": (_sign_linear, SUMS),
    "sign_conv2d": (_sign_conv, SUMS),
}
"""Every function of quantkern.functional: how to call it, and how far it may be from the reference."""


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """What differs, in words; empty where nothing does."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        if one.shape != other.shape or one.dtype != other.dtype:
            return (
                f"result {number} is {one.dtype} {list(one.shape)}, the reference's {other.dtype} {list(other.shape)}"
            )
        mine, right = one.double(), other.double()
        same = (mine == right) | ((mine - right).abs() <= tolerance * right.abs().clamp(min=1))
        if not bool(same.all()):
            place = tuple((~same).nonzero()[0].tolist())
            return (
                f"result {number} differs in {int((~same).sum())} of {same.numel()} elements, the first at "
                f"{list(place)}: {mine[place].item():.9g}, expected {right[place].item():.9g}"
            )
    return ""


def check(operation: str, device: torch.device, backend: Backend) -> Verdict:
    """Run one operation on a few numbers, its gradients too, and compare with the reference on the CPU.

    >>> check("binarize", torch.device("cpu"), Backend.AUTO).ok
    True
    """
    call, tolerance = OPERATIONS[operation]
    name = choose_backend(device.type)[0].value if backend is Backend.AUTO else backend.value
    try:
        expected = call(torch.device("cpu"), Backend.REFERENCE)
        differs = _difference([one.cpu() for one in call(device, backend)], expected, tolerance)
    except Exception as error:  # whatever it is, it is the finding, and the other operations are checked too
        differs = f"{type(error).__name__}: {error}".splitlines()[0]
    return Verdict(operation, device.type, name, differs)


def check_all() -> Iterator[Verdict]:
    """Every operation on every device that is here, on what AUTO takes and on Triton where that can run."""
    for device in [torch.device(name) for name in ("cpu", "cuda") if name == "cpu" or torch.cuda.is_available()]:
        backends = [Backend.AUTO]
        if choose_backend(device.type)[0] is not Backend.TRITON and available(device.type)[0]:
            backends.append(Backend.TRITON)
        for backend in backends:
            yield from (check(operation, device, backend) for operation in OPERATIONS)
