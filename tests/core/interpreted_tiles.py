"""The kernels that make 8-bit tiles as Python on the CPU, and what the 8-bit attention kernel computes from them. Run
by test_interpreted.py in a process in which TRITON_INTERPRET is set before Triton is imported.

Triton's interpreter cuts float32 off when it makes e4m3; `honest_rounding` has it round, as a card does.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from interpreted_kernels import honest_rounding, no_gradients  # noqa: F401  (fixtures)

from wan_s2v_core.acceleration.attention import hopper
from wan_s2v_core.acceleration.attention.norms import largest_norms
from wan_s2v_core.acceleration.attention.reference import LARGEST_VALUE, emulate8, sampled_means, score_factor
from wan_s2v_core.acceleration.attention.tiles import (
    KEY_TILE_BYTES,
    TILE,
    key_tiles,
    query_tiles,
    value_tiles,
)

FACTOR = score_factor(TILE)
"""What makes products of queries and keys powers of two."""
CASES = [
    ((1, 128, 1), torch.bfloat16),
    ((2, 131, 3), torch.float32),
    ((1, 1, 2), torch.bfloat16),
    ((2, 300, 1), torch.bfloat16),
]
"""B L N, and the type."""
SOURCE = (hopper.FOLDER / hopper.SOURCES["attend8"]).read_text()
USUAL_P, TOP_P, ROOM = (
    float(re.search(rf"{name} = ([\d.]+)f", SOURCE)[1]) for name in ("USUAL_P", "LARGEST_P", "ROOM")
)
"""log2 of the largest probability when a row's base is set and of the largest in e4m3, and how far above a base scores
may rise unseen."""
LARGEST_P, WARP_ROWS = LARGEST_VALUE[torch.float8_e4m3fn], 16
"""The largest probability that e4m3 holds, and the rows that raise their base together."""


def unswizzle(tiles):
    """Tiles as rows of 128: ... 16384 -> ... 128 128."""
    rows, columns = torch.arange(TILE)[:, None], torch.arange(TILE)[None]
    places = rows * TILE + ((columns // 16) ^ (rows % 8)) * 16 + columns % 16
    return tiles[..., places.to(tiles.device)]


def token_places():
    """Where in a row of a value tile each of its 128 tokens lies."""
    token = torch.arange(TILE)
    within = token % 16
    return token - within + (within % 8) // 2 * 4 + within // 8 * 2 + within % 2


def random(shape, dtype=torch.float32):
    """B L N 128, in rows of a wider tensor, as queries lie in a product for queries, keys and values."""
    return torch.randn(*shape, 2 * TILE).to(dtype)[..., :TILE]


def by_head(x):
    """B L N D -> B*N L D, float32."""
    return x.transpose(1, 2).flatten(0, 1).float()


def as_tiles(x):
    """B*N L D -> B*N tiles 128 D; zeros past the end."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))


