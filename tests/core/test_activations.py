"""What a forward holds at its peak, predicted and counted; and how much less it is in slices."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from live_bytes import LiveBytes

from wan_s2v_core.acceleration.keys_values import kept_keys_values
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.config import S2VModelConfig
from wan_s2v_core.memory.activations import (
    ClipShape,
    ForwardWay,
    activation_bytes,
    activation_terms,
    clip_bytes,
    latents_bytes,
)
from wan_s2v_core.memory.slices import in_slices
from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.rope import rotary_table

LATER_CLIP = {(832, 480): ClipShape((20, 30, 52), 1560 + 1560 + 390 + 364), (1280, 704): ClipShape((20, 44, 80), 8800)}
"""Tokens of the released model's second clip; the last two are packed motion."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def counted_peak(model, inputs, noise, size=None) -> tuple[int, ClipShape]:
    """Bytes at the peak of two forwards, with all that the clip is made from counted, and its shape."""
    rotary_table.cache_clear()  # on a card each clip has its copy
    with in_slices(size)(model), LiveBytes() as live:
        noise = noise.clone()
        pose = None if inputs.pose_latents is None else inputs.pose_latents.clone()
        condition = model.condition(replace(inputs, pose_latents=pose))
        live.peak = 0
        for moment in (900.0, 100.0):
            out = model(noise, torch.full((len(noise),), moment), condition)
    assert out.isfinite().all()
    return live.peak, ClipShape(condition.grid, condition.side_tokens.shape[1], pose is not None, len(noise))


@pytest.mark.parametrize("trial", range(10))
def test_the_prediction_is_what_is_counted(trial, make_inputs, fresh_seed, attach):
    """Within 10 %, for random sizes, precisions and slices, with and without pose, motion and voice."""
    draw = random.Random(fresh_seed + trial)
    heads = draw.choice((2, 4))
    width = heads * draw.choice((48, 64, 96))
    config = replace(
        TINY,
        width=width,
        heads=heads,
        feed_forward_width=width * draw.choice((1, 2, 3)),
        blocks=draw.choice((1, 2, 3)),
        injected_blocks=draw.choice(((), (0,))),
        modulates_audio=draw.random() < 0.7,
    )
    model, dtype = S2VTransformer(config), draw.choice((torch.float32, torch.bfloat16))
    fill_random(model, fresh_seed, dtype)
    if keeps := draw.random() < 0.5:
        attach(model, kept_keys_values)
    h, w = draw.choice(((16, 20), (22, 36), (32, 32)))
    inputs, noise = make_inputs(config, draw.randint(3, 8), h, w, draw.choice((0, 19)), draw.choice((1, 1, 2)))
    inputs = replace(inputs, pose_latents=inputs.pose_latents if draw.random() < 0.5 else None)
    size = draw.choice((None, 128, 256, 512))
    peak, shape = counted_peak(model, inputs, noise, size)
    way = ForwardWay(size, dtype.itemsize, fused=False, keeps_keys_values=keeps)
    ratio = activation_bytes(config, shape, way) / peak
    assert 0.9 < ratio < 1.1, (ratio, config, shape, way, activation_terms(config, shape, way))


def test_less_is_held_in_slices(make_inputs, fresh_seed):
    """The stream, keys and values, and a slice: what else the plain way holds is gone."""
    config = replace(TINY, width=128, heads=2, feed_forward_width=3 * 128)
    model = S2VTransformer(config)
    fill_random(model, fresh_seed)
    inputs, noise = make_inputs(config, frames=8, h=32, w=32)
    plain, shape = counted_peak(model, inputs, noise)
    peaks = [counted_peak(model, inputs, noise, size)[0] for size in (1024, 512, 256, 128)]
    assert peaks == sorted(peaks, reverse=True) and peaks[1] < 0.6 * plain
    stream = 4 * config.width * shape.tokens
    fixed = clip_bytes(config, shape, ForwardWay()) + latents_bytes(config, shape)
    assert 3 * stream < peaks[-1] - fixed < 3.7 * stream, "stream, keys and values, all in float32, and little else"


@pytest.mark.parametrize("size", LATER_CLIP)
def test_a_real_clip_in_slices_fits(size):
    """The released model in bfloat16 on a card: two branches with what they keep, and a pose."""
    config, shape = S2VModelConfig(), replace(LATER_CLIP[size], has_pose=True)
    whole = activation_bytes(config, shape, ForwardWay(branches=2))
    sliced = activation_bytes(config, shape, ForwardWay(8192, branches=2))
    assert sliced < 0.85 * whole and sliced < 5e9
    in_8_bits = ForwardWay(8192, branches=2, rows_in_8_bits=True, attention_bits=8, sparse_keep=0.5)
    assert activation_bytes(config, shape, in_8_bits) < sliced
    assert activation_bytes(config, shape, ForwardWay(2048, branches=2)) < sliced


def test_terms_are_the_sum_and_name_the_largest_phase():
    config, shape = S2VModelConfig(), LATER_CLIP[1280, 704]
    terms = activation_terms(config, shape, ForwardWay())
    assert sum(terms.values()) == activation_bytes(config, shape, ForwardWay())
    assert list(terms) == ["latents", "clip", "branches", "modulation", "attention"]
    assert "feed-forward" in activation_terms(config, shape, ForwardWay(8192))
