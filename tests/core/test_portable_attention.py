"""Attention kernels for any card: their numbers in plain torch, and the kernels in the compiler."""

import pytest
import torch
from torch import Tensor

from wan_s2v_core.acceleration.attention import reference
from wan_s2v_core.geometry import TILE, tiles_of
from wan_s2v_core.model.attention import scaled_dot_product

EXACT = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative L2 of exact kernels: float32 sums of some hundred terms; else P and the result rounded, by half of eps."""
VALUE_ERROR = {torch.float8_e4m3fn: 0.06, torch.float16: 0.025}
"""Relative L2 of 8-bit attention for random normal q, k, v. In e4m3 a number is off by 2^-4 over the root of 3 times
about 0.7, so P and V by 0.026 each, together 0.037; int8 scores by 0.011. So 0.039 is usual, and half as much again
allowed; with float16 0.011 are left, and twice that is allowed, since it is less even where there are few channels."""


def gap(value: Tensor, exact: Tensor) -> float:
    """Relative L2."""
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def random_qkv(queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    """B L N D."""
    return [torch.randn(batch, tokens, heads, width).to(dtype) for tokens in (queries, keys, keys)]


def random_lists(heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """About half of the key tiles, at least one and at least once not all; behind them numbers of no tile.

    heads: of all batch entries together.
    """
    tiles = tiles_of(keys)
    seen = torch.rand(heads, tiles_of(queries), tiles) < 0.5
    seen.scatter_(-1, torch.randint(tiles, (*seen.shape[:-1], 1)), True)
    seen[0, 0] = torch.arange(tiles) == torch.randint(tiles, ())
    counts = seen.sum(dim=-1)
    listed = torch.where(seen, torch.arange(tiles), 10**6).sort(dim=-1).values
    assert keys > TILE and counts.min() > 0
    return listed.int(), counts.int()


@pytest.fixture(autouse=True)
def random(fresh_seed):
    torch.manual_seed(fresh_seed)


# --- in plain torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(300, 513), (1, 129), (129, 300)])
def test_mask_shows_the_listed_tiles(queries, keys):
    listed, counts = random_lists(3, queries, keys)
    mask = reference.dense_mask(listed, counts, queries, keys)
    assert mask.shape == (3, queries, keys)
    for head, query in ((0, 0), (1, queries // 2), (2, queries - 1)):
        tiles = set(listed[head, query // 128, : counts[head, query // 128]].tolist())
        assert mask[head, query].tolist() == [key // 128 in tiles for key in range(keys)]


def test_listed_attention_is_masked_attention():
    q, k, v = random_qkv(150, 300, 3, 16, torch.float32, batch=2)
    listed, counts = random_lists(6, 150, 300)
    mask = reference.dense_mask(listed, counts, 150, 300)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / 4
    scores = scores.masked_fill(~mask.unflatten(0, (2, 3)), -torch.inf)
    expected = torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v)
    assert gap(reference.attend_listed(q, k, v, listed, counts), expected) < EXACT[torch.float32]


@pytest.mark.parametrize("value_type", VALUE_ERROR)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"), [(1, 300, 3, 64), (127, 129, 2, 24), (300, 127, 40, 16), (129, 1, 2, 128)]
)
def test_8_bits_are_near(queries, keys, heads, width, value_type):
    q, k, v = random_qkv(queries, keys, heads, width, torch.float32, batch=2)
    k += 4 * torch.randn(width)
    error = gap(reference.emulate8(q, k, v, value_type=value_type), scaled_dot_product(q, k, v))
    assert error < VALUE_ERROR[value_type]
    assert keys == 1 or error > 0.003  # it does round


@pytest.mark.parametrize("keys_at_once", [32, 128])
def test_8_bits_with_lists(keys_at_once):
    q, k, v = random_qkv(300, 513, 2, 32, torch.float32, batch=2)
    lists = random_lists(4, 300, 513)
    out = reference.emulate8(q, k, v, *lists, keys_at_once=keys_at_once)
    assert gap(out, reference.attend_listed(q, k, v, *lists)) < VALUE_ERROR[torch.float8_e4m3fn]
    assert gap(out, scaled_dot_product(q, k, v)) > 0.1
    all_listed = torch.arange(5).expand(4, 3, 5), torch.full((4, 3), 5)
    assert torch.equal(reference.emulate8(q, k, v, *all_listed), reference.emulate8(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_8_bits_keep_the_type_and_show_nan(dtype):
    q, k, v = random_qkv(40, 200, 2, 32, dtype)
    q[0, 7, 1, 3], v[0, 150, 0, 5] = torch.nan, torch.nan
    out = reference.emulate8(q, k, v)
    expected = torch.zeros_like(q, dtype=torch.bool)
    expected[0, 7, 1] = expected[0, :, 0, 5] = True
    assert out.dtype == dtype and torch.equal(out.isnan(), expected)


# --- kernels -----------------------------------------------------------------------------------------------------


SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program can have; NVIDIA's CUDA C++ Programming Guide, compute capabilities."""


