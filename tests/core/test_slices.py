"""Activations in slices: equal to the plain way, in place, and called where the plain way is."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_s2v_core.acceleration.attention import sparse
from wan_s2v_core.acceleration.attention.reference import attend_listed, emulate8, prepare_emulated8
from wan_s2v_core.acceleration.attention.registry import PreparedListed, prepared
from wan_s2v_core.acceleration.attention.sparse import SparsePlan, sparse_attend, strips
from wan_s2v_core.acceleration.experts.router import routed, take_load
from wan_s2v_core.acceleration.keys_values import kept_keys_values
from wan_s2v_core.attach import accelerated, attached, attending
from wan_s2v_core.clip_denoiser import clip_denoiser
from wan_s2v_core.config import SPARSE_BY_DISTANCE, SPARSE_BY_SCORES, AccelerationPlan, ExpertRouting, SamplingConfig
from wan_s2v_core.geometry import TILE, frame_slices, token_slices
from wan_s2v_core.memory import slices
from wan_s2v_core.memory.slices import in_slices, inject_in_slices, runs_of_frames
from wan_s2v_core.memory.stage import checked_before_layers
from wan_s2v_core.model.attention import sdpa
from wan_s2v_core.model.audio import inject_whole
from wan_s2v_core.model.block import Block
from wan_s2v_core.seams import KeysValues, with_keys

SIZES = (1, 128, 200, 256, 384)
"""Slices that do not divide the tokens, and that are no whole tiles."""
BIG = dict(frames=6, h=16, w=20)
"""480 noisy tokens and 80 of the picture, 116 of motion."""
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def no_gradients(fresh_seed):
    torch.manual_seed(fresh_seed)
    with torch.inference_mode():
        yield


@pytest.fixture
def ran(monkeypatch):
    """The slices of blocks that are computed."""
    seen, run = [], slices.SlicedBlock.attend_part

    def watched(self, start, stop):
        seen.append((start, stop))
        return run(self, start, stop)

    monkeypatch.setattr(slices.SlicedBlock, "attend_part", watched)
    return seen


def both_ways(model, noise, condition, size, timestep=500.0):
    plain = model(noise, timestep, condition)
    with in_slices(size)(model):
        return model(noise, timestep, condition), plain


# --- where it is cut -----------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_slices_are_whole_tiles_and_all_tokens(tokens, at_most):
    parts = token_slices(tokens, at_most)
    assert [token for start, stop in parts for token in range(start, stop)] == list(range(tokens))
    assert all(start % TILE == 0 and 0 < stop - start <= max(TILE, at_most) for start, stop in parts)
    tiles = [-(-(stop - start) // TILE) for start, stop in parts]
    assert not tiles or max(tiles[:-1], default=0) in (0, tiles[0]), "the last alone is smaller"
    fewest = math.ceil(math.ceil(tokens / TILE) / max(1, at_most // TILE)) if tokens > at_most else int(tokens > 0)
    assert len(parts) <= fewest, "as few as can be"


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_runs_of_frames_are_whole_frames_or_lie_in_one(frames, rows, columns, size):
    frame, runs = rows * columns, list(runs_of_frames((frames, rows, columns), size))
    assert [token for *_, start, stop in runs for token in range(start, stop)] == list(range(frames * frame))
    for first, last, start, stop in runs:
        assert stop - start <= max(TILE, size, frame if size < frame else 0)
        if last - first == 1:
            assert first * frame <= start < stop <= last * frame
        else:
            assert (start, stop) == (first * frame, last * frame)
    assert [first for first, _ in frame_slices(frames, frame, size)] == sorted({first for first, *_ in runs})


def test_a_part_of_a_context(make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    _, context = model.embed(noise, model.embed_time(500.0)[1], model.condition(inputs), 500.0)
    for start, stop in ((0, 31), (100, 119), (100, 140), (120, 140), (130, len(context.rope))):
        part = context.part(start, stop)
        noisy = [token for token in range(start, stop) if token < context.noisy_tokens]
        assert torch.equal(part.rope, context.rope[start:stop]) and part.noisy_tokens == len(noisy)
        assert torch.equal(part.frame_index, context.frame_index[noisy])
        assert part.grid == context.grid and not part.has_all_frames


# --- equal to the plain way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(10))
def test_slices_are_the_plain_way(trial, make_model, make_inputs, ran, fresh_seed, attach):
    """Random small models and clips, with and without pose, motion, injectors, a voice that modulates, kept keys."""
    draw = random.Random(fresh_seed + trial)
    heads, blocks = draw.choice((1, 2, 4)), draw.choice((1, 2, 3))
    config = replace(
        TINY,
        width=24 * heads,
        heads=heads,
        blocks=blocks,
        injected_blocks=tuple(sorted(draw.sample(range(blocks), draw.randint(0, blocks)))),
        modulates_audio=draw.random() < 0.5,
        pose_channels=draw.choice((0, 16)),
        packs_motion=draw.random() < 0.5,
        zero_timestep=draw.random() < 0.5,
    )
    model, batch = make_model(config), draw.choice((1, 2))
    sizes = dict(frames=draw.randint(3, 6), h=draw.randint(8, 20), w=draw.randint(12, 24))
    inputs, noise = make_inputs(config, **sizes, motion=draw.choice((0, 2)), batch=batch)
    if draw.random() < 0.5:
        inputs = replace(inputs, pose_latents=None)
    if draw.random() < 0.5:
        attach(model, kept_keys_values)
    condition, timestep = model.condition(inputs), torch.tensor([500.0, 9.0])[:batch]
    size = draw.choice(SIZES)
    sliced, plain = both_ways(model, noise, condition, size, timestep)
    torch.testing.assert_close(sliced, plain, **CLOSE)
    cut = token_slices(len(condition.rope), max(TILE, size))
    assert ran == (cut * blocks if len(cut) > 1 else [])


def test_slices_can_be_taken_off(make_model, make_inputs, ran):
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    with in_slices(256)(model):
        model(noise, 500.0, model.condition(inputs))
        assert ran and model.head.tokens_at_once == model.tokens_at_once == 256
    ran.clear()
    model(noise, 500.0, model.condition(inputs))
    assert not ran and model.head.tokens_at_once is None and model.tokens_at_once is None
    assert all(block.run is Block.whole for block in model.stack.blocks)
    assert all(injector.run is inject_whole for injector in model.stack.injectors)


def test_a_slice_that_holds_all_is_the_plain_way(make_model, make_inputs, ran):
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    sliced, plain = both_ways(model, noise, model.condition(inputs), 700)
    assert torch.equal(sliced, plain) and not ran


def test_the_stream_is_written_over(make_model, make_inputs, attach):
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    tokens, context = model.embed(noise, model.embed_time(500.0)[1], model.condition(inputs), 500.0)
    attach(model, in_slices(256))
    for layer in (model.stack.blocks[0], model.stack.injectors[0]):
        before = tokens.clone()
        assert layer(tokens, context) is tokens and not torch.equal(tokens, before)


def test_a_split_sequence_is_injected_in_slices(make_model, make_inputs):
    """Parts that are not whole frames, as ranks have them."""
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    tokens, context = model.embed(noise, model.embed_time(500.0)[1], model.condition(inputs), 500.0)
    injector = model.stack.injectors[0]
    whole = inject_whole(injector, tokens, context)
    for start, stop in ((0, 300), (35, 480), (150, tokens.shape[1])):
        part = inject_in_slices(injector, tokens[:, start:stop].clone(), context.part(start, stop), 128)
        torch.testing.assert_close(part, whole[:, start:stop], **CLOSE)


def test_with_gradients_the_plain_way_serves(make_model, make_inputs, ran):
    with torch.inference_mode(False), torch.enable_grad():
        model, (inputs, noise) = make_model().requires_grad_(True), make_inputs(**BIG)
        gradients = []
        for size in (None, 128):
            with in_slices(size)(model):
                model(noise, 500.0, model.condition(inputs)).square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad(set_to_none=True)
        assert not ran
        for plain, sliced in zip(*gradients, strict=True):
            torch.testing.assert_close(sliced, plain, atol=1e-6, rtol=1e-4)


def test_every_layer_is_told_once(make_model, make_inputs, attach):
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    attach(model, in_slices(128))
    condition, calls = model.condition(inputs), []
    with checked_before_layers(model, lambda: calls.append(1)):
        model(noise, 500.0, condition)
    assert len(calls) == TINY.blocks + len(TINY.injected_blocks)


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "routing",
    [
        ExpertRouting(),
        ExpertRouting(expert_capacity=30),
        ExpertRouting(expert_capacity=60, overflow="drop"),
        ExpertRouting(gate_dropout=0.3, gate_dropout_seed=5),
    ],
    ids=("free", "spill", "drop", "dropout"),
)
def test_experts_are_the_plain_ones(routing, make_model, make_inputs):
    """Also those of which tokens compete for a place: their feed-forward sees all tokens together."""
    config = replace(TINY, num_experts=4, top_k=2)
    model, (inputs, noise) = make_model(config), make_inputs(config, **BIG)
    condition, loads = model.condition(inputs), []
    for size in (None, 256):
        with attached(model, [in_slices(size), routed(routing)]):
            loads.append((model(noise, 500.0, condition), take_load(model)))
    (plain, load), (sliced, sliced_load) = loads
    torch.testing.assert_close(sliced, plain, **CLOSE)
    assert sliced_load.tokens == load.tokens and sliced_load.chosen == load.chosen
    assert sliced_load.dropped == load.dropped and any(load.dropped) == (routing.overflow == "drop")


# --- attention -------------------------------------------------------------------------------------------------------


def lists_of(monkeypatch):
    """The lists of tiles that are made from now on."""
    made, plain = [], sparse.list_best

    def watched(*given, **named):
        listed, counts = plain(*given, **named)
        made.append(
            [row[:count].sort().values for row, count in zip(listed.flatten(0, -2), counts.flatten(), strict=True)]
        )
        return listed, counts

    monkeypatch.setattr(sparse, "list_best", watched)
    return made


@pytest.mark.parametrize("by", [SPARSE_BY_SCORES, SPARSE_BY_DISTANCE])
@pytest.mark.parametrize("size", [128, 256, 400])
def test_sparse_attention_in_slices_is_the_whole(by, size, make_model, make_inputs, ran):
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    condition = model.condition(inputs)
    with accelerated(model, AccelerationPlan(sparse_keep=0.3, sparse_by=by, sparse_dense_steps=0)):
        sliced, plain = both_ways(model, noise, condition, size)
    torch.testing.assert_close(sliced, plain, **CLOSE)
    assert ran
    assert not torch.allclose(model(noise, 500.0, condition), plain, atol=1e-4), "something is left out"


def test_slices_choose_the_same_tiles(monkeypatch):
    """What is always kept and a tile itself are those of the whole."""
    grid = sparse.TileGrid(9, 16, 32, tokens=9 * 512 + 700)
    q, k = torch.randn(2, 2, grid.tokens, 3, 16)
    means, made = sparse.tile_means(k), lists_of(monkeypatch)
    sparse.list_by_scores(q, means, grid, 0.4)
    whole = made.pop()
    rows = torch.stack(whole).unflatten(0, (6, grid.tiles))
    for start, stop in token_slices(grid.tokens, 1100):
        sparse.list_by_scores(q[:, start:stop], means, grid, 0.4, start // TILE)
        part = torch.stack(made.pop()).unflatten(0, (6, -1))
        assert torch.equal(part, rows[:, start // TILE : -(-stop // TILE)])


def emulated(keys_at_once):
    """An 8-bit backend as the registry has them, computed in plain torch."""
    return prepared(partial(prepare_emulated8, keys_at_once=keys_at_once))


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("by", [SPARSE_BY_SCORES, SPARSE_BY_DISTANCE])
def test_8_bit_attention_prepares_its_keys_once(share, by, make_model, make_inputs, attach):
    """Scales of tiles and channels are those of all keys; so the sliced model is the plain one, rounded alike."""
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    attend, listed = emulated(64)
    made_for = []

    def counted(made):
        made_for.append(made)
        return listed.prepare(made)

    if share < 1:
        attend = sparse_attend(attend, PreparedListed(counted), SparsePlan(share, by))
    attach(model, attending(attend), strips)
    condition = model.condition(inputs)
    exact_model_output = model(noise, 500.0, condition)
    sliced, plain = both_ways(model, noise, condition, 128)
    torch.testing.assert_close(sliced, plain, **CLOSE)
    torch.testing.assert_close(exact_model_output, plain, atol=0, rtol=0)
    assert len(made_for) == (3 * TINY.blocks if share < 1 else 0), "once a block and forward"


def test_a_backend_keeps_no_more_of_keys_than_it_makes():
    """Keys and values are asked for one after the other, and gone when they are."""
    import weakref

    asked, alive = [], []

    def make(name):
        def give():
            asked.append((name, [one() is not None for one in alive]))
            made = torch.randn(1, 300, 2, 16)
            alive.append(weakref.ref(made))
            return made

        return give

    def both():
        raise AssertionError("both at once are larger than one after the other")

    attend, _ = emulated(128)
    ready = with_keys(attend, KeysValues(make("k"), make("v"), both), None)
    assert [name for name, _ in asked] == ["k", "v"] and not any(one() is not None for one in alive)
    assert ready(torch.randn(1, 128, 2, 16), 128).shape == (1, 128, 2, 16)


def test_any_backend_serves_slices_of_queries():
    q, k, v = torch.randn(3, 2, 300, 2, 16)
    ready = with_keys(sdpa, KeysValues.of(k, v), None)
    part = ready(q[:, 128:256], 128)
    torch.testing.assert_close(part, sdpa(q, k, v, None)[:, 128:256], **CLOSE)
    dense, _ = emulated(64)
    ready = with_keys(dense, KeysValues.of(k, v), None)
    torch.testing.assert_close(ready(q[:, 128:256], 128), emulate8(q, k, v)[:, 128:256], **CLOSE)
    lists = torch.arange(3, dtype=torch.int32).repeat(4, 3, 1), torch.full((4, 3), 3, dtype=torch.int32)
    torch.testing.assert_close(attend_listed(q, k, v, *lists), sdpa(q, k, v, None), **CLOSE)


# --- strips, and what branches share -----------------------------------------------------------------------------


def test_strips_do_not_copy_the_stream(make_model, make_inputs, attach):
    model, (inputs, noise) = make_model(), make_inputs(h=22, w=36)
    attach(model, in_slices(256), strips)
    tokens, context = model.embed(noise, model.embed_time(500.0)[1], model.condition(inputs), 500.0)
    plain = model.stack(tokens.clone(), context)
    out = model.run_stack(model.stack, tokens, context)
    assert out.data_ptr() == tokens.data_ptr()
    torch.testing.assert_close(out, plain, atol=2e-5, rtol=2e-5)


def test_branches_share_what_they_are_made_of_alike(make_model, make_inputs, monkeypatch):
    model, (inputs, noise) = make_model(), make_inputs()
    made, condition = [], model.condition

    def watched(*given):
        made.append(condition(*given))
        return made[-1]

    monkeypatch.setattr(model, "condition", watched)
    config = SamplingConfig(steps=2, guidance_scale=3.0, audio_guidance_scale=2.0)
    negative = torch.randn(1, 5, TINY.text_width)
    guided = clip_denoiser(model, inputs, negative, config)(noise, 500.0)
    both, text_only, other = made
    for name in ("side_tokens", "rope", "frame_index"):
        assert getattr(both, name) is getattr(text_only, name) is getattr(other, name)
    assert both.text is text_only.text and both.text is not other.text
    assert not torch.equal(both.audio_tokens, text_only.audio_tokens)
    monkeypatch.setattr(model, "condition", lambda inputs, branch, like: condition(inputs, branch))
    alone = clip_denoiser(model, inputs, negative, config)(noise, 500.0)
    assert torch.equal(alone, guided)


def test_another_picture_is_embedded_anew(make_model, make_inputs):
    model, (inputs, _) = make_model(), make_inputs()
    first = model.condition(inputs)
    changed = replace(inputs, reference_latents=inputs.reference_latents + 1)
    assert torch.equal(model.condition(changed, like=first).side_tokens, model.condition(changed).side_tokens)
    assert not torch.equal(model.condition(changed).side_tokens, first.side_tokens)
    longer = replace(inputs, audio=inputs.audio.repeat(1, 1, 1, 2), pose_latents=None)
    second = model.condition(longer, like=first)
    assert (
        second.grid[0] == 2 * first.grid[0]
        and len(second.rope) == len(second.frame_index) + second.side_tokens.shape[1]
    )
