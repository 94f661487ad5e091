"""Attention kernels in Triton, for cards and head widths that the Hopper kernels are not for: exact, and in 8 bits.

Cards from Ampere on, heads of 16 to 128 channels. Lists of tiles mean what they mean in hopper.py. Imported only where
Triton is: PyTorch for CPUs comes without.

Numbers of the 8-bit kernel: queries and keys are int8, so that a score is an exact int32. With FP8 (Ada and later)
probabilities and values are e4m3; the tensor cores add up the products of a step and float32 registers the steps,
because the tensor cores keep only some 14 bits of a sum of 8-bit products. Without FP8 (Ampere) both are float16. What
comes of it without a card: reference.emulate8.

Techniques: FlashAttention-2 (arXiv 2307.08691), SageAttention (arXiv 2410.02367, 2411.10958). Written from the papers.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import TILE, tiles_of
from ...seams import KeysValues
from .reference import FAINTEST, PEAK, sampled_means, score_factor, value_scales

MAGIC, MAGIC_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
"""1.5 * 2^23 and its bits in float32. Added to the bits, an integer is added to the number: no conversion is needed."""
NARROWEST, WIDEST = 16, 128
"""Channels of a head that there are kernels for."""


# --- how the work is cut -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work into pieces."""

    BLOCK_M: int
    """Queries of a program, 64 or 128."""
    BLOCK_N: int
    """Keys of a step, a power of two up to 128."""
    num_warps: int
    num_stages: int


