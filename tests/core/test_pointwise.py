"""Steps between products: the plain ones by their definition, the fused ones against the plain."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from wan_s2v_core.acceleration.pointwise import FusedPointwise, fused_everywhere, fused_steps, steps_in_8_bits
from wan_s2v_core.acceleration.rows8 import quantize_rows
from wan_s2v_core.model.attention import CrossAttention
from wan_s2v_core.model.pointwise import Pointwise
from wan_s2v_core.model.rope import rotate


@pytest.fixture
def no_gradients(fresh_seed):
    torch.manual_seed(fresh_seed)
    with torch.inference_mode():
        yield


@pytest.fixture
def at_work(no_gradients, make_model, make_inputs):
    """A model, the tokens and the context of two clips at once."""
    model, (inputs, noise) = make_model(), make_inputs(batch=2)
    tokens, context = model.embed(
        noise, model.embed_time(torch.tensor([500.0, 9.0]))[1], model.condition(inputs), 500.0
    )
    return model, tokens, context


def by_token(rows, context, tokens):
    """B S E -> B L E."""
    return rows[:, (torch.arange(tokens) >= context.noisy_tokens).long()]


def test_plain_steps_by_definition_leave_what_they_are_given(at_work):
    model, x, context = at_work
    block, step = model.stack.blocks[0], Pointwise()
    y, given = torch.randn_like(x), x.clone()
    shift, scale, gate = torch.randn(3, 2, 2, TINY.width)
    normed = F.layer_norm(x, (TINY.width,), eps=1e-6)
    count = x.shape[1]

    stream, out = step.gated_add_norm(x, y, gate, block.cross_norm, context)
    torch.testing.assert_close(stream, x + y * by_token(gate, context, count), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, block.cross_norm(stream), atol=1e-5, rtol=1e-5)

    stream, out = step.add_modulated_norm(x, y, shift, scale, 1e-6, context)
    expected = F.layer_norm(x + y, (TINY.width,), eps=1e-6) * (1 + by_token(scale, context, count))
    torch.testing.assert_close(stream, x + y)
    torch.testing.assert_close(out, expected + by_token(shift, context, count), atol=1e-5, rtol=1e-5)

    norm = block.attention.norm_q
    expected = rotate(norm(x).unflatten(-1, (TINY.heads, -1)), context.rope)
    torch.testing.assert_close(step.heads_of(x, norm, TINY.heads, context.rope), expected)
    torch.testing.assert_close(step.heads_of(x, norm, TINY.heads).flatten(2), norm(x))

    shift, gain = torch.randn(2, 2, 5, TINY.width)
    noisy, index = context.noisy_tokens, context.frame_index
    expected = normed[:, :noisy] * gain[:, index] + shift[:, index]
    torch.testing.assert_close(step.frame_norm(x, shift, gain, 1e-6, context), expected, atol=1e-5, rtol=1e-5)
    stream = step.add_to_noisy(x, y[:, :noisy], context)
    assert torch.equal(stream[:, :noisy], (x + y)[:, :noisy]) and torch.equal(stream[:, noisy:], x[:, noisy:])
    assert torch.equal(x, given)


def test_frames_as_a_batch_hear_what_a_mask_lets_them(at_work):
    model, tokens, context = at_work
    assert context.has_all_frames
    for injector in model.stack.injectors:
        masked = injector(tokens, replace(context, grid=(0, 0, 0)))
        torch.testing.assert_close(injector(tokens, context), masked, atol=2e-6, rtol=1e-5)


def test_one_voice_for_two_clips(at_work):
    model, tokens, context = at_work
    one = replace(context, audio_tokens=context.audio_tokens[:1], audio_frames=context.audio_frames[:1])
    two = replace(one, audio_tokens=one.audio_tokens.repeat(2, 1, 1, 1), audio_frames=one.audio_frames.repeat(2, 1, 1))
    injector = model.stack.injectors[0]
    torch.testing.assert_close(injector(tokens, one), injector(tokens, two))


@pytest.mark.parametrize("noisy", [0, 24, 60, 119])
def test_a_part_of_the_frames_is_not_all_of_them(noisy, at_work):
    """24 tokens are one latent frame, 60 are as many for each of the 5 as if frames were smaller."""
    assert not replace(at_work[2], noisy_tokens=noisy).has_all_frames


def test_nothing_is_fused_on_a_cpu(make_model):
    model = make_model()
    before = [block.pointwise for block in model.stack.blocks]
    with fused_steps()(model):
        assert all(block.pointwise is plain for block, plain in zip(model.stack.blocks, before, strict=True))


def test_with_gradients_the_plain_steps_serve(make_model, make_inputs, attach):
    model, (inputs, noise) = make_model().requires_grad_(True), make_inputs(batch=2)
    gradients = []
    for _ in range(2):
        model(noise, torch.tensor([500.0, 3.0]), model.condition(inputs)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        attach(model, fused_everywhere())
    assert isinstance(model.stack.blocks[0].feed_forward.pointwise, FusedPointwise)
    for plain, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain)


def test_where_kernels_cannot_go_the_plain_steps_serve(at_work, attach):
    model, tokens, context = at_work
    plain = model.stack(tokens.clone(), context)
    attach(model, fused_everywhere())
    torch.testing.assert_close(model.stack(tokens.clone(), context), plain)


def test_8_bit_rows_are_for_products_that_take_them(make_model):
    dense, routed = make_model().stack, make_model(replace(TINY, num_experts=2)).stack
    block = dense.blocks[0]
    assert steps_in_8_bits(block) == {}
    for linear in (block.attention.q, block.attention.k, block.cross_attention.q, block.feed_forward.up):
        linear.rows_dtype = torch.int8
    others = {"gated_add_norm": torch.int8, "add_modulated_norm": torch.int8}
    assert steps_in_8_bits(block) == others, "the values take none yet"
    block.attention.v.rows_dtype = torch.float8_e4m3fn
    assert steps_in_8_bits(block) == others, "one input cannot be of two types"
    block.attention.v.rows_dtype = torch.int8
    assert steps_in_8_bits(block) == others | {"modulated_norm": torch.int8}
    assert steps_in_8_bits(block.feed_forward) == {}
    block.feed_forward.down.rows_dtype = torch.float8_e4m3fn
    assert steps_in_8_bits(block.feed_forward) == {"activated": torch.float8_e4m3fn}
    dense.injectors[0].attention.q.rows_dtype = torch.int8
    assert steps_in_8_bits(dense.injectors[0]) == {"frame_norm": torch.int8}
    assert steps_in_8_bits(dense.injectors[1]) == {}
    assert "add_modulated_norm" not in steps_in_8_bits(routed.blocks[0]), "a gate reads tokens"


@pytest.mark.parametrize(("dtype", "relative", "absolute"), [(torch.int8, 0, 0.5), (torch.float8_e4m3fn, 1 / 16, 1e-3)])
def test_quantized_rows_stay_near(dtype, relative, absolute, fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    x = torch.randn(3, 7, 50, generator=generator) * torch.logspace(-12, 12, 7)[:, None]
    x[1, 2], x[2, 6, 3], x[2, 5, 1] = 0, torch.nan, -torch.inf
    rows = quantize_rows(x, dtype)
    assert rows.values.dtype == dtype and rows.scale.shape == (3, 7, 1) and rows.scale.dtype == torch.float32
    whole = x.isfinite().all(dim=-1)
    error = (rows.dequantized() - x).abs()
    assert (error <= (x.abs() * relative).maximum(absolute * rows.scale) * 1.001)[whole].all()
    assert not rows.values[1, 2].float().any()
    assert not rows.dequantized()[~whole].isfinite().all(dim=-1).any()


def stream_arguments(adds: bool, gated: bool, norms: bool, rows8: str | None) -> tuple[dict, dict]:
    """Types and constants of one variant of `stream_kernel`, at the released width."""
    from wan_s2v_core.acceleration.kernels.norm import stream_kernel
    from wan_s2v_core.acceleration.kernels.rows import two_parts

    pointers = {name: "*fp32" for name in ("x", "gate", "gain", "shift", "frame_index", "scales")}
    pointers |= {"y": "*bf16", "out": rows8 or "*bf16", "eps": "fp32"}
    constants = two_parts(5120) | {
        "ROWS": 4, "ADDS": adds, "GATED": gated, "NORMS": norms, "MOVES": norms, "PLUS_ONE": True, "INDEXED": False,
        "LIMIT": {None: 0.0, "*i8": 127.0, "*fp8e4nv": 448.0}[rows8],
    }  # fmt: skip
    return {name: pointers.get(name, "i32") for name in stream_kernel.arg_names}, constants


@pytest.mark.parametrize("kind", ["norm", "add and norm", "add", "int8", "float8", "rotary", "gelu"])
def test_kernels_compile_for_a_hopper_card(kind):
    """Without a card: what the compiler refuses shows here. The interpreter lets much of it pass."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from wan_s2v_core.acceleration.kernels import norm, rotary, rows8
    from wan_s2v_core.acceleration.kernels.rows import two_parts

    if kind == "rotary":
        kernel, constants = rotary.rotary_kernel, two_parts(5120) | {"ROWS": 4, "HEAD": 128, "TURNS": True}
        types = {"x": "*bf16", "weight": "*bf16", "rope": "*fp32", "eps": "fp32"}
    elif kind == "gelu":
        kernel, constants = rows8.quantize_kernel, two_parts(13824) | {"LIMIT": 448.0, "GELU": True}
        types = {"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}
    else:
        kernel = norm.stream_kernel
        variants = {
            "norm": (False, False, True, None), "add and norm": (True, True, True, None),
            "add": (True, True, False, None), "int8": (True, False, True, "*i8"),
            "float8": (False, False, True, "*fp8e4nv"),
        }  # fmt: skip
        types, constants = stream_arguments(*variants[kind])
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert "st.global" in made.asm["ptx"]


def test_every_cross_attention_hears_groups_or_all(no_gradients):
    """Groups by index, by runs, and one group for all are the same attention."""
    attention = CrossAttention(16, 2, 1e-6)
    x, others = torch.randn(2, 12, 16), torch.randn(2, 3, 4, 16)
    by_runs = attention(x, attention.keys_values(others, {}), Pointwise())
    by_index = attention(x, attention.keys_values(others, {}), Pointwise(), torch.arange(3).repeat_interleave(4))
    torch.testing.assert_close(by_index, by_runs, atol=1e-5, rtol=1e-5)
    alone = attention(x[:, 4:8], attention.keys_values(others[:, 1], {}), Pointwise())
    torch.testing.assert_close(by_runs[:, 4:8], alone, atol=1e-5, rtol=1e-5)
