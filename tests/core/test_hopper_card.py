"""The attention kernels for Hopper cards, on one: queries and keys of any length, where no score can leave the
room above a base, and where scores rise from tile to tile beyond what float32 holds."""

import pytest
import torch
from test_portable_attention import gap, random_lists, random_qkv
from torch import Tensor

from wan_s2v_core.acceleration.attention.reference import attend_listed
from wan_s2v_core.acceleration.attention.registry import HOPPER_CARD
from wan_s2v_core.geometry import TILE
from wan_s2v_core.model.attention import scaled_dot_product
from wan_s2v_core.seams import KeysValues

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER_CARD
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper card")]

SHAPES = ((1, 1000, 3), (2, 77, 1), (1, 128, 40), (1, 1409, 2), (1, 2000, 3))
"""B L N."""
TIMES = (1, 8, 40, 400)
"""How long the last keys are."""


def rising_qkv(shape: tuple[int, int, int], dtype: torch.dtype, times: float) -> list[Tensor]:
    """Keys that become longer with the tokens and share an offset. B L N 128 each."""
    batch, tokens, heads = shape
    q, k, v = (x.cuda() for x in random_qkv(tokens, tokens, heads, 128, torch.float32, batch))
    ramp = torch.linspace(0.1, 1.0, tokens, device="cuda")[:, None, None]
    k = k * ramp * times + 3 * torch.randn(128, device="cuda")
    return [x.to(dtype) for x in (q, k, v)]


def lists_for(shape: tuple[int, int, int]) -> list[Tensor]:
    batch, tokens, heads = shape
    return [x.cuda() for x in random_lists(batch * heads, tokens, tokens)]


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *lists: Tensor) -> float:
    """Relative L2 to attention in float64."""
    exact = attend_listed if lists else scaled_dot_product
    return gap(out, exact(q.double(), k.double(), v.double(), *lists))


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.004), (torch.float16, 0.0006)])
def test_exact(dtype, allowed, times, fresh_seed):
    from wan_s2v_core.acceleration.attention.hopper import prepare16

    torch.manual_seed(fresh_seed)
    allowed += 1e-5 * times  # scores of thousands are exact to float32 no better than that
    for shape in SHAPES:
        q, k, v = rising_qkv(shape, dtype, times)
        attend = prepare16(KeysValues.of(k, v))
        out = attend(q)
        assert error_of(out, q, k, v) < allowed
        if shape[1] > TILE:
            assert torch.equal(attend(q[:, TILE:]), out[:, TILE:]), "slices of queries give the same bits"
            lists = lists_for(shape)
            assert error_of(attend(q, *lists), q, k, v, *lists) < allowed


@pytest.mark.parametrize("times", TIMES)
def test_in_8_bits(times, fresh_seed):
    from wan_s2v_core.acceleration.attention.hopper import prepare8

    torch.manual_seed(fresh_seed)
    for shape in SHAPES:
        q, k, v = rising_qkv(shape, torch.bfloat16, times)
        attend = prepare8(KeysValues.of(k, v))
        for lists in ([], lists_for(shape)) if shape[1] > TILE else ([],):
            out = attend(q, *lists)
            assert torch.isfinite(out).all()
            if times == 1:  # beyond it, rounding queries and keys alone decides which key wins
                assert error_of(out, q, k, v, *lists) < 0.06


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_hidden(wrong):
    from wan_s2v_core.acceleration.attention.hopper import prepare8, prepare16

    for prepare in (prepare16, prepare8):
        q, k, v = rising_qkv((1, 700, 2), torch.bfloat16, 1)
        k[0, 333, 1, 5] = wrong
        finite = prepare(KeysValues.of(k, v))(q).isfinite().all(dim=-1)[0]
        assert finite[:, 0].all() and not finite[:, 1].all()
