"""The attention kernels for Hopper cards, on one: queries and keys of any length, where no score can leave the
room above a base, and where scores rise from tile to tile beyond what float32 holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_s2v_core.acceleration.attention.reference import dense_mask
from wan_s2v_core.acceleration.attention.registry import HOPPER_CARD
from wan_s2v_core.geometry import TILE, tiles_of
from wan_s2v_core.seams import KeysValues

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER_CARD
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper card")]

SHAPES = ((1, 1000, 3), (2, 77, 1), (1, 128, 40), (1, 1409, 2), (1, 2000, 3))
"""B L N."""
TIMES = (1, 8, 40, 400)
"""How long the last keys are."""


def random_qkv(shape: tuple[int, int, int], dtype: torch.dtype, times: float) -> list[Tensor]:
    """Keys that become longer with the tokens and share an offset. B L N 128 each."""
    q, k, v = (torch.randn(*shape, 128, device="cuda") for _ in range(3))
    ramp = torch.linspace(0.1, 1.0, shape[1], device="cuda")[:, None, None]
    k = k * ramp * times + 3 * torch.randn(128, device="cuda")
    return [x.to(dtype) for x in (q, k, v)]


def random_lists(shape: tuple[int, int, int]) -> list[Tensor]:
    """About half of the tiles of keys for each tile of queries, in rising order, the last of all among them."""
    batch, tokens, heads = shape
    tiles = tiles_of(tokens)
    seen = torch.rand(batch * heads, tiles, tiles, device="cuda") < 0.5
    seen[..., -1] = True
    listed = torch.where(seen, torch.arange(tiles, device="cuda"), tiles).sort(dim=-1).values
    return [listed.clamp(max=tiles - 1).int().contiguous(), seen.sum(dim=-1).int()]


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *lists: Tensor) -> float:
    """Relative L2 to attention in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    mask = dense_mask(*lists, q.shape[2], k.shape[2]).unflatten(0, q.shape[:2]) if lists else None
    exact = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.004), (torch.float16, 0.0006)])
def test_exact(dtype, allowed, times, fresh_seed):
    from wan_s2v_core.acceleration.attention.hopper import prepare16

    torch.manual_seed(fresh_seed)
    allowed += 1e-5 * times  # scores of thousands are exact to float32 no better than that
    for shape in SHAPES:
        q, k, v = random_qkv(shape, dtype, times)
        attend = prepare16(KeysValues.of(k, v))
        out = attend(q)
        assert error_of(out, q, k, v) < allowed
        if shape[1] > TILE:
            assert torch.equal(attend(q[:, TILE:]), out[:, TILE:]), "slices of queries give the same bits"
        lists = random_lists(shape)
        assert error_of(attend(q, *lists), q, k, v, *lists) < allowed


@pytest.mark.parametrize("times", TIMES)
def test_in_8_bits(times, fresh_seed):
    from wan_s2v_core.acceleration.attention.hopper import prepare8

    torch.manual_seed(fresh_seed)
    for shape in SHAPES:
        q, k, v = random_qkv(shape, torch.bfloat16, times)
        attend, lists = prepare8(KeysValues.of(k, v)), random_lists(shape)
        for given in ([], lists):
            out = attend(q, *given)
            assert torch.isfinite(out).all()
            if times == 1:  # beyond it, rounding queries and keys alone decides which key wins
                assert error_of(out, q, k, v, *given) < 0.06


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_hidden(wrong):
    from wan_s2v_core.acceleration.attention.hopper import prepare8, prepare16

    for prepare in (prepare16, prepare8):
        q, k, v = random_qkv((1, 700, 2), torch.bfloat16, 1)
        k[0, 333, 1, 5] = wrong
        finite = prepare(KeysValues.of(k, v))(q).isfinite().all(dim=-1)[0]
        assert finite[:, 0].all() and not finite[:, 1].all()
