"""The Triton attention kernels as Python on the CPU. Run by test_interpreted.py in a process in which
TRITON_INTERPRET is set before Triton is imported."""

import numpy as np
import pytest
import torch
from interpreted_kernels import convert
from test_portable_attention import EXACT, VALUE_ERROR, gap, random_lists, random_qkv
from triton.runtime import interpreter

from wan_s2v_core.acceleration.attention import reference
from wan_s2v_core.acceleration.attention.portable import Tiling, attend8, attend16, value_type_of
from wan_s2v_core.model.attention import scaled_dot_product

A100, RTX_3090, RTX_4090 = (8, 0), (8, 6), (8, 9)
"""float16 values; those summed in float16 too; float8 values."""
EMULATED = {A100: 5e-4, RTX_3090: 3e-3, RTX_4090: 6e-3}
"""How far emulate8 may be off, relative L2. Scores differ in the last bits of float32, so that a probability near the
middle between two numbers goes to the other one: a step is 1/8 of it in e4m3 and 1/1024 in float16. Sums in float16 are
rounded to 1/2048 after each product here, where the tensor cores round once for 16."""


# --- what Triton 3.6's interpreter does otherwise than a card ----------------------------------------------------


def widen(handle):
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    if handle.dtype.name != "bf16":
        return handle
    wide = convert(handle.data, handle.dtype, interpreter.tl.float32).view(np.float32)
    return interpreter.TensorHandle(wide, interpreter.tl.float32)


@pytest.fixture(autouse=True)
def like_a_card(monkeypatch):
    multiply, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def create_dot(self, a, b, *others):
        return multiply(self, widen(a), widen(b), *others)

    def patch_tensor(tensor, scope):  # for range() over a tensor, which NumPy 2 makes no integer of
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)


@pytest.fixture(autouse=True)
def random(fresh_seed):
    torch.manual_seed(fresh_seed)


# --- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "dtype"),
    [
        (1, 300, 2, 64, torch.float32),
        (300, 1, 1, 24, torch.float16),
        (127, 129, 3, 32, torch.bfloat16),
        (129, 127, 1, 128, torch.float16),
        (300, 300, 1, 80, torch.bfloat16),
        (9, 33, 40, 16, torch.float32),
    ],
)
def test_exact_attention_is_torch_s(queries, keys, heads, width, dtype):
    q, k, v = random_qkv(queries, keys, heads, width, dtype, batch=2 if heads == 3 else 1)
    out = attend16(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    assert gap(out, scaled_dot_product(q.float(), k.float(), v.float())) < EXACT[dtype]


@pytest.mark.parametrize(
    ("queries", "keys", "tiling"), [(300, 513, Tiling(64, 128, 4, 1)), (257, 300, Tiling(128, 32, 4, 1))]
)
def test_exact_attention_to_listed_tiles(queries, keys, tiling):
    q, k, v = random_qkv(queries, keys, 1, 32, torch.float32, batch=2)
    lists = random_lists(2, queries, keys)
    expected = reference.attend_listed(q, k, v, *lists)
    assert gap(attend16(q, k, v, *lists, tiling=tiling), expected) < EXACT[torch.float32]
    assert gap(attend16(q, k, v, tiling=tiling), expected) > 0.1  # what is left out matters


# --- 8 bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [A100, RTX_3090, RTX_4090])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "dtype"),
    [
        (1, 300, 2, 64, torch.float32),
        (127, 129, 3, 24, torch.float32),
        (300, 127, 1, 128, torch.bfloat16),
        (129, 300, 1, 48, torch.float16),
        (9, 40, 40, 16, torch.float32),
    ],
)
def test_8_bits_are_near_and_as_emulated(queries, keys, heads, width, dtype, capability):
    q, k, v = random_qkv(queries, keys, heads, width, dtype, batch=2 if heads == 3 else 1)
    k = k + 4 * torch.randn(width, dtype=dtype)  # all scores of a query grow alike, which is not to cost precision
    out, value_type = attend8(q, k, v, capability=capability), value_type_of(capability)
    assert out.shape == q.shape and out.dtype == dtype
    assert gap(out, scaled_dot_product(q.float(), k.float(), v.float())) < VALUE_ERROR[value_type]
    emulated = reference.emulate8(q, k, v, value_type=value_type)
    rounding = 2 * torch.finfo(dtype).eps  # of the results
    assert gap(out, emulated) < EMULATED[capability] + rounding


