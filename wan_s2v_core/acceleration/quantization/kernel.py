"""The product of 8-bit rows in one Triton kernel: exact or float32 sums, scales, bias and the cast of the result.

Imported only where Triton is: PyTorch for CPUs comes without. int8 runs on cards from Ampere on, float8 from Ada on.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts a product into pieces, one for each program."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    """Blocks of rows that share what was read of the weight while it is in the cache."""


TILINGS = (
    Tiling(128, 128, 128, 8, 3),
    Tiling(128, 256, 128, 8, 3),
    Tiling(256, 128, 128, 8, 3),
    Tiling(128, 128, 64, 4, 4),
    Tiling(64, 128, 128, 4, 3),
)
"""The first is for when there is no time to try: each card has the memory for it, and on an H200 it is the fastest."""
FEW_ROWS = 2048
"""Products with fewer rows than this choose for themselves."""
TRIES = 3
CHOSEN: dict[tuple, Tiling] = {}


@triton.jit(do_not_specialize=["M"])  # one kernel for any number of rows
def multiply_kernel(
    values_ptr,
    row_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One block of (values * row_scale) @ (weight * scale).T + bias; M K, M, N K, N, N -> M N, all rows contiguous."""
    # Blocks run group by group, a few block rows over all block columns, so that both factors are read from the cache.
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * blocks_n)
    first = group * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    block_m = first + (program % (GROUP_M * blocks_n)) % height
    block_n = (program % (GROUP_M * blocks_n)) // height

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Beyond the edge the first rows are read again; what comes of them is not stored.
    left = values_ptr + (rows % M).to(tl.int64)[:, None] * K + inner[None, :]
    right = weight_ptr + (columns % N).to(tl.int64)[None, :] * K + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for start in range(0, K, BLOCK_K):
        is_inside = inner < K - start
        a = tl.load(left, mask=is_inside[None, :], other=0.0)
        b = tl.load(right, mask=is_inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, out_dtype=SUM)
        left += BLOCK_K
        right += BLOCK_K

    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    scale = tl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    out = sums.to(tl.float32) * row_scale[:, None] * scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def multiply_rows(
    values: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Tensor:
    """(values * row_scale) @ (weight * scale).T + bias; the first of a size tries all tilings.

    Args:
        values, row_scale: M K in int8 or float8, M 1 in float32.
        weight, scale: N K of the same type, N 1 in float32.
        bias: N, or none.
        dtype: of the result.
    Returns:
        M N.
    """
    values, weight = values.contiguous(), weight.contiguous()
    out = values.new_empty(len(values), len(weight), dtype=dtype)
    tensors = (values, row_scale.contiguous(), weight, scale.contiguous(), scale if bias is None else bias, out)
    flags = {"HAS_BIAS": bias is not None, "SUM": tl.int32 if values.dtype == torch.int8 else tl.float32}

    def launch(tiling: Tiling) -> None:
        blocks = triton.cdiv(len(values), tiling.BLOCK_M) * triton.cdiv(len(weight), tiling.BLOCK_N)
        multiply_kernel[(blocks,)](*tensors, len(values), *weight.shape, **flags, **vars(tiling))

    with torch.cuda.device_of(values):  # kernels are launched on the current card
        launch(tiling or choose(values, weight, launch))
    return out


def choose(values: Tensor, weight: Tensor, launch: Callable[[Tiling], None]) -> Tiling:
    """The fastest tiling for products of this size on this card, measured once."""
    if not values.is_cuda or torch.cuda.is_current_stream_capturing():
        return TILINGS[0]
    key = (values.device, values.dtype, weight.shape, len(values) < FEW_ROWS)
    if key not in CHOSEN:
        times = {tiling: milliseconds(launch, tiling) for tiling in TILINGS}
        CHOSEN[key] = min(times, key=times.get)
        log.debug("%s product of %d rows with %s: %s", values.dtype, len(values), tuple(weight.shape), CHOSEN[key])
    return CHOSEN[key]


def milliseconds(launch: Callable[[Tiling], None], tiling: Tiling) -> float:
    """The shortest of a few runs; infinite where the card has not the memory for them."""
    try:
        launch(tiling)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(TRIES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch(tiling)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
