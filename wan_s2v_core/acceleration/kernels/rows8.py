"""Rows of activations to 8 bits, one pass over memory, with or without a tanh-GELU before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...seams import Rows8
from .rows import load_part, on_device, store_row8, two_parts

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu(x):
    """Half of x times 1 + tanh of a cubic, which is x times the logistic function of twice that cubic."""
    return x / (1.0 + tl.exp(-TWICE_ROOT * (x + CUBIC * x * x * x)))


@triton.jit
def quantize_kernel(
    x, values, scales, stride,
    WIDTH: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, LIMIT: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    long = load_part(x + row * stride, 0, LONG, WIDTH)
    short = load_part(x + row * stride, LONG, SHORT, WIDTH)
    if GELU:
        long, short = gelu(long), gelu(short)
    store_row8(values + row * WIDTH, scales + row, long, short, WIDTH, LONG, SHORT, LIMIT)


def quantize(x: Tensor, dtype: torch.dtype, has_gelu: bool = False, num_warps: int | None = None) -> Rows8:
    """`acceleration.rows8.quantize_rows` of x, or of its tanh-GELU, in one kernel. x: ... E."""
    rows = x.flatten(0, -2)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    width = rows.shape[1]
    values = torch.empty_like(rows, dtype=dtype, memory_format=torch.contiguous_format)
    scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    num_warps = num_warps or (8 if width > 8192 else 4)
    if len(rows):
        with on_device(x):
            quantize_kernel[(len(rows),)](
                rows, values, scales, rows.stride(0),
                **two_parts(width), LIMIT=Rows8.LARGEST[dtype], GELU=has_gelu, num_warps=num_warps,
            )  # fmt: skip
    return Rows8(values.view(x.shape), scales.view(*x.shape[:-1], 1), x.dtype)
