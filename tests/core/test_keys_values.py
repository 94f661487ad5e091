"""Keys and values that are kept: exact, computed once, gone with what they were made from."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import TINY

from wan_s2v_core.acceleration.keys_values import forget_keys_values, keep_keys_values, kept_bytes
from wan_s2v_core.model.attention import CrossAttention
from wan_s2v_core.model.dit import S2VTransformer


@pytest.fixture
def counted(monkeypatch):
    """How often keys and values have been computed."""
    calls, compute = [], CrossAttention.keys_values

    def count(self, others):
        calls.append(self)
        return compute(self, others)

    monkeypatch.setattr(CrossAttention, "keys_values", count)
    return calls


def test_computed_once_for_each_branch(counted, make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    other_inputs, _ = make_inputs(frames=5)
    other_inputs.text.mul_(-1)
    with torch.inference_mode():
        branches = [model.condition(inputs, "both"), model.condition(other_inputs, "negative")]
        plain = [model(noise, moment, branch) for moment in (900.0, 500.0) for branch in branches]
        keep_keys_values(model)
        keep_keys_values(model)  # a second time changes nothing
        counted.clear()
        kept = [model(noise, moment, branch) for moment in (900.0, 500.0) for branch in branches]
    assert len(counted) == 2 * (TINY.blocks + len(TINY.injected_blocks))
    for one, other in zip(kept, plain, strict=True):
        assert torch.equal(one, other)
    values = TINY.blocks * TINY.text_tokens + len(TINY.injected_blocks) * 5 * (TINY.audio_tokens + 1)
    assert kept_bytes(model) == 2 * 2 * 4 * TINY.width * values
    branches.pop()
    assert kept_bytes(model) == 2 * 4 * TINY.width * values
    del branches
    assert kept_bytes(model) == 0


def test_changed_weights_are_seen_after_forgetting(make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    keep_keys_values(model)
    with torch.inference_mode():
        condition = model.condition(inputs)
        before = model(noise, 500.0, condition)
        model.stack.blocks[0].cross_attention.v.weight.mul_(3)
        assert torch.equal(model(noise, 500.0, condition), before)
        forget_keys_values(model)
        assert not torch.equal(model(noise, 500.0, condition), before)


def test_training_keeps_nothing(make_model, make_inputs):
    model, (inputs, noise) = make_model().requires_grad_(True), make_inputs()
    keep_keys_values(model)
    condition = model.condition(inputs)
    with torch.no_grad():
        model(noise, 500.0, condition)
    model(noise, 500.0, condition).square().mean().backward()
    assert model.stack.blocks[1].cross_attention.k.weight.grad.any()


def test_a_copy_has_keys_of_its_own(make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    keep_keys_values(model)
    with torch.inference_mode():
        condition = model.condition(inputs)
        before = model(noise, 500.0, condition)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(noise, 500.0, condition), before)
        twin.stack.blocks[0].cross_attention.v.weight.mul_(3)
        forget_keys_values(twin)
        assert not torch.equal(twin(noise, 500.0, condition), before)
        assert torch.equal(model(noise, 500.0, condition), before)


def test_a_network_goes_when_nobody_holds_it():
    """Without waiting for the collector of circles: it may hold 33 GB."""
    model = S2VTransformer(TINY)
    keep_keys_values(model)
    gone = weakref.ref(model.stack.blocks[0].cross_attention)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
