"""What the attention kernels compute, in plain torch: attention to listed tiles, and the numbers of 8-bit attention.

For tests, and for CPUs, which show what a sparse or an 8-bit attention does to a video without the kernels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import TILE
from ...model.attention import scaled_dot_product
from ...seams import KeysValues

MEAN_STRIDE = 16
"""Every so many tokens are looked at for the mean of the keys. What is subtracted need not be the exact mean: any
vector leaves softmax as it is, since it adds the same to all scores of a query."""
FAINTEST = 1e-18
"""Scales are no smaller: a score of minus infinity times a scale of zero would be NaN."""
LARGEST_INT8 = 127.0
LARGEST_VALUE = {torch.float8_e4m3fn: 448.0, torch.float16: 1.0}
"""To this the largest value of a channel is scaled, by the type that values are kept in. Values of at most 1 let
float16 sum the products of a tile."""
PEAK = {torch.float8_e4m3fn: math.log2(448.0), torch.float16: 8.0}
"""log2 of the largest probability when it is rounded: an exact number of either type, so that a query which sees one
key gets its value. 128 products in float16 stay within 2^15."""


def score_factor(width: int) -> float:
    """What makes products of queries and keys powers of two in the softmax. width: channels of a head."""
    return math.log2(math.e) / math.sqrt(width)


def sampled_means(x: Tensor) -> Tensor:
    """About the mean of every channel of every head over the tokens. B L N D -> B*N D, float32."""
    return x[:, ::MEAN_STRIDE].mean(dim=1, dtype=torch.float32).flatten(0, 1)


def value_scales(v: Tensor, dtype: torch.dtype) -> Tensor:
    """What each channel is divided by to be kept in `dtype`. B L N D -> B*N D, float32."""
    largest = torch.linalg.vector_norm(v, torch.inf, dim=1).flatten(0, 1).float()
    scales = largest / LARGEST_VALUE[dtype]
    return torch.where(scales < FAINTEST, 1.0, scales)


# --- lists of tiles ----------------------------------------------------------------------------------------------


def seen_tiles(listed: Tensor, counts: Tensor) -> Tensor:
    """Which tiles are listed, bool. Both B*N tiles(q) tiles(k); of a list only the first `counts` mean something."""
    tiles = listed.shape[-1]
    is_meant = torch.arange(tiles, device=listed.device) < counts[..., None]
    places = torch.where(is_meant, listed, tiles).long()
    seen = torch.zeros(*listed.shape[:-1], tiles + 1, dtype=torch.bool, device=listed.device)
    return seen.scatter_(-1, places, True)[..., :tiles]


def dense_mask(listed: Tensor, counts: Tensor, queries: int, keys: int) -> Tensor:
    """Which key each query sees: B*N L(q) L(k), bool.

    Args:
        listed: B*N tiles(q) tiles(k), int32: the key tiles that each query tile sees, in rising order.
        counts: B*N tiles(q), int32: how many of them.
    """
    seen = seen_tiles(listed, counts).repeat_interleave(TILE, dim=1)[:, :queries]
    return seen.repeat_interleave(TILE, dim=2)[..., :keys]


def prepare_listed(made: KeysValues) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Exact attention to listed tiles of these keys: a function (q, listed, counts) -> B L N D.

    Lists as for dense_mask. One tile of queries of one head at a time, with copies of the keys it sees: no mask, and
    work and memory for no more than what is listed.
    """
    k, v = made.both()
    keys = k.shape[1]
    padded = [F.pad(x, (0, 0, 0, 0, 0, -keys % TILE)).unflatten(1, (-1, TILE)) for x in (k, v)]  # B tiles 128 N D

    def attend(q: Tensor, listed: Tensor, counts: Tensor) -> Tensor:
        queries, heads = q.shape[1:3]
        out = torch.empty_like(q)
        for row, lists in enumerate(listed.cpu()):
            batch, head = divmod(row, heads)
            for tile, count in enumerate(counts[row].tolist()):
                seen = lists[tile, :count].to(q.device)
                length = (count - 1) * TILE + min(TILE, keys - int(seen[-1]) * TILE)  # the last one may be shorter
                here = slice(tile * TILE, min((tile + 1) * TILE, queries))
                k_seen, v_seen = (x[batch, seen, :, head].flatten(0, 1)[None, :length, None] for x in padded)
                out[batch, here, head] = scaled_dot_product(q[batch, None, here, head, None], k_seen, v_seen)[0, :, 0]
        return out

    return attend


