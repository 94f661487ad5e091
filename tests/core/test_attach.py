"""Techniques are taken off again: a network is then what it was, tensor for tensor and attribute for attribute."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch import nn

from wan_s2v_core import attach
from wan_s2v_core.acceleration import pointwise
from wan_s2v_core.acceleration.attention.sparse import SparsePlan, sparse_attend, strips
from wan_s2v_core.acceleration.experts.router import routed, take_load
from wan_s2v_core.acceleration.keys_values import kept_keys_values
from wan_s2v_core.acceleration.pointwise import FusedPointwise, fused_steps
from wan_s2v_core.attach import accelerated, attached, attending, dense_from, techniques
from wan_s2v_core.config import AccelerationPlan, ExpertRouting, OffloadPlan, SamplingConfig
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.memory.slices import in_slices
from wan_s2v_core.model.attention import sdpa
from wan_s2v_core.model.experts import ExpertLoad
from wan_s2v_core.model.pointwise import Pointwise
from wan_s2v_core.sampling.schedule import make_schedule
from wan_s2v_core.seams import replaced

SPARSE = AccelerationPlan("sdpa", sparse_keep=0.3, sparse_dense_steps=0, sparse_dense_blocks=1)
EXPERTS = replace(TINY, num_experts=4, top_k=2)


def elsewhere(q, k, v, context):
    return sdpa(q, k, v, context)


ALL = {
    "attention": attending(elsewhere, sdpa, 1),
    "strips": strips,
    "fused": fused_steps(),
    "slices": in_slices(128),
    "keys": kept_keys_values,
    "routing": routed(ExpertRouting(top_k=1, expert_capacity=64, gate_dropout=0.5, gate_dropout_seed=3)),
}


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Fused steps are attached here too; on a CPU each of them takes the plain way."""
    monkeypatch.setattr(pointwise, "kernels_work", lambda device: True)


def picture(model: nn.Module) -> dict:
    """All that can be attached to a network: every attribute of every module, and the bits of every tensor."""
    seen = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                seen |= {(name, key, inner): id(kept) for inner, kept in value.items()}
            else:
                seen[name, key] = value if isinstance(value, int | float | ExpertLoad | ExpertRouting) else id(value)
    return seen | {("tensor", name): value.clone() for name, value in model.state_dict().items()}


def assert_same(before: dict, after: dict) -> None:
    assert list(before) == list(after)
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("chosen", [*([name] for name in ALL), list(ALL), list(reversed(ALL))], ids="+".join)
def test_taken_off_it_leaves_nothing(chosen, fails, make_model, make_inputs, as_on_a_card):
    model = make_model(EXPERTS)
    inputs, noise = make_inputs(EXPERTS, h=32, w=32)
    before = picture(model)
    with torch.inference_mode():
        plain = model(noise, 500.0, model.condition(inputs))
        take_load(model)
        made = [ALL[name] for name in chosen]
        try:
            with attached(model, made):
                assert picture(model).keys() == before.keys(), "attributes may change, none may come or go"
                model(noise, 500.0, model.condition(inputs))
                if fails:
                    raise KeyError("in the midst of it")
        except KeyError:
            assert fails
        take_load(model)  # forwards count what experts do, whatever is attached
        assert_same(before, picture(model))
        assert torch.equal(model(noise, 500.0, model.condition(inputs)), plain)
        with attached(model, made):  # the same objects serve again, and another model
            first = model(noise, 500.0, model.condition(inputs))
        twin = copy.deepcopy(model)
        with attached(twin, made):
            assert torch.equal(twin(noise, 500.0, twin.condition(inputs)), first)


def test_the_order_of_wrappers_does_not_matter_for_taking_off(make_model):
    """Two things at one seam: the one that came last goes first."""
    model = make_model()
    plain = model.run_stack
    with strips(model):
        inner = model.run_stack
        with strips(model):
            assert model.run_stack is not inner is not plain
        assert model.run_stack is inner
    assert model.run_stack is plain


def test_what_cannot_be_attached_leaves_nothing(make_model):
    model = make_model()
    before = picture(model)
    with pytest.raises(ConfigError, match="Not applicable"), attached(model, [*ALL.values()]):
        pass
    assert_same(before, picture(model))
    with pytest.raises(ConfigError, match="nonsense"), accelerated(model, AccelerationPlan("nonsense")):
        pass
    with pytest.raises(AttributeError), replaced([(model.head, "tokens_at_once", 7), (model, "no_such_seam", 7)]):
        pass
    assert_same(before, picture(model))


def test_names_of_weights_stay_while_a_plan_is_attached(make_model):
    model = make_model()
    names = list(model.state_dict())
    with accelerated(model, SPARSE, OffloadPlan(slice_tokens=128)):
        assert list(model.state_dict()) == names


def test_plans_say_what_is_attached(make_model, as_on_a_card):
    model = make_model()
    owners = [module for module in model.modules() if hasattr(module, "pointwise")]
    attends = [block.attention for block in model.stack.blocks]
    with accelerated(model, replace(SPARSE, fused=False), OffloadPlan(keeps_keys_values=False)):
        assert attends[0].attend is sdpa and len({id(one.attend) for one in attends[1:]} - {id(sdpa)}) == 1
        assert all(type(module.pointwise) is Pointwise for module in owners)
        assert model.stack.blocks[0].cross_attention.recall is attach_free(model)
    with accelerated(model, AccelerationPlan("sdpa")):
        assert {one.attend for one in attends} == {sdpa}
        assert all(type(module.pointwise) is FusedPointwise for module in owners)
        assert model.stack.blocks[0].cross_attention.recall is not attach_free(model)
        assert model.tokens_at_once is None


def attach_free(model):
    """What a cross-attention has at its seam when nothing is attached."""
    return type(model.stack.blocks[0].cross_attention)(4, 2, 1e-6).recall


def test_one_plan_makes_its_techniques_once_for_all_models(make_model, make_inputs):
    """They hold no model, so that none lives longer than its owner wants."""
    inputs, noise = make_inputs(h=32, w=32)
    one, other = make_model(), make_model()
    made = techniques(one, SPARSE, OffloadPlan(slice_tokens=128))
    held = []
    with torch.inference_mode():
        for model in (one, other):
            with attached(model, made):
                held.append([block.attention.attend for block in model.stack.blocks])
                model(noise, 500.0, model.condition(inputs))
    assert held[0] == held[1], "compiled blocks are not compiled anew"


@pytest.mark.parametrize("dense", [0, 1, 3, 8, 11])
def test_dense_steps_are_the_first_of_a_schedule(dense):
    timesteps = make_schedule(SamplingConfig(steps=8)).timesteps
    limit = dense_from(timesteps, dense)
    assert sum(timestep >= limit for timestep in timesteps) == min(dense, 8)


def test_sparse_attention_sees_everything_above_its_timestep(make_model, make_inputs):
    """The same attention serves dense and sparse steps, by the timestep alone."""
    model, (inputs, noise) = make_model(), make_inputs(h=64, w=64)
    listed = attach.choose_attention(SPARSE, model.config, model.dtype, model.device).attend_listed
    attend = sparse_attend(sdpa, listed, SparsePlan(0.3, "scores", dense_from=600.0))
    with torch.inference_mode(), attached(model, [attending(attend), strips]):
        early, late = (model(noise, moment, model.condition(inputs)) for moment in (600.0, 599.0))
    with torch.inference_mode(), attached(model, [strips]):
        dense = [model(noise, moment, model.condition(inputs)) for moment in (600.0, 599.0)]
    torch.testing.assert_close(early, dense[0])
    assert not torch.allclose(late, dense[1], atol=1e-5)