FULL_PRECISION = Tiling(32, 32, 8, 2)
"""For float32, where tensor cores do not help."""
SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Cards with 99 KiB of shared memory for a program."""


def best_config(capability: tuple[int, int], width: int, bits: int) -> Tiling:
    """The tiling for a card, a head width and the bits of its numbers: 8, 16, or 32 for exact float32.

    UNTESTED: none has been timed on a card yet. They are the usual ones, compiled for each of these cards to see that
    they fit into shared memory and (but for some bytes on an A100, and for wide heads in float32) into the registers.
    """
    if bits == 32:
        return FULL_PRECISION
    warps = 4 if width <= 32 else 8
    if capability[0] == 9:
        return Tiling(128, 128 if bits == 8 else 64, warps, 3)
    is_tight = bits == 16 and width > 64 and capability in SMALL_MEMORY
    return Tiling(128, 32 if is_tight else 64, warps, 3)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA card; that of the oldest usable one for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else (8, 0)


def value_type_of(capability: tuple[int, int]) -> torch.dtype:
    """What 8-bit attention keeps probabilities and values in."""
    return torch.float8_e4m3fn if capability >= (8, 9) else torch.float16


def has_slow_float32_sums(capability: tuple[int, int]) -> bool:
    """Whether float16 products are twice as fast when summed in float16 too: on GeForce cards of Ampere."""
    return capability == (8, 6)


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _head_of(x, head, heads, batch_stride, head_stride):
    """Where a head begins, of all batch entries together."""
    return x + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride


@triton.jit(do_not_specialize=["tokens", "heads"])
def rows_kernel(
    x, mean, out, scales, tokens, heads, batch_stride, token_stride, head_stride, factor,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_MEAN: tl.constexpr, PER_ROW: tl.constexpr,
    FAINTEST: tl.constexpr,
):  # fmt: skip
    """One tile of one head in int8: B L N D -> B*N tiles*TILE WIDTH, and a scale for each row or for the tile."""
    tile, head, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
    is_there = (tile * TILE + rows < tokens) & (columns < D)
    start = _head_of(x, head, heads, batch_stride, head_stride) + tile.to(tl.int64) * TILE * token_stride
    value = tl.load(start + rows * token_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    if HAS_MEAN:
        value -= tl.load(mean + head * D + columns, mask=columns < D, other=0.0)
        value = tl.where(is_there, value, 0.0)
    # max() passes over NaN; a sum does not, and NaN in a scale shows in the result.
    scale = tl.max(tl.abs(value), 1) / 127.0 + tl.sum(value * 0.0, 1)
    number = head.to(tl.int64) * tiles + tile
    if PER_ROW:
        scale = tl.where(scale < FAINTEST, FAINTEST, scale)
        tl.store(scales + number * TILE + tl.arange(0, TILE), scale * factor)
        value = value / scale[:, None]
    else:
        scale = tl.max(scale, 0) + tl.sum(scale * 0.0, 0)
        scale = tl.where(scale < FAINTEST, FAINTEST, scale)
        tl.store(scales + number, scale * factor)
        value = value / scale
    tl.store(out + number * TILE * WIDTH + rows * WIDTH + columns, tl.floor(value + 0.5).to(tl.int8))


@triton.jit(do_not_specialize=["tokens", "heads"])
def values_kernel(
    x, scales, out, tokens, heads, batch_stride, token_stride, head_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """One tile of one head over the channels' scales: B L N D -> B*N tiles*TILE WIDTH, or B*N WIDTH tiles*TILE."""
    tile, head, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
    is_there = (tile * TILE + rows < tokens) & (columns < D)
    start = _head_of(x, head, heads, batch_stride, head_stride) + tile.to(tl.int64) * TILE * token_stride
    value = tl.load(start + rows * token_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    scale = tl.load(scales + head * D + columns, mask=columns < D, other=1.0)
    value = (value / scale).to(out.dtype.element_ty)
    own_out = out + head.to(tl.int64) * tiles * TILE * WIDTH
    if BY_CHANNEL:
        channels, tokens_of_tile = tl.arange(0, WIDTH)[:, None], tl.arange(0, TILE)[None, :]
        place = channels * (tiles * TILE) + tile * TILE + tokens_of_tile
        tl.store(own_out + place, tl.trans(value))
    else:
        tl.store(own_out + tile.to(tl.int64) * TILE * WIDTH + rows * WIDTH + columns, value)


@triton.jit
def _tiles_seen(listed, counts, queries, keys, head, first, HAS_LIST: tl.constexpr, TILE: tl.constexpr):
    """The list of a program's tile of queries, how many tiles it has, and the last of them."""
    key_tiles = tl.cdiv(keys, TILE)
    if HAS_LIST:
        row = head * tl.cdiv(queries, TILE) + first // TILE
        count = tl.load(counts + row)
        listed += row * key_tiles
        return listed, count, tl.load(listed + count - 1)
    else:
        return listed, key_tiles, key_tiles - 1


@triton.jit
def _first_key(listed, step, HAS_LIST: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a step."""
    if HAS_LIST:
        return tl.load(listed + step // (TILE // BLOCK_N)) * TILE + step % (TILE // BLOCK_N) * BLOCK_N
    else:
        return step * BLOCK_N


@triton.jit
def _step8(
    sums, total, base, q, q_scale, k, k_scales, v, start, keys, padded_keys,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PEAK: tl.constexpr, FLOAT8: tl.constexpr, HALF_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums of P V and of P, and the largest scores, after the keys from `start` on."""
    columns, key = tl.arange(0, WIDTH), start + tl.arange(0, BLOCK_N)
    k_block = tl.load(k + columns[:, None] + key[None, :] * WIDTH)
    scale = q_scale * tl.load(k_scales + start // TILE)
    magic = tl.full([BLOCK_M, BLOCK_N], MAGIC_BITS, tl.int32)
    scores = tl.dot(q, k_block, magic, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    if MASKED:
        scores = tl.where(key[None, :] < keys, scores, float("-inf"))
    most = tl.maximum(base, (tl.max(scores, 1) - MAGIC) * scale)
    p = tl.exp2(scores * scale[:, None] + (PEAK - most - MAGIC * scale)[:, None])
    decay = tl.exp2(base - most)
    if FLOAT8:
        v_block = tl.load(v + columns[None, :] * padded_keys + key[:, None])
        part = tl.dot(p.to(tl.float8e4nv), v_block)
    else:
        v_block = tl.load(v + columns[None, :] + key[:, None] * WIDTH)
        part = tl.dot(p.to(tl.float16), v_block, out_dtype=tl.float16 if HALF_SUMS else tl.float32).to(tl.float32)
    # fma, since a sum of two terms would be made one with the product: added up within the tensor cores.
    return tl.fma(sums, decay[:, None], part), total * decay + tl.sum(p, 1), most


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attend8_kernel(
    q, q_scales, k, k_scales, v, v_scales, out, listed, counts, queries, keys, heads,
    batch_stride, token_stride, head_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PEAK: tl.constexpr, FLOAT8: tl.constexpr,
    HALF_SUMS: tl.constexpr, HAS_LIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. q, k, v: B*N tiles*TILE WIDTH, of FLOAT8 v B*N WIDTH tiles*TILE; out: B L N D."""
    first, number = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    head = number.to(tl.int64)
    padded_queries, padded_keys = tl.cdiv(queries, TILE) * TILE, tl.cdiv(keys, TILE) * TILE
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    own_q = tl.load(q + head * padded_queries * WIDTH + rows[:, None] * WIDTH + columns[None, :])
    q_scale = tl.load(q_scales + head * padded_queries + rows)
    own_k, own_v = k + head * padded_keys * WIDTH, v + head * padded_keys * WIDTH
    own_k_scales = k_scales + head * (padded_keys // TILE)
    own_list, count, last = _tiles_seen(listed, counts, queries, keys, head, first, HAS_LIST, TILE)
    steps = (count - 1) * (TILE // BLOCK_N) + tl.cdiv(tl.minimum(keys - last * TILE, TILE), BLOCK_N)

    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    base = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = _first_key(own_list, 0, HAS_LIST, TILE, BLOCK_N)
    for step in range(1, steps):
        following = _first_key(own_list, step, HAS_LIST, TILE, BLOCK_N)  # early, so that no copy has to wait for it
        sums, total, base = _step8(
            sums, total, base, own_q, q_scale, own_k, own_k_scales, own_v, start, keys, padded_keys,
            WIDTH, TILE, PEAK, FLOAT8, HALF_SUMS, BLOCK_M, BLOCK_N, MASKED=False,
        )  # fmt: skip
        start = following
    sums, total, base = _step8(
        sums, total, base, own_q, q_scale, own_k, own_k_scales, own_v, start, keys, padded_keys,
        WIDTH, TILE, PEAK, FLOAT8, HALF_SUMS, BLOCK_M, BLOCK_N, MASKED=True,
    )  # fmt: skip

    v_scale = tl.load(v_scales + number * D + columns, mask=columns < D, other=0.0)
    value = sums * (1.0 / total)[:, None] * v_scale[None, :]
    own_out = _head_of(out, number, heads, batch_stride, head_stride)
    place = own_out + rows[:, None].to(tl.int64) * token_stride + columns[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=(rows < queries)[:, None] & (columns < D)[None, :])


@triton.jit
def _step16(
    sums, total, base, q, k, v, k_stride, v_stride, start, keys, factor,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As _step8, of unrounded numbers. k_stride, v_stride: of tokens."""
    columns, key = tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    k_there, v_there = (columns < D)[:, None], (columns < D)[None, :]
    if MASKED:
        k_there, v_there = k_there & (start + key < keys)[None, :], v_there & (start + key < keys)[:, None]
    k_place = k + start.to(tl.int64) * k_stride + columns[:, None] + key[None, :] * k_stride
    v_place = v + start.to(tl.int64) * v_stride + columns[None, :] + key[:, None] * v_stride
    k_block = tl.load(k_place, mask=k_there, other=0.0) if MASKED or D < WIDTH else tl.load(k_place)
    scores = tl.dot(q, k_block, input_precision="ieee")
    if MASKED:
        scores = tl.where((start + key < keys)[None, :], scores, float("-inf"))
    most = tl.maximum(base, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor - most[:, None])
    decay = tl.exp2(base - most)
    v_block = tl.load(v_place, mask=v_there, other=0.0) if MASKED or D < WIDTH else tl.load(v_place)
    sums = tl.dot(p.to(v_block.dtype), v_block, sums * decay[:, None], input_precision="ieee")
    return sums, total * decay + tl.sum(p, 1), most


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def attend16_kernel(
    q, k, v, out, listed, counts, queries, keys, heads, factor,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head, out_batch, out_stride, out_head,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_LIST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. q, k, v, out: B L N D, with strides of batch entries, tokens and heads."""
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    is_there = (rows < queries)[:, None] & (columns < D)[None, :]
    q_place = _head_of(q, head, heads, q_batch, q_head) + rows[:, None].to(tl.int64) * q_stride + columns[None, :]
    own_q = tl.load(q_place, mask=is_there, other=0.0)
    own_k, own_v = _head_of(k, head, heads, k_batch, k_head), _head_of(v, head, heads, v_batch, v_head)
    own_list, count, last = _tiles_seen(listed, counts, queries, keys, head.to(tl.int64), first, HAS_LIST, TILE)
    steps = (count - 1) * (TILE // BLOCK_N) + tl.cdiv(tl.minimum(keys - last * TILE, TILE), BLOCK_N)

    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    base = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = _first_key(own_list, 0, HAS_LIST, TILE, BLOCK_N)
    for step in range(1, steps):
        following = _first_key(own_list, step, HAS_LIST, TILE, BLOCK_N)  # early, so that no copy has to wait for it
        sums, total, base = _step16(
            sums, total, base, own_q, own_k, own_v, k_stride, v_stride, start, keys, factor, D, WIDTH, BLOCK_N, False
        )
        start = following
    sums, total, base = _step16(
        sums, total, base, own_q, own_k, own_v, k_stride, v_stride, start, keys, factor, D, WIDTH, BLOCK_N, True
    )

    out_place = _head_of(out, head, heads, out_batch, out_head) + rows[:, None].to(tl.int64) * out_stride
    value = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out_place + columns[None, :], value, mask=is_there)


# --- calls -------------------------------------------------------------------------------------------------------


def padded_width(width: int, narrowest: int) -> int:
    return max(narrowest, triton.next_power_of_2(width))


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch entries, tokens and heads. B L N D, channels contiguous."""
    return x.stride(0), x.stride(1), x.stride(2)


def int8_rows(x: Tensor, width: int, mean: Tensor | None, factor: float, per_row: bool) -> tuple[Tensor, Tensor]:
    """B L N D -> int8 B*N tiles*128 `width`, and scales times `factor`: float32 B*N tiles*128, or B*N tiles."""
    (batch, tokens, heads, channels), tiles = x.shape, tiles_of(x.shape[1])
    out = torch.empty(batch * heads, tiles * TILE, width, device=x.device, dtype=torch.int8)
    scales = torch.empty(batch * heads, tiles * TILE if per_row else tiles, device=x.device)
    rows_kernel[(tiles, batch * heads)](
        x, mean, out, scales, tokens, heads, *strides(x), factor, D=channels, WIDTH=width, TILE=TILE,
        HAS_MEAN=mean is not None, PER_ROW=per_row, FAINTEST=FAINTEST, num_warps=8,
    )  # fmt: skip
    return out, scales


def scaled_values(v: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B L N D -> float16 B*N tiles*128 `width` or e4m3 B*N `width` tiles*128, and scales B*N D.

    The tensor cores take 8-bit values with neighbouring tokens side by side.
    """
    (batch, tokens, heads, channels), tiles = v.shape, tiles_of(v.shape[1])
    scales, is_float8 = value_scales(v, dtype), dtype == torch.float8_e4m3fn
    shape = (width, tiles * TILE) if is_float8 else (tiles * TILE, width)
    out = torch.empty(batch * heads, *shape, device=v.device, dtype=dtype)
    values_kernel[(tiles, batch * heads)](
        v, scales, out, tokens, heads, *strides(v), D=channels, WIDTH=width, TILE=TILE, BY_CHANNEL=is_float8,
        num_warps=8,
    )  # fmt: skip
    return out, scales


def lists_or_not(listed: Tensor | None, counts: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both, or memory that is not read: a kernel takes no None in place of what another branch of it reads."""
    if listed is None:
        return (torch.empty(1, dtype=torch.int32, device=device),) * 2
    return listed, counts


def contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def prepare8(
    made: KeysValues, capability: tuple[int, int] | None = None, tiling: Tiling | None = None
) -> Callable[..., Tensor]:
    """Attention in 8 bits to these keys, of which 8-bit copies are kept and nothing else.

    Args:
        made: in bfloat16, float16 or float32, D from 16 to 128.
        capability: of the cards whose kernel is run, from (8, 9) on with FP8; that of the tensors' card if not given.
    Returns:
        A function (q, listed, counts) -> B L N D, of the type of q and with lists as `attend8` has them.
    """
    k = made.keys()
    keys, channels = k.shape[1], k.shape[-1]
    assert NARROWEST <= channels <= WIDEST
    capability = capability or capability_of(k.device)
    value_type = value_type_of(capability)
    tiling = tiling or best_config(capability, channels, 8)
    width = padded_width(channels, 32)  # products of 8 bits are 32 deep
    with torch.cuda.device_of(k):
        k8 = int8_rows(contiguous_channels(k), width, sampled_means(k), 1.0, per_row=False)
        del k  # before there are values
        v8 = scaled_values(contiguous_channels(made.values()), width, value_type)

    def attend(q: Tensor, listed: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        assert listed is None or (listed.is_contiguous() and counts.is_contiguous())
        batch, queries, heads, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        with torch.cuda.device_of(q):
            q8 = int8_rows(contiguous_channels(q), width, None, score_factor(channels), per_row=True)
            attend8_kernel[(triton.cdiv(queries, tiling.BLOCK_M), batch * heads)](
                *q8, *k8, *v8, out, *lists_or_not(listed, counts, q.device), queries, keys, heads, *strides(out),
                D=channels, WIDTH=width, TILE=TILE, PEAK=PEAK[value_type], FLOAT8=value_type == torch.float8_e4m3fn,
                HALF_SUMS=has_slow_float32_sums(capability), HAS_LIST=listed is not None, **asdict(tiling),
            )  # fmt: skip
        return out

    return attend


def attend8(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor | None = None, counts: Tensor | None = None,
    capability: tuple[int, int] | None = None, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Attention in 8 bits of bfloat16, float16 or float32. B L N D -> B L N D of the same type, D from 16 to 128.

    Args:
        listed: B*N tiles(q) tiles(k), int32: the tiles of 128 keys that each tile of 128 queries sees; the last
            tile of all, which may be partly filled, comes last where it is seen.
        counts: B*N tiles(q), int32: how many of them, at least one.
        capability, tiling: as for `prepare8`.
    """
    return prepare8(KeysValues.of(k, v), capability, tiling)(q, listed, counts)


def attend16(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor | None = None, counts: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Exact attention of bfloat16, float16 or float32. B L N D -> the same, D from 16 to 128. Lists as for attend8.

    float32 is multiplied in float32, without TF32; the others with P in their own precision, summed in float32.
    """
    assert NARROWEST <= q.shape[-1] <= WIDEST
    assert listed is None or (listed.is_contiguous() and counts.is_contiguous())
    bits = 32 if q.dtype == torch.float32 else 16
    tiling = tiling or best_config(capability_of(q.device), q.shape[-1], bits)
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    batch, queries, heads, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        attend16_kernel[(triton.cdiv(queries, tiling.BLOCK_M), batch * heads)](
            q, k, v, out, *lists_or_not(listed, counts, q.device), queries, k.shape[1], heads, score_factor(channels),
            *strides(q), *strides(k), *strides(v), *strides(out), D=channels,
            WIDTH=padded_width(channels, 16), TILE=TILE, HAS_LIST=listed is not None, **asdict(tiling),
        )  # fmt: skip
    return out
