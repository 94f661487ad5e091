"""Random weights: the same for the same seed, and activations of order one at any depth."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY

from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.model.dit import S2VTransformer


@pytest.mark.parametrize("blocks", [2, 12, 40])
def test_activations_stay_of_order_one(blocks, make_inputs, fresh_seed):
    config = replace(TINY, blocks=blocks, injected_blocks=tuple(range(0, blocks, 3)))
    model = S2VTransformer(config)
    fill_random(model, fresh_seed)
    inputs, noise = make_inputs(config)
    streams = []
    for block in model.stack.blocks:
        block.register_forward_hook(lambda _, __, out: streams.append(out.std().item()))
    with torch.inference_mode():
        out = model(noise, 600.0, model.condition(inputs))
    assert all(0.3 < std < 5 for std in streams), streams
    assert 0.2 < out.std() < 5


def test_same_seed_same_weights_in_any_precision(fresh_seed):
    with torch.device("meta"):
        models = [S2VTransformer(TINY) for _ in range(3)]
    fill_random(models[0], fresh_seed)
    fill_random(models[1], fresh_seed, torch.bfloat16)
    fill_random(models[2], fresh_seed + 1)
    for (name, a), b, c in zip(
        models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True
    ):
        assert torch.equal(a, b.float()), f"{name} is representable in bfloat16"
        assert not torch.equal(a, c)
