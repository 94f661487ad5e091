"""Queries and keys made ready for attention in one pass over memory: RMS norm over the width, then rotation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import load_part, on_device, store_part, two_parts

NUM_WARPS, ROWS = 8, 4
"""Warps of a program, and how many tokens it takes one after the other, with the weights read once."""


@triton.jit
def turned(values, rotations, FIRST: tl.constexpr, PART: tl.constexpr, HEAD: tl.constexpr):
    """Pairs of neighbouring channels times the cosine and sine that lie at the same place within a head."""
    angles = tl.load(rotations + (FIRST + tl.arange(0, PART)) % HEAD)
    cosine, sine = tl.split(tl.reshape(angles, (PART // 2, 2)))
    even, odd = tl.split(tl.reshape(values, (PART // 2, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (PART,))


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    x, x_batch, x_row, tokens, weight, rope, rope_row, eps,
    WIDTH: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    weight_long, weight_short = load_part(weight, 0, LONG, WIDTH), load_part(weight, LONG, SHORT, WIDTH)
    for index in range(ROWS):
        token = first + index
        if token < tokens:
            here = x + batch * x_batch + token.to(tl.int64) * x_row
            long, short = load_part(here, 0, LONG, WIDTH), load_part(here, LONG, SHORT, WIDTH)
            squares = (tl.sum(long * long, axis=0) + tl.sum(short * short, axis=0)) / WIDTH
            factor = tl.rsqrt(squares + eps)
            long, short = long * factor * weight_long, short * factor * weight_short
            if TURNS:
                rotations = rope + token.to(tl.int64) * rope_row
                long, short = turned(long, rotations, 0, LONG, HEAD), turned(short, rotations, LONG, SHORT, HEAD)
            store_part(here, long, 0, LONG, WIDTH)
            store_part(here, short, LONG, SHORT, WIDTH)


def norm_and_turn(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    heads: int,
    rope: Tensor | None,
    num_warps: int = NUM_WARPS,
    rows: int = ROWS,
) -> Tensor:
    """RMS norm of x, and its heads turned by `rope` if there is one, written over x.

    Args:
        x: B L E.
        weight: E.
        eps: None for the smallest step of x's precision, as in nn.RMSNorm.
        rope: L D/2 2, cosine and sine in float32.
    Returns:
        B L N D, a view of x.
    """
    batch, tokens, width = x.shape
    table = x if rope is None else rope
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if x.numel():
        with on_device(x):
            rotary_kernel[triton.cdiv(tokens, rows), batch](
                x, *x.stride()[:2], tokens, weight, table, table.stride(0), eps,
                **two_parts(width), ROWS=rows, HEAD=width // heads, TURNS=rope is not None, num_warps=num_warps,
            )  # fmt: skip
    return x.unflatten(-1, (heads, -1))
