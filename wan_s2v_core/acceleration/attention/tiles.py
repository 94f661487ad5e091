"""Queries, keys and values in 8 bits, as tiles that lie in memory as Hopper's tensor cores read them.

A tile is 128 rows of 128 bytes. In row r the 16-byte chunk c lies at place c ^ (r % 8), the card's 128-byte swizzle, so
a tile gets into shared memory as one copy. Queries and keys are int8, a row a token. Values are e4m3 and a row is a
channel; of each 16 tokens in a row, the order is the one in which the accumulator of a product holds its columns, so
that probabilities enter the next product from the registers they are in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import TILE, tiles_of
from .norms import keep_larger, layout, no_norms
from .reference import FAINTEST, LARGEST_VALUE, sampled_means, score_factor

KEY_TILE_BYTES = TILE * TILE + 16
LARGEST_E4M3 = LARGEST_VALUE[torch.float8_e4m3fn]
TOKENS_AT_ONCE = 1024


@triton.jit
def _swizzled(rows, columns):
    return rows * 128 + (((columns // 16) ^ (rows % 8)) * 16) + columns % 16


@triton.jit(do_not_specialize=["tokens", "heads"])
def _rows_kernel(
    x, mean, out, scales, norms, tokens, batch_stride, token_stride, head_stride, heads, factor,
    HAS_MEAN: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr, BYTES: tl.constexpr, FAINTEST: tl.constexpr,
):  # fmt: skip
    tile, head, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    start = x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    token = tile * TILE + rows
    there = token < tokens
    value = tl.load(start + token.to(tl.int64) * token_stride + columns, mask=there, other=0.0).to(tl.float32)
    if HAS_MEAN:
        value = tl.where(there, value - tl.load(mean + head * TILE + columns), 0.0)
    number = head.to(tl.int64) * tiles + tile
    scale = (tl.max(tl.abs(value), 1) / 127.0 + tl.sum(value * 0.0, 1))[:, None]  # maxima lose NaN, sums keep it
    if PER_ROW:
        scale = tl.where(scale < FAINTEST, FAINTEST, scale)  # not maximum(), which would lose NaN
        tl.store(scales + number * TILE + rows, scale * factor)
    else:
        scale = (tl.max(scale, 0) + tl.sum(scale * 0.0, 0))[:, None]
        scale = tl.where(scale < FAINTEST, FAINTEST, scale)
        tl.store(scales + number * (BYTES // 4) + TILE * TILE // 4 + tl.arange(0, 1)[:, None], scale * factor)
    rounded = tl.floor(value / scale + 0.5)
    if not PER_ROW:
        keep_larger(norms, head, tl.max(tl.sqrt(tl.sum(rounded * rounded, 1)[:, None]) * scale * factor))
    tl.store(out + number * BYTES + _swizzled(rows, columns), rounded.to(tl.int8))


@triton.jit(do_not_specialize=["tokens", "heads"])
def _largest_kernel(
    x, largest, tokens, batch_stride, token_stride, head_stride, heads, TILE: tl.constexpr, TOKENS: tl.constexpr
):
    part, head, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    columns = tl.arange(0, TILE)
    start = x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    most = tl.zeros([TILE], tl.float32)
    for step in range(0, TOKENS, TILE):
        rows = part * TOKENS + step + tl.arange(0, TILE)
        where = rows[:, None].to(tl.int64) * token_stride + columns[None, :]
        value = tl.load(start + where, mask=(rows < tokens)[:, None], other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(value), 0))
    tl.store(largest + (head * parts + part) * TILE + columns, most)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _values_kernel(x, scales, out, tokens, batch_stride, token_stride, head_stride, heads, TILE: tl.constexpr):
    tile, head, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    quads, columns = tl.arange(0, TILE // 4)[:, None], tl.arange(0, TILE)[None, :]
    start = x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    scale = tl.load(scales + head * TILE + columns)
    scale = tl.where(scale < 1e-30, 1.0, scale)
    first = tile * TILE + quads // 4 * 16 + quads % 4 * 2  # the four tokens of 4 bytes: this and 1, 8 and 9 on
    packed = tl.zeros([TILE // 4, TILE], tl.int32)
    for byte in tl.static_range(4):
        token = first + byte // 2 * 8 + byte % 2
        value = tl.load(start + token.to(tl.int64) * token_stride + columns, mask=token < tokens, other=0.0)
        value = (value.to(tl.float32) / scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        packed |= value.to(tl.int32) << (8 * byte)
    channel, quad = tl.arange(0, TILE)[:, None], tl.arange(0, TILE // 4)[None, :]
    place = channel * (TILE // 4) + ((quad // 4) ^ (channel % 8)) * 4 + quad % 4
    number = head.to(tl.int64) * tiles + tile
    tl.store(out + number * (TILE * TILE // 4) + place, tl.trans(packed))


def _rows(
    x: Tensor, out: Tensor, scales: Tensor, mean: Tensor | None = None, norms: Tensor | None = None, factor: float = 1.0
) -> None:
    batch, tokens, heads, _ = x.shape
    _rows_kernel[(tiles_of(tokens), batch * heads)](
        x, mean, out, scales, norms, tokens, *layout(x), factor,
        HAS_MEAN=mean is not None, PER_ROW=norms is None, TILE=TILE, BYTES=out.shape[-1], FAINTEST=FAINTEST,
        num_warps=8,
    )  # fmt: skip


def query_tiles(q: Tensor) -> tuple[Tensor, Tensor]:
    """int8 tiles of queries, and a scale for each of them that makes scores powers of two.

    Args:
        q: B L N 128.
    Returns:
        B*N tiles 16384 int8, and B*N tiles 128 float32.
    """
    heads, tiles = q.shape[0] * q.shape[2], tiles_of(q.shape[1])
    out = torch.empty(heads, tiles, TILE * TILE, device=q.device, dtype=torch.int8)
    scales = torch.empty(heads, tiles, TILE, device=q.device)
    _rows(q, out, scales, factor=score_factor(TILE))
    return out, scales


def key_tiles(k: Tensor) -> tuple[Tensor, Tensor]:
    """int8 tiles of keys less their mean, each with its float32 scale behind it, and the longest norm of each head.

    Args:
        k: B L N 128.
    Returns:
        B*N tiles 16400 int8, and B*N float32, NaN where a value is not finite.
    """
    heads, tiles = k.shape[0] * k.shape[2], tiles_of(k.shape[1])
    out = torch.empty(heads, tiles, KEY_TILE_BYTES, device=k.device, dtype=torch.int8)
    norms = no_norms(k)
    _rows(k, out, out.view(torch.float32), sampled_means(k), norms)
    return out, norms.view(torch.float32)


def value_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 tiles of channels, and the scale of each channel. B L N 128 -> B*N tiles 16384, and B*N 128 float32."""
    batch, tokens, heads, _ = x.shape
    tiles, all_heads, parts = tiles_of(tokens), batch * heads, -(-tokens // TOKENS_AT_ONCE)
    largest = torch.empty(all_heads, parts, TILE, device=x.device)
    _largest_kernel[(parts, all_heads)](x, largest, tokens, *layout(x), TILE=TILE, TOKENS=TOKENS_AT_ONCE, num_warps=8)
    scales = largest.amax(dim=1) / LARGEST_E4M3
    out = torch.empty(all_heads, tiles, TILE * TILE, device=x.device, dtype=torch.float8_e4m3fn)
    words = out.view(torch.int32)
    _values_kernel[(tiles, all_heads)](x, scales, words, tokens, *layout(x), TILE=TILE, num_warps=4)
    return out, scales
