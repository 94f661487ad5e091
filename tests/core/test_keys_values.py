"""Keys and values that are kept: exact, computed once, gone with their clip."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY

from wan_s2v_core.acceleration.keys_values import kept_keys_values
from wan_s2v_core.model.attention import CrossAttention


@pytest.fixture
def counted(monkeypatch):
    """How often keys and values have been computed."""
    calls, compute = [], CrossAttention.project

    def count(self, others):
        calls.append(self)
        return compute(self, others)

    monkeypatch.setattr(CrossAttention, "project", count)
    return calls


def kept_bytes(condition) -> int:
    """What a condition remembers."""
    parts = [*condition.memory.own.values(), *condition.memory.text.values()]
    return sum(tensor.nbytes for part in parts for pair in part.values() for tensor in pair)


LAYERS = TINY.blocks + len(TINY.injected_blocks)


def test_computed_once_for_each_branch(counted, make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    other_inputs, _ = make_inputs(frames=5)
    other_inputs.text.mul_(-1)
    with torch.inference_mode():
        branches = [model.condition(inputs, "both"), model.condition(other_inputs, "negative")]
        plain = [model(noise, moment, branch) for moment in (900.0, 500.0) for branch in branches]
        assert [kept_bytes(branch) for branch in branches] == [0, 0]
        counted.clear()
        with kept_keys_values(model):
            kept = [model(noise, moment, branch) for moment in (900.0, 500.0) for branch in branches]
    assert len(counted) == 2 * LAYERS
    for one, other in zip(kept, plain, strict=True):
        assert torch.equal(one, other)
    values = TINY.blocks * TINY.text_tokens + len(TINY.injected_blocks) * 5 * (TINY.audio_tokens + 1)
    assert [kept_bytes(branch) for branch in branches] == 2 * [2 * 4 * TINY.width * values]


def test_branches_that_read_the_same_text_share_it(counted, make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    silence = replace(inputs, audio=torch.zeros_like(inputs.audio))
    with torch.inference_mode(), kept_keys_values(model):
        both = model.condition(inputs, "both")
        silent = model.condition(silence, "text", both)
        heard = model(noise, 500.0, both)
        counted.clear()
        unheard = model(noise, 500.0, silent)
        assert len(counted) == len(TINY.injected_blocks)
    with torch.inference_mode():
        assert torch.equal(model(noise, 500.0, model.condition(silence)), unheard)
        assert torch.equal(model(noise, 500.0, model.condition(inputs)), heard)


def test_training_keeps_nothing(make_model, make_inputs):
    model, (inputs, noise) = make_model().requires_grad_(True), make_inputs()
    with kept_keys_values(model):
        model(noise, 500.0, model.condition(inputs)).square().mean().backward()
    assert model.stack.blocks[1].cross_attention.k.weight.grad.any()


def test_a_copy_computes_with_its_own_weights(make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    with torch.inference_mode(), kept_keys_values(model):
        before = model(noise, 500.0, model.condition(inputs))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(noise, 500.0, twin.condition(inputs)), before)
        twin.stack.blocks[0].cross_attention.v.weight.mul_(3)
        assert not torch.equal(twin(noise, 500.0, twin.condition(inputs)), before)
        assert torch.equal(model(noise, 500.0, model.condition(inputs)), before)