def kernel_variant(bits: int, width: int, capability: tuple[int, int]):
    """A kernel with lists -> it, types of its arguments, constants, and how it is cut."""
    from wan_s2v_core.acceleration.attention import portable

    tiling = portable.best_config(capability, width, bits)
    value_type = portable.value_type_of(capability)
    padded = portable.padded_width(width, 32 if bits == 8 else 16)
    constants = {"D": width, "WIDTH": padded, "TILE": 128, "HAS_LIST": True}
    constants |= {"BLOCK_M": tiling.BLOCK_M, "BLOCK_N": tiling.BLOCK_N}
    types = {"listed": "*i32", "counts": "*i32", "factor": "fp32"}
    if bits == 16:
        return portable.attend16_kernel, types | dict.fromkeys(("q", "k", "v", "out"), "*bf16"), constants, tiling
    is_float8 = value_type == torch.float8_e4m3fn
    types |= {"q": "*i8", "k": "*i8", "v": "*fp8e4nv" if is_float8 else "*fp16", "out": "*bf16"}
    types |= dict.fromkeys(("q_scales", "k_scales", "v_scales"), "*fp32")
    constants |= {"PEAK": 8.0, "FLOAT8": is_float8, "HALF_SUMS": portable.has_slow_float32_sums(capability)}
    return portable.attend8_kernel, types, constants, tiling


@pytest.mark.parametrize(("bits", "width", "card"), [(8, 128, 86), (8, 64, 89), (16, 96, 120), (8, 128, 90)])
def test_kernels_compile_and_fit(bits, width, card):
    """Without a card: what the compiler refuses, or what is too large, shows here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, tiling = kernel_variant(bits, width, divmod(card, 10))
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name] != "constexpr" and name not in ("queries", "keys", "heads", "factor")
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_KIB[card] * 1024
    assert "cp.async" in compiled.asm["ptx"]  # copies run while it computes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("width", [32, 80, 128])
def test_kernels_on_a_card(width):
    from wan_s2v_core.acceleration.attention.portable import attend8, attend16, capability_of, value_type_of

    q, k, v = (x.cuda() for x in random_qkv(700, 901, 3, width, torch.bfloat16, batch=2))
    value_type = value_type_of(capability_of(q.device))
    lists = [x.cuda() for x in random_lists(6, 700, 901)]
    exact = scaled_dot_product(q.float(), k.float(), v.float())
    assert gap(attend16(q, k, v), exact) < EXACT[torch.bfloat16]
    assert gap(attend8(q, k, v), exact) < VALUE_ERROR[value_type]
    assert gap(attend16(q.float(), k.float(), v.float()), exact) < EXACT[torch.float32]
    listed = reference.attend_listed(q.float(), k.float(), v.float(), *lists)
    assert gap(attend16(q, k, v, *lists), listed) < EXACT[torch.bfloat16]
    assert gap(attend8(q, k, v, *lists), listed) < VALUE_ERROR[value_type]