@pytest.mark.parametrize(
    ("queries", "keys", "tiling", "capability"),
    [(257, 513, Tiling(64, 128, 4, 1), RTX_4090), (300, 300, Tiling(128, 32, 4, 1), A100)],
)
def test_8_bits_with_listed_tiles(queries, keys, tiling, capability):
    q, k, v = random_qkv(queries, keys, 2, 32, torch.float32)
    lists, value_type = random_lists(2, queries, keys), value_type_of(capability)
    out = attend8(q, k, v, *lists, capability=capability, tiling=tiling)
    assert gap(out, reference.attend_listed(q, k, v, *lists)) < VALUE_ERROR[value_type]
    emulated = reference.emulate8(q, k, v, *lists, value_type=value_type, keys_at_once=tiling.BLOCK_N)
    assert gap(out, emulated) < EMULATED[capability]


# --- both --------------------------------------------------------------------------------------------------------

KERNELS = {
    "exact": attend16,
    "float8": lambda *qkv: attend8(*qkv, capability=RTX_4090),
    "float16": lambda *qkv: attend8(*qkv, capability=A100),
}


@pytest.fixture(params=KERNELS)
def attend(request):
    return KERNELS[request.param]


def test_any_strides(attend):
    q, k, v = random_qkv(20, 20, 2, 24, torch.float32, batch=2)
    expected = attend(q, k, v)
    packed = torch.stack([q, k, v], dim=2).unbind(2)
    heads_outside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_apart = [x.mT.contiguous().mT for x in (q, k, v)]
    for views in (packed, heads_outside, channels_apart):
        assert not any(x.is_contiguous() for x in views)
        assert torch.equal(attend(*views), expected)


def test_rows_of_zeros(attend):
    q, k, v = random_qkv(5, 150, 2, 32, torch.float32)
    q[:, 3] = 0
    v[..., 7] = 0
    out = attend(q, k, v)
    assert (out[..., 7] == 0).all()
    assert gap(out[:, 3], v.mean(dim=1)) < VALUE_ERROR[torch.float8_e4m3fn]  # of all values alike
    assert gap(attend(q, torch.zeros_like(k), v), v.mean(dim=1, keepdim=True).expand_as(q)) < 0.06
    assert (attend(q, k, torch.zeros_like(v)) == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which casts NaN and takes the largest of it
def test_nan_is_seen(attend):
    q, k, v = random_qkv(9, 150, 2, 32, torch.float32)
    clean = attend(q, k, v)
    for broken, place, where in (
        (q, (0, 4, 1, 9), (0, 4, 1)),  # the query's row
        (k, (0, 141, 1, 9), (0, slice(None), 1)),  # all that see the key, which the mean does not
        (v, (0, 140, 1, 9), (0, slice(None), 1, 9)),  # its channel
    ):
        kept, broken[place] = broken[place].item(), torch.nan
        out, expected = attend(q, k, v), torch.zeros_like(q, dtype=torch.bool)
        expected[where] = True
        assert torch.equal(out.isnan(), expected)
        assert torch.equal(out[~expected], clean[~expected])
        broken[place] = kept


def test_a_query_that_sees_one_key_gets_its_value(attend):
    q, k, v = random_qkv(6, 200, 2, 16, torch.float32)
    chosen = torch.randint(200, ())
    k[:, chosen], q[:] = 60.0, 2.0
    expected = v[:, chosen : chosen + 1].expand_as(q)
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-3, rtol=1 / 16)  # e4m3's half step