def keys_of(tiles):
    """Integers B*N tiles 128 128, and the scale of each tile."""
    return unswizzle(tiles[..., : TILE * TILE]).float(), tiles.view(torch.float32)[..., TILE * TILE // 4]


def values_of(tiles):
    """B*N tiles 128(token) 128(channel), as e4m3 has them."""
    rows = unswizzle(tiles.view(torch.uint8)).view(torch.float8_e4m3fn).float()  # a row is a channel
    return rows[..., token_places()].mT


def near(rounded, exact, scale):
    """Within half a step."""
    assert ((rounded * scale - exact).abs() <= 0.5001 * scale + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_query_tiles(shape, dtype):
    q = random(shape, dtype)
    tiles, scales = query_tiles(q)
    exact = as_tiles(by_head(q))
    assert tiles.dtype == torch.int8 and tiles.shape == (*exact.shape[:2], TILE * TILE)
    rows = unswizzle(tiles).float()
    steps = scales[..., None] / FACTOR
    near(rows, exact, steps)
    there = exact.abs().amax(dim=-1, keepdim=True) > 0
    assert (rows.abs().amax(dim=-1, keepdim=True)[there] == 127).all(), "a row uses all of int8"
    assert not rows[~there.expand_as(rows)].any() and torch.isfinite(scales).all() and (scales > 0).all()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_key_tiles_leave_out_the_mean(shape, dtype):
    k = random(shape, dtype) + 10 * torch.randn(TILE).to(dtype)
    tiles, norms = key_tiles(k)
    means = sampled_means(k)
    torch.testing.assert_close(means, by_head(k)[:, ::16].mean(dim=1), atol=1e-4, rtol=1e-4)
    exact = as_tiles(by_head(k) - means[:, None])
    assert tiles.dtype == torch.int8 and tiles.shape == (*exact.shape[:2], KEY_TILE_BYTES)
    rows, scale = keys_of(tiles)
    near(rows, exact, scale[..., None, None])
    most = exact.abs().amax(dim=(-2, -1))
    torch.testing.assert_close(scale, most / 127, atol=1e-17, rtol=1e-5)
    longest = (rows * scale[..., None, None]).norm(dim=-1).amax(dim=(-2, -1))
    torch.testing.assert_close(norms, longest, atol=1e-17, rtol=1e-5)
    assert not as_tiles(torch.ones_like(by_head(k))).logical_not().logical_and(rows != 0).any(), "no keys past the end"


@pytest.mark.parametrize(("shape", "dtype"), [*CASES, ((1, 1100, 1), torch.float32)])
def test_value_tiles(shape, dtype):
    v = random(shape, dtype) * torch.logspace(-3, 3, TILE).to(dtype)
    tiles, scales = value_tiles(v)
    exact, wide = as_tiles(by_head(v)), by_head(v)
    torch.testing.assert_close(scales, wide.abs().amax(dim=1) / 448, atol=0, rtol=1e-5)
    assert tiles.dtype == torch.float8_e4m3fn and tiles.shape == (*exact.shape[:2], TILE * TILE)
    found = values_of(tiles)
    expected = (exact / scales[:, None, None]).to(torch.float8_e4m3fn).float()
    assert torch.equal(found, expected), "rounded to the nearest, each where it belongs"


def test_places_of_tokens_are_an_order():
    assert torch.equal(token_places().sort().values, torch.arange(TILE))
    tile = torch.arange(TILE * TILE)
    assert torch.equal(unswizzle(tile).flatten().sort().values, tile)
    for row in (0, 1, 7, 9):  # 16 bytes at a time, by the last bits of the row
        chunks = unswizzle(tile)[row].unflatten(0, (8, 16))[:, 0] % TILE // 16
        assert chunks.tolist() == [chunk ^ (row % 8) for chunk in range(8)]


def test_zeros_stay_zeros():
    q, k, v = (random((1, 130, 2)) for _ in range(3))
    q[0, 5], k[0, :, 1], v[0, :, 0, 7] = 0, 0, 0
    tiles, scales = query_tiles(q)
    assert not unswizzle(tiles)[:, 0, 5].any() and (scales[:, 0, 5] > 0).all()
    rows, scale = keys_of(key_tiles(k)[0])
    assert not rows[1].any() and (scale > 0).all()
    tiles, scales = value_tiles(v)
    assert not values_of(tiles)[0, :, :, 7].any() and scales[0, 7] == 0
    assert torch.isfinite(attend_tiles(q, k, v)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_hidden(wrong):
    """It shows in the results of those that see it, as it would without 8 bits."""
    q, k, v = (random((1, 260, 2)) for _ in range(3))
    q[0, 3, 1, 9] = wrong
    out = attend_tiles(q, k, v)
    seen = out.isfinite().all(dim=-1)
    assert not seen[0, 3, 1] and seen.sum() == 2 * 260 - 1
    q[0, 3, 1, 9], k[0, 201, 0, 100] = 0, wrong  # no token that the mean of the keys is taken from
    assert torch.equal(attend_tiles(q, k, v).isfinite().all(dim=-1)[0].any(dim=0), torch.tensor([False, True]))
    k[0, 201, 0, 100], v[0, 77, 1, 5] = 0, wrong
    seen = attend_tiles(q, k, v).isfinite()[0]
    assert not seen[:, 1, 5].any() and seen.sum() == 260 * (2 * TILE - 1)


def attend_tiles(q, k, v, listed=None):
    """What attend8 of hopper8.cu computes from the tiles, step by step. B L N 128 -> B L N 128, float32.

    Args:
        listed: numbers of the key tiles that are seen by all, the last of all being the last; None for all of them.
    """
    (q_tiles, q_scale), (k_tiles, norms), (v_tiles, v_scale) = query_tiles(q), key_tiles(k), value_tiles(v)
    (k8, k_scale), q8, v8 = keys_of(k_tiles), unswizzle(q_tiles).float().flatten(1, 2), values_of(v_tiles)
    q_scale, keys = q_scale.flatten(1, 2)[..., None], k.shape[1]
    sums, total = torch.zeros_like(q8), torch.zeros_like(q_scale)
    bound, base, bounded = q8.norm(dim=-1, keepdim=True) * q_scale * norms[:, None, None], None, None
    for number in range(k8.shape[1]) if listed is None else listed:
        scores = q8 @ k8[:, number].mT * (q_scale * k_scale[:, number, None, None])
        scores[..., max(0, keys - number * TILE) :] = -torch.inf
        most = scores.amax(dim=-1, keepdim=True)
        if base is None:
            base = most
            bounded = ~of_warp(~(bound - base <= ROOM))
        looked = torch.where(~bounded & of_warp(most > base + TOP_P - USUAL_P), torch.maximum(base, most), base)
        p = torch.exp2((scores - looked + USUAL_P).float())
        too_large = ~(rounded(p).amax(dim=-1, keepdim=True) < LARGEST_P)  # NaN is
        rise = (p.amax(dim=-1, keepdim=True).log2() - USUAL_P).ceil().clamp(min=0).nan_to_num(0.0)
        new = torch.where(bounded & of_warp(too_large), looked + rise, looked)
        p = rounded(p * torch.exp2(looked - new).nan_to_num(1.0))
        decay = torch.exp2(base - new).nan_to_num(1.0)
        base, sums = new, sums * decay + p @ v8[:, number]
        total = total * decay + p.sum(dim=-1, keepdim=True)
    out = sums / total * v_scale[:, None]
    return out[:, : q.shape[1]].unflatten(0, (len(q), -1)).transpose(1, 2)


def of_warp(flags):
    """Whether a flag of any of the rows is set that a warp does together. heads rows 1, bool."""
    return flags.unflatten(1, (-1, WARP_ROWS)).any(dim=2, keepdim=True).expand(-1, -1, WARP_ROWS, -1).flatten(1, 2)


def rounded(p):
    """Probabilities in e4m3; too large ones become the largest."""
    return p.clamp(max=LARGEST_P).to(torch.float8_e4m3fn).float()


def error_of(out, q, k, v):
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 257, 2), torch.bfloat16), ((2, 131, 1), torch.float32), ((1, 500, 1), torch.bfloat16)]
)
def test_attention_from_tiles_is_near_the_exact_one(shape, dtype):
    q, k, v = (random(shape, dtype) for _ in range(3))
    assert 0.005 < error_of(attend_tiles(q, k, v), q, k, v) < 0.06
    shifted = k + (10 * torch.randn(TILE)).to(dtype)
    assert error_of(attend_tiles(q, shifted, v), q, shifted, v) < 0.06, "what all keys share costs nothing"


