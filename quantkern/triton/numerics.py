"""What is computed, one element at a time: the Triton twin of csrc/numerics, under the same names.

    q = clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max), y = (q - zero_point) * scale
    symmetric  scale = max|x| / ((quant_max - quant_min) / 2); zero_point = 0, or the middle of an unsigned range
    affine     scale = (max - min) / (quant_max - quant_min), the range first extended to hold 0;
               zero_point = clamp(quant_min - rint(min / scale), quant_min, quant_max)
    EMA        running = running * keep + batch * take; the first batch stands for "running"

All arithmetic is float32 and equals the reference bit for bit. Three things see to that: kernels are launched with
``layout.LAUNCH`` (no contraction of a * b + c), divisions are ``div_rn`` (``/`` may be an approximation on a GPU) and
rounding adds and takes away 1.5 * 2^23, which is to nearest even everywhere, the interpreter included.

min_lane and max_lane return their second argument when the comparison is false: with the data second NaN survives,
with it first NaN is dropped.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018 (eq. 1, sections 3 and 3.1).
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl

SMALLEST_SCALE = tl.constexpr(2.0**-126)
ROUNDING_MAGIC = tl.constexpr(12582912.0)
ROUNDING_LIMIT = tl.constexpr(4194304.0)


@triton.jit
def min_lane(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a where it is less, else b."""
    return tl.where(a < b, a, b)


@triton.jit
def max_lane(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a where it is greater, else b."""
    return tl.where(a > b, a, b)


@triton.jit
def is_finite(v: tl.tensor) -> tl.tensor:
    """Neither infinite nor NaN."""
    return v - v == 0.0


@triton.jit
def round_even(v: tl.tensor) -> tl.tensor:
    """To the nearest integer, ties to even."""
    # NaN and what lies beyond every quant_min and quant_max pass through.
    small = (v < ROUNDING_LIMIT) & (v > -ROUNDING_LIMIT)
    return tl.where(small, (v + ROUNDING_MAGIC) - ROUNDING_MAGIC, v)


INTERPRETED = tl.constexpr(not isinstance(round_even, triton.JITFunction))
"""Whether these functions run in Triton's interpreter."""


@triton.jit
def widen(x: tl.tensor) -> tl.tensor:
    """An element in its storage format as float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's own bfloat16 conversions get subnormals wrong.
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(y: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 rounded to nearest even in the storage format."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts bfloat16 off instead of rounding it.
        bits = y.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(y == y, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = y.to(dtype)
    return stored


@triton.jit
def reciprocal_scale(scale: tl.tensor) -> tl.tensor:
    """1 / scale, or NaN, which turns every y into NaN, where the scale is not positive and finite with its inverse."""
    inverse = tl.div_rn(1.0, scale)
    usable = (scale > 0.0) & is_finite(scale) & is_finite(inverse)
    return tl.where(usable, inverse, float("nan"))


@triton.jit
def fake_quantize_lane(
    x: tl.tensor,
    inverse: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """(y, whether the gradient passes)."""
    rounded = round_even(x * inverse) + zero_point
    clamped = min_lane(quant_max, max_lane(quant_min, rounded))
    return (clamped - zero_point) * scale, rounded == clamped


@triton.jit
def merge(low: tl.tensor, high: tl.tensor, v: tl.tensor, inside: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Take v into the range where ``inside``; NaN is left out."""
    return tl.where(inside & (v < low), v, low), tl.where(inside & (v > high), v, high)


@triton.jit
def choose_scale(
    low: tl.tensor, high: tl.tensor, quant_min: tl.tensor, quant_max: tl.tensor, symmetric: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and zero point, both float32, of the range [low, high]."""
    low = min_lane(low, 0.0)
    high = max_lane(high, 0.0)
    steps = quant_max - quant_min
    smallest = tl.cast(SMALLEST_SCALE, tl.float32)
    if symmetric:
        scale = max_lane(smallest, tl.div_rn(max_lane(-low, high), steps * 0.5))
        # A quarter below the middle: a middle between two integers is rounded down, no other moves.
        zero_point = tl.where(quant_min < 0.0, 0.0, round_even((quant_min + quant_max) * 0.5 - 0.25))
    else:
        width = high - low
        # high - low may overflow where each of them is finite.
        wide = tl.div_rn(high, steps) - tl.div_rn(low, steps)
        scale = max_lane(smallest, tl.where(is_finite(width), tl.div_rn(width, steps), wide))
        zero_point = quant_min - round_even(tl.div_rn(low, scale))
        zero_point = min_lane(quant_max, max_lane(quant_min, zero_point))
        # An infinite range has no zero point; its scale is infinite too and makes every y NaN.
        zero_point = tl.where(zero_point == zero_point, zero_point, quant_min)
    return scale, zero_point


@triton.jit
def update_running(
    running_min: tl.tensor, running_max: tl.tensor, low: tl.tensor, high: tl.tensor, keep: tl.tensor, take: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The running range after a batch; one without a finite range (empty, all NaN, with an infinity) is left out."""
    usable = is_finite(low) & is_finite(high)
    first = (running_min <= running_max) == 0
    new_min = tl.where(first, low, running_min) * keep + low * take
    new_max = tl.where(first, high, running_max) * keep + high * take
    return tl.where(usable, new_min, running_min), tl.where(usable, new_max, running_max)
