"""Blocks compile whole: one graph for all blocks, steps, branches and clips, and no graph break."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from wan_s2v_core.attach import accelerated
from wan_s2v_core.config import AccelerationPlan, OffloadPlan

PLAIN = AccelerationPlan("sdpa")


@pytest.mark.parametrize(
    ("plan", "memory", "graphs"),
    [
        (PLAIN, OffloadPlan(keeps_keys_values=False), 1),
        (
            PLAIN,
            OffloadPlan(),
            2,
        ),  # the first step of a clip computes keys and values of the text
        (PLAIN, OffloadPlan(slice_tokens=128), 2),
    ],
    ids=["plain", "kept keys", "slices"],
)
def test_blocks_share_their_graphs(plan, memory, graphs, make_model, make_inputs):
    model, counter = make_model(), CompileCounter()
    clips = [make_inputs(frames=6, h=16, w=20) for _ in range(2)]
    torch._dynamo.reset()
    with torch.inference_mode(), accelerated(model, plan, memory):
        plain = [model(noise, 900.0, model.condition(inputs)) for inputs, noise in clips]
        for block in model.stack.blocks:
            block.compile(fullgraph=True, backend=counter)
        for (inputs, noise), expected in zip(clips, plain, strict=True):
            silence = replace(inputs, audio=torch.zeros_like(inputs.audio))
            for branch in (inputs, silence):
                condition = model.condition(branch)
                found = [model(noise, moment, condition) for moment in (900.0, 500.0, 100.0)]
                if branch is inputs:
                    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    assert counter.frame_count == graphs
