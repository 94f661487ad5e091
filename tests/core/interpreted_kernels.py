"""The Triton kernels as Python on the CPU, against the plain steps. Run by test_interpreted.py in a process in
which TRITON_INTERPRET is set before Triton is imported."""

import gc
import inspect
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from live_bytes import LiveBytes
from torch import nn
from triton.runtime import interpreter

from wan_s2v_core.acceleration.kernels import norm, rotary
from wan_s2v_core.acceleration.kernels.rows8 import quantize
from wan_s2v_core.acceleration.pointwise import STEPS_INTO_PRODUCTS, FusedPointwise, fused_everywhere
from wan_s2v_core.acceleration.rows8 import quantize_plain
from wan_s2v_core.memory.activations import ClipShape, ForwardWay, activation_bytes
from wan_s2v_core.memory.slices import in_slices
from wan_s2v_core.model.pointwise import Pointwise
from wan_s2v_core.model.rope import rotary_table
from wan_s2v_core.seams import BlockContext, Rows8

BATCH, TOKENS, FRAMES = 2, 11, 3


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}


def convert(values, source, target, rounding=None):
    """Rounds to the nearest and saturates, as a card does; Triton's interpreter does neither for these types."""
    given = torch.from_numpy(np.ascontiguousarray(values).view(f"i{source.primitive_bitwidth // 8}"))
    wide = given.view(TYPES[source.name]).float()
    wide = wide.clamp(-448, 448) if target.name == "fp8e4nv" else wide
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[target.primitive_bitwidth // 8]
    return wide.to(TYPES[target.name]).view(bits).numpy().view(f"u{target.primitive_bitwidth // 8}")


@cache
def names_of_builtins(part: object) -> list[str]:
    return [name for name, member in inspect.getmembers(part) if interpreter.tl.core.is_builtin(member)]


def patch_builtins(part, builder, scope) -> None:
    """As Triton 3.6's interpreter, which looks through all of Triton's language for each call of a function."""
    for name in names_of_builtins(part):
        if interpreter.tl.core.is_builtin(member := getattr(part, name)):
            interpreter._patch_attr(part, name, member, builder, scope)


interpreter._patch_builtin = patch_builtins


@pytest.fixture(autouse=True)
def honest_rounding(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def no_gradients(fresh_seed):
    torch.manual_seed(fresh_seed)
    with torch.inference_mode():
        yield


def make_context(noisy: int, width: int, dtype: torch.dtype) -> BlockContext:
    return BlockContext(
        rope=rotary_table(24, 1, 1, TOKENS - 1, 0, True)[:TOKENS],
        noisy_tokens=noisy,
        frame_index=torch.randint(FRAMES, (noisy,)),
        modulation=torch.randn(BATCH, 2, 6, width),
        text=torch.empty(0),
        audio_tokens=torch.empty(BATCH, FRAMES, 5, width),
        audio_frames=None,
        dtype=dtype,
        grid=(FRAMES, 1, noisy),
        timestep=500.0,
    )


def same(fused, plain, dtype: torch.dtype):
    """Equal up to the rounding of `dtype`; 8-bit rows up to their own, of a plain result in float32."""
    if isinstance(fused, tuple):
        for one, other in zip(fused, plain, strict=True):
            same(one, other, dtype)
    elif isinstance(fused, Rows8):
        assert fused.dtype == dtype
        near_in_8_bits(fused, plain)
    else:
        assert fused.dtype == plain.dtype
        tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[fused.dtype]
        torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)


def near_in_8_bits(rows: Rows8, exact: torch.Tensor):
    """Scales as they should be, and values within half a step."""
    expected = quantize_plain(exact, rows.values.dtype)
    torch.testing.assert_close(rows.scale, expected.scale, atol=0, rtol=1e-5)
    error = (rows.values.float() * rows.scale - exact).abs()
    half = 0.5 * rows.scale if rows.values.dtype == torch.int8 else (exact.abs() / 16).maximum(rows.scale / 1024)
    assert (error <= 1.001 * half).all()


STEPS = {
    "modulated_norm": lambda step, x, y, rows, context, norm: step.modulated_norm(x, rows[0], rows[1], 1e-6, context),
    "gated_add": lambda step, x, y, rows, context, norm: step.gated_add(x, y, rows[2], context),
    "gated_add_norm": lambda step, x, y, rows, context, norm: step.gated_add_norm(x, y, rows[2], norm, context),
    "add_modulated_norm": lambda step, x, y, rows, context, norm: step.add_modulated_norm(
        x, y, rows[0], rows[1], 1e-6, context
    ),
    "frame_norm": lambda step, x, y, rows, context, norm: step.frame_norm(x, rows[3], rows[4], 1e-5, context),
    "frame_norm without rows": lambda step, x, y, rows, context, norm: step.frame_norm(x, None, None, 1e-5, context),
    "add_to_noisy": lambda step, x, y, rows, context, norm: step.add_to_noisy(x, y[:, : context.noisy_tokens], context),
}
CASES = [
    ("modulated_norm", 5, 48, torch.float32, None),
    ("modulated_norm", 0, 33, torch.bfloat16, None),
    ("modulated_norm", 5, 48, torch.float16, torch.float8_e4m3fn),
    ("modulated_norm", 11, 48, torch.float32, torch.int8),
    ("gated_add", 6, 48, torch.float16, None),
    ("gated_add", 11, 37, torch.float32, None),
    ("gated_add_norm", 4, 37, torch.float32, None),
    ("gated_add_norm", 11, 48, torch.float16, torch.int8),
    ("add_modulated_norm", 5, 48, torch.float32, None),
    ("add_modulated_norm", 1, 48, torch.bfloat16, None),
    ("add_modulated_norm", 5, 40, torch.float32, torch.float8_e4m3fn),
    ("frame_norm", 7, 48, torch.float32, None),
    ("frame_norm", 7, 37, torch.float16, torch.int8),
    ("frame_norm", 0, 48, torch.float32, None),
    ("frame_norm without rows", 7, 48, torch.float32, None),
    ("add_to_noisy", 7, 48, torch.float16, None),
]


@pytest.mark.parametrize(("name", "noisy", "width", "dtype", "rows8"), CASES)
def test_a_fused_step_is_the_plain_one(name, noisy, width, dtype, rows8):
    context, norm = make_context(noisy, width, dtype), nn.LayerNorm(width)
    norm.weight.add_(torch.randn(width))
    norm.bias.add_(torch.randn(width))
    x = 3 * torch.randn(BATCH, TOKENS, 2 * width)[..., :width] + 5  # rows of a wider tensor, far from zero
    y = torch.randn(BATCH, TOKENS, width).to(dtype)
    rows = [*context.modulation.unbind(2)[:3], *torch.randn(BATCH, FRAMES, 2 * width).chunk(2, dim=-1)]
    run = STEPS[name]
    exact = replace(context, dtype=torch.float32) if rows8 else context
    plain = run(Pointwise(), x, y, rows, exact, norm)
    before = x.clone()
    fused = run(FusedPointwise(dict.fromkeys(STEPS_INTO_PRODUCTS, rows8) if rows8 else None), x, y, rows, context, norm)
    same(fused, plain, dtype)
    stream = fused[0] if isinstance(fused, tuple) else fused
    writes = "add" in name
    assert (stream is x) == writes and torch.equal(x, before) != writes


@pytest.mark.parametrize(
    ("width", "heads", "turns", "dtype"),
    [(48, 2, True, torch.float32), (72, 3, True, torch.float16), (48, 2, False, torch.bfloat16)],
)
def test_fused_heads_are_plain_ones(width, heads, turns, dtype):
    norm = nn.RMSNorm(width, eps=1e-6).to(dtype)
    norm.weight.mul_(1 + torch.randn(width))
    rope = make_context(TOKENS, width, dtype).rope if turns else None
    x = torch.randn(BATCH, TOKENS, width).to(dtype)
    plain = Pointwise().heads_of(x, norm, heads, rope)
    fused = FusedPointwise().heads_of(x, norm, heads, rope)
    same(fused, plain, dtype)
    assert fused.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("has_gelu", [False, True])
def test_rows_in_8_bits(dtype, has_gelu):
    x = 4 * torch.randn(2, 3, 21)
    x[0, 1], x[1, 0, 5], x[1, 1, 7], x[1, 2] = 0, torch.nan, torch.inf, -1e-40
    exact = F.gelu(x, approximate="tanh") if has_gelu else x
    plain, made = quantize_plain(exact, dtype), quantize(x, dtype, has_gelu)
    torch.testing.assert_close(made.scale, plain.scale, atol=0, rtol=1e-5, equal_nan=True)
    assert not made.values[0, 1].float().any() and not made.values[1, 2].float().any()
    assert made.dequantized()[1, 0].isnan().all() and not made.dequantized()[1, 1].isfinite().all()
    near_in_8_bits(Rows8(made.values[0, ::2], made.scale[0, ::2], made.dtype), exact[0, ::2])


class Linear8(nn.Linear):
    """Takes 8-bit rows, and remembers that it did."""

    rows_dtype = torch.int8

    def forward(self, x):
        assert isinstance(x, Rows8) and x.values.dtype == self.rows_dtype
        return super().forward(x.dequantized())


def small_case(make_model, make_inputs, **change):
    config = replace(TINY, blocks=1, injected_blocks=(0,), **change)
    model, (inputs, noise) = make_model(config), make_inputs(config, frames=2, h=4, w=4, motion=0, batch=2)
    return model, noise, model.condition(inputs)


@pytest.mark.parametrize("change", [{}, {"modulates_audio": False}])
def test_a_fused_model_is_the_plain_one(change, make_model, make_inputs, attach):
    model, noise, condition = small_case(make_model, make_inputs, **change)
    moments = torch.tensor([700.0, 30.0])
    plain = model(noise, moments, condition)
    attach(model, fused_everywhere())
    torch.testing.assert_close(model(noise, moments, condition), plain, atol=1e-5, rtol=1e-5)


def test_8_bit_rows_go_where_they_are_taken(make_model, make_inputs, attach):
    model, noise, condition = small_case(make_model, make_inputs)
    moments = torch.tensor([700.0, 30.0])
    plain = model(noise, moments, condition)
    block = model.stack.blocks[0]
    names = ("attention.q", "attention.k", "attention.v", "cross_attention.q", "feed_forward.up", "feed_forward.down")
    for name in names:
        block.get_submodule(name).__class__ = Linear8  # each asserts that it is given 8-bit rows
    attach(model, fused_everywhere())
    error = (model(noise, moments, condition) - plain).norm() / plain.norm()
    assert 1e-4 < error < 0.05


def without_circles(kernel):
    """The interpreter leaves circles behind that hold what it was given; a card does not."""

    def run(*given, **named):
        out = kernel(*given, **named)
        gc.collect()
        return out

    return run


@pytest.mark.parametrize("size", [None, 128])
def test_a_fused_forward_in_slices(size, make_model, make_inputs, monkeypatch, attach):
    """The plain result, from slices of the stream that kernels write in place; and what is held is predicted."""
    for module, name in ((norm, "step"), (rotary, "norm_and_turn")):
        monkeypatch.setattr(module, name, without_circles(getattr(module, name)))
    config = replace(TINY, blocks=1, injected_blocks=(), text_tokens=8)
    model, (inputs, noise) = make_model(config), make_inputs(config, frames=2 if size else 1, h=12, w=16, motion=0)
    inputs = replace(inputs, pose_latents=None)
    condition = model.condition(inputs)
    plain = model(noise, 700.0, condition)
    attach(model, fused_everywhere(), in_slices(size))
    with LiveBytes() as live:
        condition = model.condition(inputs)
        live.peak = 0
        fused = model(noise.clone(), 700.0, condition)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    shape = ClipShape(condition.grid, condition.side_tokens.shape[1])
    predicted = activation_bytes(config, shape, ForwardWay(size, 4, keeps_keys_values=False))
    assert 0.9 < predicted / live.peak < 1.1