def attend_listed(q: Tensor, k: Tensor, v: Tensor, listed: Tensor, counts: Tensor) -> Tensor:
    """Exact attention to the listed tiles. B L N D -> B L N D; see `prepare_listed`."""
    return prepare_listed(KeysValues.of(k, v))(q, listed, counts)


# --- 8 bits ------------------------------------------------------------------------------------------------------


def heads_first(x: Tensor) -> Tensor:
    """B L N D -> B*N L D, float32."""
    return x.transpose(1, 2).flatten(0, 1).float()


def rounded(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of at most 127 and their scale. x, and the largest of what shares a scale, broadcastable to x."""
    scale = largest / LARGEST_INT8
    scale = torch.where(scale < FAINTEST, FAINTEST, scale)
    return torch.floor(x / scale + 0.5), scale


def rounded_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """B L N D -> integers B*N L D, and their scales B*N L 1, which make scores powers of two."""
    wide = heads_first(q)
    values, scale = rounded(wide, wide.abs().amax(dim=-1, keepdim=True))
    return values, scale * score_factor(q.shape[-1])


def rounded_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """B L N D -> integers B*N tiles 128 D and their scales B*N tiles 1 1, of keys less about their mean."""
    wide = heads_first(k) - sampled_means(k)[:, None]
    wide = F.pad(wide, (0, 0, 0, -wide.shape[1] % TILE)).unflatten(1, (-1, TILE))
    return rounded(wide, wide.abs().amax(dim=(-2, -1), keepdim=True))


def rounded_values(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B L N D -> values as `dtype` has them B*N L D, and their scales B*N 1 D; both float32."""
    scale = value_scales(v, dtype)[:, None]
    return (heads_first(v) / scale).to(dtype).float(), scale


def prepare_emulated8(
    made: KeysValues, value_type: torch.dtype = torch.float8_e4m3fn, keys_at_once: int = 64
) -> Callable[..., Tensor]:
    """Attention to these keys with the numbers of the 8-bit kernels, multiplied in float32.

    Args:
        value_type: what probabilities and values are rounded to: float8_e4m3fn, or float16 as on cards without it.
        keys_at_once: a power of two up to 128: keys between two looks at the largest score, as the kernels' tiling has.
    Returns:
        A function of q: B L N D, and of lists as for dense_mask, or None to see all keys -> B L N D.
    """
    (k8, k_scale), (v8, v_scale) = rounded_keys(made.keys()), rounded_values(made.values(), value_type)
    all_keys = v8.shape[1]

    def attend(q: Tensor, listed: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        q8, q_scale = rounded_queries(q)
        seen = None if listed is None else seen_tiles(listed, counts).repeat_interleave(TILE, dim=1)[:, : q.shape[1]]
        sums, total = torch.zeros_like(q8), torch.zeros_like(q_scale)
        base = torch.full_like(q_scale, -torch.inf)
        for start in range(0, all_keys, keys_at_once):
            tile, keys = start // TILE, min(keys_at_once, all_keys - start)
            scores = q8 @ k8[:, tile, start % TILE :][:, :keys].mT * (q_scale * k_scale[:, tile])
            if seen is not None:
                scores = scores.masked_fill(~seen[:, :, tile, None], -torch.inf)
            most = torch.maximum(base, scores.amax(dim=-1, keepdim=True))
            finite = torch.where(most == -torch.inf, 0.0, most)  # rows that have not seen a key yet
            p, decay = torch.exp2(scores - finite + PEAK[value_type]), torch.exp2(base - finite)
            total = total * decay + p.sum(dim=-1, keepdim=True)
            sums = sums * decay + p.to(value_type).float() @ v8[:, start : start + keys]
            base = most
        out = (sums / total * v_scale).to(q.dtype)
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)

    return attend


def emulate8(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor | None = None, counts: Tensor | None = None,
    value_type: torch.dtype = torch.float8_e4m3fn, keys_at_once: int = 64,
) -> Tensor:  # fmt: skip
    """Attention with the numbers of the 8-bit kernels. B L N D -> B L N D; see `prepare_emulated8`."""
    return prepare_emulated8(KeysValues.of(k, v), value_type, keys_at_once)(q, listed, counts)
