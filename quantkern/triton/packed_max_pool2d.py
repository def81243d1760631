"""packed_max_pool2d: max pooling before the sign was taken, on packed signs: OR, or AND for flipped channels.

The file is not named after its operation alone, since a module hides a function of its own name in the package.

Layout: programs take ``layout.BLOCK`` neighbouring words of the result, each of which reads its window.
Who owns what: the host function owns the result.
Bytes: a word is read once a window it lies in, mostly from cache, and a word is written.
Numerics: AND is the OR of the turned bits, turned back. Padding takes no part.
"""

# triton ships no types, so triton.jit is untyped.
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl
from torch import Tensor

from quantkern.triton.layout import BLOCK, LAUNCH, blocks, index_type, on_device


@triton.jit
def packed_max_pool2d_kernel(
    x_ptr: tl.tensor,
    flip_ptr: tl.tensor,
    out_ptr: tl.tensor,
    numel: tl.tensor,
    words: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    kernel_height: tl.tensor,
    kernel_width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    pixel = at // words
    word = at - pixel * words
    line = pixel // out_width
    image = line // out_height
    top = (line - image * out_height) * stride_y - padding_y
    left = (pixel - line * out_width) * stride_x - padding_x
    turned = tl.load(flip_ptr + word)
    most = tl.zeros((BLOCK,), tl.int32)
    for tap in range(kernel_height * kernel_width):
        y = top + tap // kernel_width
        x = left + tap % kernel_width
        inside = (at < numel) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        here = tl.load(x_ptr + ((image * height + y) * width + x) * words + word, mask=inside, other=0)
        most = most | tl.where(inside, here ^ turned, 0)
    tl.store(out_ptr + at, most ^ turned, mask=at < numel)


def packed_max_pool2d_forward(
    x: Tensor, flip: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """int32 [N, oh, ow, words] from contiguous int32 [N, H, W, words] and flip [words]."""
    images, *sizes, words = x.shape
    out_sizes = [(sizes[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    out = x.new_empty((images, *out_sizes, words))
    if out.numel() > 0:
        index = index_type(max(x.numel(), out.numel()))
        with on_device(x):
            packed_max_pool2d_kernel[blocks(out.numel())](
                x, flip.contiguous(), out, out.numel(), words, *sizes, *out_sizes, *kernel, *stride, *padding,
                index, BLOCK, **LAUNCH,
            )  # fmt: skip
    return out
