"""What the kernels share: one row in registers, and rows as 8-bit numbers.

A row is held as two parts, a long and a short one, because a tensor inside a kernel has a power of two of elements:
5,120 = 4,096 + 1,024 wastes none of the lanes, 8,192 would waste 3 of 8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...seams import Rows8

SMALLEST_TOP = tl.constexpr(Rows8.FAINTEST)
ROUNDING = tl.constexpr(1.5 * 2.0**23)
"""Adding and taking away this rounds a float32 below 2^22 to the nearest whole number, halves to the even one."""


def two_parts(width: int) -> dict[str, int]:
    """The sizes of both parts of a row: the largest power of two below `width`, and one that holds the rest."""
    long = triton.next_power_of_2(width) // 2
    return {"WIDTH": width, "LONG": long, "SHORT": triton.next_power_of_2(width - long)}


def is_interpreted() -> bool:
    """Whether Triton was told to run kernels as Python on the CPU."""
    return not isinstance(load_part, triton.JITFunction)


def on_device(x: Tensor) -> torch.cuda.device_of:
    """A context in which kernels are launched on the card that holds `x`."""
    return torch.cuda.device_of(x)


@triton.jit
def load_part(row, FIRST: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST to FIRST + PART of a row, in float32; zeros past its end."""
    columns = FIRST + tl.arange(0, PART)
    if FIRST + PART <= WIDTH:
        return tl.load(row + columns).to(tl.float32)
    return tl.load(row + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_part(row, values, FIRST: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of `load_part`, rounded to the type of the row."""
    columns = FIRST + tl.arange(0, PART)
    if FIRST + PART <= WIDTH:
        tl.store(row + columns, values.to(row.dtype.element_ty))
    else:
        tl.store(row + columns, values.to(row.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def without_rest(values, FIRST: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros past the end of the row."""
    if FIRST + PART <= WIDTH:
        return values
    return tl.where(FIRST + tl.arange(0, PART) < WIDTH, values, 0.0)


@triton.jit
def largest(long, short):
    """The largest absolute value of a row; NaN if there is one. As whole numbers, NaN is beyond infinity."""
    a = tl.max(long.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    b = tl.max(short.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    return tl.maximum(a, b).to(tl.float32, bitcast=True)


@triton.jit
def rounded(values, WHOLE: tl.constexpr):
    if WHOLE:
        return (values + ROUNDING) - ROUNDING
    return values


@triton.jit
def store_row8(
    row, scale, long, short, WIDTH: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, LIMIT: tl.constexpr
):
    """A row as 8-bit numbers such that its largest becomes LIMIT, and the scale that undoes it."""
    top = largest(long, short)
    top = tl.where(top < SMALLEST_TOP, SMALLEST_TOP, top)  # NaN is not less
    room = tl.div_rn(LIMIT, top)
    tl.store(scale, tl.div_rn(top, LIMIT))
    WHOLE: tl.constexpr = row.dtype.element_ty == tl.int8
    store_part(row, rounded(long * room, WHOLE), 0, LONG, WIDTH)
    store_part(row, rounded(short * room, WHOLE), LONG, SHORT, WIDTH)
