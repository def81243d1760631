"""What is computed, one element at a time: the Triton twin of csrc/numerics, under the same names.

    q = clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max), y = (q - zero_point) * scale
    symmetric  scale = max|x| / ((quant_max - quant_min) / 2); zero_point = 0, or the middle of an unsigned range
    affine     scale = (max - min) / (quant_max - quant_min), the range first extended to hold 0;
               zero_point = clamp(quant_min - rint(min / scale), quant_min, quant_max)
    EMA        running = running * keep + batch * take; the first batch stands for "running"
    LSQ        the gradients of a learned step size and zero point
    DoReFa     q(z) = rint(z * n) / n, n = 2^bits - 1, of tanh(w), of clip(x, 0, 1) and, with Philox noise, of gradients
    signs      bit i % 32 of word i // 32 is 1 where x_i >= 0; words are uint32 in kernels, int32 in tensors

All arithmetic is float32 and equals the reference bit for bit. Three things see to that: kernels are launched with
``layout.LAUNCH`` (no contraction of a * b + c), divisions are ``div_rn`` (``/`` may be an approximation on a GPU) and
rounding adds and takes away 1.5 * 2^23, which is to nearest even everywhere, the interpreter included.

min_lane and max_lane return their second argument when the comparison is false: with the data second NaN survives,
with it first NaN is dropped.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018 (eq. 1, sections 3 and 3.1); Esser et al., "Learned Step Size Quantization", 2020 (eq. 3 and 5); Zhou et al.,
"DoReFa-Net", 2016 (sections 2.3 to 2.5); Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011;
Courbariaux et al., "Binarized Neural Networks", 2016 (sections 1.1 and 1.5).
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


@triton.jit
def largest_magnitude(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """max|x| of the range [low, high]; 0 where nothing was seen."""
    return tl.where(low <= high, max_lane(-low, high), 0.0)


@triton.jit
def with_sign_of(magnitude: tl.tensor, sign: tl.tensor) -> tl.tensor:
    """The float32 magnitude, not negative, with the sign of another number."""
    bits = (sign.to(tl.uint32, bitcast=True) & 0x80000000) | magnitude.to(tl.uint32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(n: tl.tensor) -> tl.tensor:
    """2^n for an integral float32 n from -126 to 127."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def lsq_gradient_lane(
    x: tl.tensor,
    grad: tl.tensor,
    inverse: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(whether the gradient of x passes, dscale, dzero_point); NaN counts as below."""
    v = x * inverse
    position = v + zero_point
    above_low = quant_min < position
    below_high = position < quant_max
    not_above = tl.where(below_high, round_even(v) - v, quant_max - zero_point)
    by_scale = tl.where(above_low, not_above, quant_min - zero_point)
    passes = above_low & below_high
    return passes, grad * by_scale, tl.where(passes, 0.0, 0.0 - scale * grad)


@triton.jit
def tanh_lane(x: tl.tensor) -> tl.tensor:
    """tanh to 1.4 units in the last place: an odd polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere."""
    a = tl.abs(x)
    u = x * x
    p = u * 0.0021274355240166187 + -0.008157853037118912
    p = p * u + 0.02169126458466053
    p = p * u + -0.05394458398222923
    p = p * u + 0.13333182036876678
    p = p * u + -0.333333283662796
    p = p * u + 1.0
    # e^t with t = 2|x| = n ln 2 + r; beyond 10 tanh is 1 in float32.
    t = min_lane(10.0, a) * 2.0
    n = round_even(t * 1.4426950408889634)
    r = (t - n * 0.693359375) - n * -2.12194440e-4
    e = r * 0.0013941108481958508 + 0.00837512593716383
    e = e * r + 0.04166635125875473
    e = e * r + 0.16666415333747864
    e = e * r + 0.5
    e = e * r + 1.0
    e = e * r + 1.0
    large = 1.0 - tl.div_rn(2.0, e * power_of_two(n) + 1.0)
    return tl.where(a < 0.625, x * p, with_sign_of(large, x))


@triton.jit
def dorefa_weight_lane(w: tl.tensor, width: tl.tensor, steps: tl.tensor) -> tl.tensor:
    """2 * q(tanh(w) / width + 1/2) - 1; width = 2 * tanh(max|w|), steps = n."""
    z = tl.div_rn(tanh_lane(w), width) + 0.5
    return 2.0 * tl.div_rn(round_even(z * steps), steps) - 1.0


@triton.jit
def dorefa_sign_lane(w: tl.tensor, mean: tl.tensor) -> tl.tensor:
    """sign(w) * mean with sign(0) = +1; NaN stays NaN."""
    return tl.where(w < 0.0, -mean, tl.where(w >= 0.0, mean, w))


@triton.jit
def dorefa_weight_gradient_lane(w: tl.tensor, grad: tl.tensor, largest: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(the gradient of w but for the part through the largest tanh, tanh(w), of which that part is made)."""
    t = tanh_lane(w)
    return tl.div_rn(grad, largest) * (1.0 - t * t), t


