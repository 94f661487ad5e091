"""The norm of the longest key of every head: no score of a query is larger than its own norm times that.

The kernels for Hopper cards need not look for the largest score of a tile where this bound says that it cannot matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import TILE, tiles_of


@triton.jit
def keep_larger(norms, head, norm):
    """Write the norm of a head over a smaller one. As whole numbers, NaN is larger than all."""
    tl.atomic_max(norms + head, norm.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _norms_kernel(x, norms, tokens, batch_stride, token_stride, head_stride, heads, TILE: tl.constexpr):
    head, tile = tl.program_id(0), tl.program_id(1)  # heads of a token lie side by side
    rows, columns = tile * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    start = x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    value = tl.load(start + rows.to(tl.int64) * token_stride + columns, mask=rows < tokens, other=0.0).to(tl.float32)
    squares = tl.sum(value * value, 1)
    keep_larger(norms, head, tl.sqrt(tl.max(squares, 0) + tl.sum(squares * 0.0, 0)))  # maxima lose NaN, sums keep it


def layout(x: Tensor) -> tuple[int, int, int, int]:
    """How kernels find the heads of B L N 128: strides of batch, token and head, and the number of heads."""
    assert x.shape[-1] == TILE and x.stride(-1) == 1
    return x.stride(0), x.stride(1), x.stride(2), x.shape[2]


def no_norms(x: Tensor) -> Tensor:
    """Zeros, one for each head, as the bits of float32. B L N D -> B*N int32."""
    return torch.zeros(x.shape[0] * x.shape[2], dtype=torch.int32, device=x.device)


def largest_norms(x: Tensor) -> Tensor:
    """The norm of the longest token of every head; NaN or infinite where there is such a value. B L N 128 -> B*N."""
    norms, tokens = no_norms(x), x.shape[1]
    _norms_kernel[(len(norms), tiles_of(tokens))](x, norms, tokens, *layout(x), TILE=TILE, num_warps=8)
    return norms.view(torch.float32)