def test_sharp_attention_finds_its_key():
    """Scores far apart, rising and falling from tile to tile, so that bases have to follow."""
    keys = 5 * TILE - 3
    k, v = random((1, keys, 1)), random((1, keys, 1))
    order = torch.randperm(keys)
    q = 3 * k[:, order]
    assert error_of(attend_tiles(q, k, v), q, k, v) < 0.06
    assert error_of(attend_tiles(q, k, v), k[:, order] * 3, k, v) < 0.06
    assert error_of(v[:, order], q, k, v) < 0.06, "each query sees the key that it was made from"


@pytest.mark.parametrize("times", [1, 6, 40, 400])
def test_keys_grow_longer_from_tile_to_tile(times):
    """Scores rise by up to so many times what float32 holds of a power, so that both ways to follow them are taken.
    What rounding queries and keys does is the same in the plain twin."""
    keys = 4 * TILE + 9
    k, v = random((1, keys, 2)), random((1, keys, 2))
    k *= torch.linspace(0.1, times, keys)[:, None, None]
    q = random((1, 200, 2))
    twin = emulate8(q, k, v)
    assert float((attend_tiles(q, k, v) - twin).norm() / twin.norm()) < 0.06


def test_largest_norms():
    for shape, dtype in CASES:
        k = random(shape, dtype)
        expected = k.float().norm(dim=-1).amax(dim=1).flatten()
        torch.testing.assert_close(largest_norms(k), expected, atol=0, rtol=1e-5)
    for wrong in (torch.nan, torch.inf, -torch.nan):
        k[1, 77, 0, 5] = wrong
        norms = largest_norms(k)
        assert norms[0].isfinite() and not norms[1].isfinite()


def test_listed_tiles_are_seen_and_no_others():
    q, k, v = (random((1, 3 * TILE + 40, 1)) for _ in range(3))
    seen = torch.cat([torch.arange(TILE), torch.arange(3 * TILE, 3 * TILE + 40)])
    listed = attend_tiles(q, k, v, listed=[0, 3])
    assert error_of(listed, q, k[:, seen], v[:, seen]) < 0.06 < error_of(listed, q, k, v)