@triton.jit
def dorefa_activation_lane(x: tl.tensor, steps: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(q(clip(x, 0, 1)), whether the gradient passes)."""
    clipped = min_lane(1.0, max_lane(0.0, x))
    # round_even turns -0.0 into 0.0, as is asked for.
    return tl.div_rn(round_even(clipped * steps), steps), x == clipped


@triton.jit
def dorefa_gradient_lane(grad: tl.tensor, width: tl.tensor, steps: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """2 M (q(g / (2 M) + 1/2 + noise / n) - 1/2); width = 2 * M, noise in [-1/2, 1/2)."""
    q = min_lane(steps, max_lane(0.0, round_even((tl.div_rn(grad, width) + 0.5) * steps + noise)))
    return (tl.div_rn(q, steps) - 0.5) * width


@triton.jit
def philox(seed: tl.tensor, block: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four 32-bit words of Philox4x32-10 for each int64 block number under an int64 seed."""
    w0 = block.to(tl.uint32)
    w1 = (block >> 32).to(tl.uint32)
    w2 = tl.zeros_like(w0)
    w3 = tl.zeros_like(w0)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high_a = tl.umulhi(w0, 0xD2511F53)
        high_b = tl.umulhi(w2, 0xCD9E8D57)
        w3_next = tl.mul(w0, 0xD2511F53, sanitize_overflow=False)
        w0 = high_b ^ w1 ^ k0
        w1 = tl.mul(w2, 0xCD9E8D57, sanitize_overflow=False)
        w2 = high_a ^ w3 ^ k1
        w3 = w3_next
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return w0, w1, w2, w3


@triton.jit
def centered_uniform(word: tl.tensor) -> tl.tensor:
    """Uniform in [-1/2, 1/2), on a grid of 2^-24."""
    return (word >> 8).to(tl.float32) * 2.0**-24 - 0.5


@triton.jit
def sign_bit(x: tl.tensor) -> tl.tensor:
    """Whether the sign of a float32 x is +1: of 0.0 and -0.0 it is, of NaN it is not."""
    return x >= 0.0


@triton.jit
def popcount(word: tl.tensor) -> tl.tensor:
    """How many bits of a uint32 word are 1, as int32."""
    # Compilers know these steps for the machine's own instruction; a call to it could not be interpreted.
    v = word - ((word >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (tl.mul(v, 0x01010101, sanitize_overflow=False) >> 24).to(tl.int32)


@triton.jit
def as_words(stored: tl.tensor) -> tl.tensor:
    """int32 as it is stored as uint32, whose shifts bring in zeros."""
    return stored.to(tl.uint32, bitcast=True)


@triton.jit
def bits_in_use(word: tl.tensor, words: tl.tensor, last_bits: tl.tensor) -> tl.tensor:
    """1 where word number ``word`` of a row of ``words`` holds a sign; the last one holds last_bits of them."""
    full = tl.full(word.shape, 0xFFFFFFFF, tl.uint32)
    return tl.where(word == words - 1, full >> tl.cast(32 - last_bits, tl.uint32), full)


@triton.jit
def pack_bits(flags: tl.tensor, ROWS: tl.constexpr, WORDS: tl.constexpr) -> tl.tensor:
    """Flags [ROWS, WORDS * 32] as stored words [ROWS, WORDS]."""
    bits = tl.reshape(flags.to(tl.uint32), (ROWS, WORDS, 32)) << tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def spread_bits(
    words: tl.tensor, factor: tl.constexpr, less: tl.tensor, ROWS: tl.constexpr, WORDS: tl.constexpr
) -> tl.tensor:
    """bit * factor - less of words [ROWS, WORDS] as int8 [ROWS, WORDS * 32]; less is 0 or an int32 a word."""
    bits = ((words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1).to(tl.int32)
    if factor != 1:
        bits = bits * factor - less[:, :, None]
    return tl.reshape(bits, (ROWS, WORDS * 32)).to(tl.int8)
