"""Triton kernels for the video VAE. Imported only where they run, for a CPU build of torch has no Triton.

A frame is H rows of W + 1 pixels of C values each, and column W is zero. So a frame is one line of pixels, a tap of a
convolution is a shift along it, the zero column is the padding at both sides, and what lies before or after the frame
is the padding above and below: the tensor memory accelerator reads zeros there. No tile needs a mask, none is padded
or joined to past frames first: those are found by frame number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .packing import DOWN, UP, Packing, Tile

UP_MODE, DOWN_MODE = tl.constexpr(UP), tl.constexpr(DOWN)


@triton.jit
def _begin(n0, bias, residual, at, inside, N, M: tl.constexpr, WIDTH: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """What products are added to: bias, and the residual, which needs no registers of its own that way."""
    columns = n0 + tl.arange(0, WIDTH)
    acc = tl.zeros((M, WIDTH), tl.float32) + tl.load(bias + columns, columns < N, 0.0)[None, :]
    if HAS_RESIDUAL:
        mask = inside[:, None] & (columns < N)[None, :]
        acc += tl.load(residual + at[:, None] + columns[None, :], mask, 0.0).to(tl.float32)
    return acc


@triton.jit
def _put(acc, n0, out, at, inside, is_pixel, N, WIDTH: tl.constexpr):
    """Store a tile, with zeros in the zero column."""
    columns = n0 + tl.arange(0, WIDTH)
    acc = tl.where(is_pixel[:, None], acc, 0.0)
    mask = inside[:, None] & (columns < N)[None, :]
    tl.store(out + at[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask)


@triton.jit
def _places(p, P, PITCH, W_OUT, N, py, px, MODE: tl.constexpr, M: tl.constexpr):
    """Where the M pixels from `p` on go: offset within the frame, whether they go anywhere, and whether they show."""
    m = p + tl.arange(0, M)
    row = m // PITCH
    column = m % PITCH
    inside = m < P
    if MODE == UP_MODE:  # the zero column of the result is written once, by the first of the two
        inside = inside & ((column < PITCH - 1) | (px == 0))
        column = 2 * column + px
        row = 2 * row + py
    else:
        inside = inside & (column <= W_OUT)
    return (row * (W_OUT + 1) + column) * N, inside, column < W_OUT  # 32 bits within a frame need fewer registers


@triton.jit(do_not_specialize=["P", "PITCH", "W_OUT", "FRAME_STEP"])  # else every picture size compiles anew
def _convolve(
    x, w0, w1, bias, residual, out, table, P, PITCH, W_OUT, N, FRAME_STEP, OUT_FRAME,
    MODE: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One tile of M pixels and N0 + N1 output channels of one frame, as a product over taps and input channels."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, N0 + N1)
    n0 = (pid % blocks) * (N0 + N1)
    pid //= blocks
    py = 0
    px = 0
    row0 = n0
    if MODE == UP_MODE:  # each pixel becomes 2 x 2, each of them with taps of its own
        py = (pid // 2) % 2
        px = pid % 2
        row0 += (pid % 4) * N
        pid //= 4
    tiles = tl.cdiv(P, M)
    t = pid // tiles
    p = (pid % tiles) * M
    is_needed = True
    if MODE == DOWN_MODE:  # half of a line of even columns holds nothing
        first = p % PITCH
        is_needed = (first <= W_OUT) | (first + M > PITCH)
    if is_needed:
        f0 = tl.load(table + t * FRAME_STEP)
        f1 = f0
        f2 = f0
        if KT == 3:
            f1 = tl.load(table + t * FRAME_STEP + 1)
            f2 = tl.load(table + t * FRAME_STEP + 2)
        out += t.to(tl.int64) * OUT_FRAME
        residual += t.to(tl.int64) * OUT_FRAME
        at, inside, is_pixel = _places(p, P, PITCH, W_OUT, N, py, px, MODE, M)
        acc0 = _begin(n0, bias, residual, at, inside, N, M, N0, HAS_RESIDUAL)
        if N1 > 0:
            acc1 = _begin(n0 + N0, bias, residual, at, inside, N, M, N1, HAS_RESIDUAL)
        for step in range(KT * KH * KW * CHUNKS):
            tap = step // CHUNKS
            c = (step % CHUNKS) * K
            dt = tap // (KH * KW)
            dy = (tap // KW) % KH
            dx = tap % KW
            if MODE == UP_MODE:
                q = p + (dy + py - 1) * PITCH + dx + px - 1
            elif MODE == DOWN_MODE:  # in pairs of pixels
                q = p + (dy * PITCH + dx) // 2
                c += ((dy * PITCH + dx) % 2) * C
            else:
                q = p + (dy - KH // 2) * PITCH + dx - KW // 2
            frame = tl.where(dt == 0, f0, tl.where(dt == 1, f1, f2))
            a = x.load([frame, q, c]).reshape(M, K)
            acc0 = tl.dot(a, w0.load([row0, step * K]).T, acc0)
            if N1 > 0:
                acc1 = tl.dot(a, w1.load([row0 + N0, step * K]).T, acc1)
        at, inside, is_pixel = _places(p, P, PITCH, W_OUT, N, py, px, MODE, M)
        _put(acc0, n0, out, at, inside, is_pixel, N, N0)
        if N1 > 0:
            _put(acc1, n0 + N0, out, at, inside, is_pixel, N, N1)


@triton.jit(do_not_specialize=["P"])
def _normalize(x, gamma, out, table, P, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """RMS norm over channels and SiLU, from the frames of a video into numbered frames of a pool."""
    t = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (rows < P)[:, None] & (columns < C)[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    frame = P.to(tl.int64) * C
    values = tl.load(x + t * frame + offsets, mask, 0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(values * values, 1))
    values *= (C**0.5 / tl.maximum(length, 1e-12))[:, None]  # the floor of torch.nn.functional.normalize
    values *= tl.load(gamma + columns, columns < C, 0.0)[None, :]
    values *= tl.sigmoid(values)
    tl.store(out + tl.load(table + t).to(tl.int64) * frame + offsets, values.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["P", "PITCH"])
def _gather(z, bias, out, P, PITCH, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Sum of the nine values that a pixel's neighbours hold for it. z: T H W+1 9*N -> T H W+1 N, kept within -1..1."""
    t = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32) + tl.load(bias + n, n < N, 0.0)[None, :]
    for tap in tl.static_range(9):
        q = p + (tap // 3 - 1) * PITCH + tap % 3 - 1  # the zero column of z is zero
        mask = ((q >= 0) & (q < P))[:, None] & (n < N)[None, :]
        places = (t * P + q)[:, None] * (9 * N) + tap * N + n[None, :]
        total += tl.load(z + places, mask, 0.0).to(tl.float32)
    total = tl.minimum(tl.maximum(total, -1.0), 1.0)
    tl.store(out + (t * P + p)[:, None] * N + n[None, :], total, (p < P)[:, None] & (n < N)[None, :])


def convolve(
    pool: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    packing: Packing,
    out: Tensor,
    residual: Tensor | None = None,
    step: int = 1,
    tile: Tile | None = None,
) -> None:
    """A convolution of numbered frames of a pool, into `out`.

    Args:
        pool: frames H W+1 C, in memory with at least a pixel of zeros before it and another after it.
        table: int32; frame t of the result sees the frames table[t * step], table[t * step + 1] and so on.
        weight: as `packing.pack` gives it. bias: float32.
        out: T H' W'+1 N, whose frames may lie apart; residual: of the same layout, None, or `out` itself.
    """
    frames, height, pitch, channels = pool.shape
    pixels = height * pitch
    view, start = (frames, pixels, channels), pool.storage_offset()
    strides = (pool.stride(0), channels, 1)
    tall, wide = packing.kernel[1:]
    if packing.is_folded:
        view, start, wide = (frames, pixels, 3 * channels), start - channels, 1
    elif packing.mode == DOWN:
        view, strides = (frames, pixels // 2, 2 * channels), (strides[0], 2 * channels, 1)
        pixels = height // 2 * pitch
    lines = pool.as_strided(view, strides, start)
    tile = tile or packing.tile
    x = TensorDescriptor(lines, list(view), list(strides), [1, tile.pixels, packing.chunk])
    w0, w1 = (
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [rows or tile.first, packing.chunk])
        for rows in (tile.first, tile.second)
    )
    assert out.stride(1) == out.shape[2] * out.shape[3] and (residual is None or residual.stride() == out.stride())
    blocks = triton.cdiv(packing.outputs, tile.first + tile.second) * (4 if packing.mode == UP else 1)
    grid = (blocks * triton.cdiv(pixels, tile.pixels) * out.shape[0],)
    _convolve[grid](
        x, w0, w1, bias, out if residual is None else residual, out, table,
        pixels, pitch, out.shape[2] - 1, packing.outputs, step, out.stride(0),
        packing.mode, packing.kernel[0], tall, wide, channels,
        tile.pixels, tile.first, tile.second, packing.chunk, packing.chunks, residual is not None,
        num_warps=tile.warps, num_stages=tile.stages, **({} if tile.registers is None else {"maxnreg": tile.registers}),
    )  # fmt: skip


def normalize(x: Tensor, gamma: Tensor, pool: Tensor, table: Tensor) -> None:
    """RMS norm and SiLU of T H W+1 C, into the frames of a pool that an int32 table numbers."""
    frames, height, pitch, channels = x.shape
    width = triton.next_power_of_2(channels)
    rows = max(1, 8192 // width)
    grid = (triton.cdiv(height * pitch, rows), frames)
    _normalize[grid](x, gamma, pool, table, height * pitch, channels, width, rows, num_warps=8)


def gather_taps(z: Tensor, bias: Tensor) -> Tensor:
    """T H W+1 9*N -> T H W+1 N, float32: the second half of a 3x3 convolution whose taps were computed as channels."""
    frames, height, pitch, channels = z.shape
    out = z.new_empty(frames, height, pitch, channels // 9, dtype=torch.float32)
    rows = 256
    grid = (triton.cdiv(height * pitch, rows), frames)
    width = triton.next_power_of_2(channels // 9)
    _gather[grid](z, bias, out, height * pitch, pitch, channels // 9, width, rows, num_warps=4)
    return out
