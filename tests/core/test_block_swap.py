"""Weights that wait in main memory: results are the same bit for bit, and no layer is where it should not be."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

from wan_s2v_core.acceleration.quantization import swap_linears
from wan_s2v_core.attach import accelerated
from wan_s2v_core.config import AccelerationPlan, OffloadPlan
from wan_s2v_core.memory.block_swap import BlockSwap, Lane, Transfer, residents
from wan_s2v_core.memory.budget import Sizes
from wan_s2v_core.memory.home import Locking, PackedLayer
from wan_s2v_core.memory.placement import Placement
from wan_s2v_core.model.text_encoder import TextEncoder

DEEPER = replace(TINY, blocks=7, injected_blocks=(0, 2, 5))
CPU = torch.device("cpu")
SIZES = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 5, "num_heads": 4}


def plans(layers: int):
    for resident in (0, 1, layers // 2, layers - 1, layers):
        for slots in (1, 2):
            for stays in (True, False):
                for locks in (True, False):
                    yield OffloadPlan(resident, slots, keeps_injectors=stays, keeps_seldom=stays, locks=locks)


@pytest.mark.parametrize("kind", ["plain", "float8-weights"])
def test_a_dit_computes_the_same_under_every_plan(kind, make_model, make_inputs):
    model = make_model(DEEPER)
    if kind != "plain":
        swap_linears(model, kind)
    inputs, latents = make_inputs(DEEPER)
    with torch.inference_mode():
        expected = model(latents, 500.0, model.condition(inputs))
        places = {name: value.data_ptr() for name, value in model.state_dict().items()}
        placement = Placement(model)
        for plan in plans(model.config.blocks):
            check_predicted_bytes(placement, plan)
            with placement.on(CPU, plan) as network:
                for _ in range(3):
                    assert torch.equal(network(latents, 500.0, network.condition(inputs)), expected), plan
            assert torch.equal(model(latents, 500.0, model.condition(inputs)), expected), "at home"
    moved = {name for name, value in model.state_dict().items() if value.data_ptr() != places[name]}
    assert moved and all(name.startswith(("stack.", "text_e", "time_", "audio_encoder")) for name in moved)


def check_predicted_bytes(placement: Placement, plan: OffloadPlan) -> None:
    """What a plan is predicted to take is what its lanes and the blocks that stay take."""
    sizes = Sizes.of(placement)
    lanes, resident = placement.lanes(plan)
    there = sum(lane.bytes for lane in lanes) + sum(layer.bytes for layer in resident)
    assert there + sizes.others == sizes.on_device(plan), plan


@pytest.mark.parametrize("larger", range(DEEPER.blocks))
def test_blocks_of_unequal_size_take_what_is_predicted(larger, make_model):
    model = make_model(DEEPER)
    model.stack.blocks[larger].register_buffer("more", torch.zeros(50_000))
    placement = Placement(model)
    for plan in plans(DEEPER.blocks):
        check_predicted_bytes(placement, plan)


class LowRank(nn.Module):
    """A layer with a product of two small matrices beside it, which says where these lie when it computes."""

    def __init__(self, base: nn.Linear, seen: list[int], rank: int = 2):
        super().__init__()
        self.base, self.seen = base, seen
        self.down = nn.Parameter(torch.randn(rank, base.in_features), requires_grad=False)
        self.up = nn.Parameter(torch.randn(base.out_features, rank), requires_grad=False)

    def forward(self, x):
        self.seen += [self.down.data_ptr(), self.up.data_ptr()]
        return self.base(x) + x @ self.down.T @ self.up.T


OTHER_CPU = torch.device("cpu", 0)
"""A device of its own to `Placement`."""


@pytest.mark.parametrize("was_used", [False, True])
@pytest.mark.parametrize("plan", [OffloadPlan(1), OffloadPlan(1, locks=False), OffloadPlan()])
def test_layers_put_in_after_loading_travel_with_their_blocks(plan, was_used, make_model, make_inputs, fresh_seed):
    """Also into a network that is on a device already, where all of it stays there."""
    torch.manual_seed(fresh_seed)
    model, seen = make_model(DEEPER), []
    inputs, latents = make_inputs(DEEPER)
    placement, attentions = Placement(model), [block.attention for block in model.stack.blocks]

    def compute() -> torch.Tensor:
        with torch.inference_mode():
            return model(latents, 500.0, model.condition(inputs))

    def compute_placed() -> torch.Tensor:
        if plan.swaps:
            with placement.on(OTHER_CPU, plan):
                return compute()
        placement.send(OTHER_CPU)
        return compute()

    plain = compute()
    if was_used:
        assert torch.equal(compute_placed(), plain)
    for attention in attentions:
        attention.q = LowRank(attention.q, seen)
    at_home = {m.data_ptr() for attention in attentions for m in (attention.q.down, attention.q.up)}
    expected = compute()
    assert not torch.equal(expected, plain) and set(seen) == at_home
    seen.clear()
    assert torch.equal(compute_placed(), expected) and len(seen) == 2 * len(attentions)
    assert not at_home & set(seen), "all of them were on the device"
    check_predicted_bytes(placement, plan)
    for attention in attentions:
        attention.q = attention.q.base
    assert torch.equal(compute_placed(), plain)
    placement.take_back()
    assert torch.equal(compute(), plain) and placement.device_bytes == 0


def test_weights_changed_at_home_are_not_changed_back(make_model):
    model = make_model(DEEPER)
    placement, block = Placement(model), model.stack.blocks[2]
    changed = block.feed_forward.up.bias = nn.Parameter(torch.ones(DEEPER.feed_forward_width), requires_grad=False)
    placement.take_back()
    for plan in (OffloadPlan(0, locks=False), OffloadPlan()):
        with placement.on(OTHER_CPU, plan):
            pass
        assert block.feed_forward.up.bias is changed
    with placement.on(OTHER_CPU, OffloadPlan(0)):
        pass
    assert torch.equal(block.feed_forward.up.bias, changed)


def test_techniques_compose(make_model, make_inputs):
    """Sparse attention in strips, slices of tokens and layers that come and go."""
    model = make_model(DEEPER)
    inputs, latents = make_inputs(DEEPER, h=32, w=32)
    sparse = AccelerationPlan(sparse_keep=0.5, sparse_dense_steps=0)
    with torch.inference_mode():
        with accelerated(model, sparse):
            expected = model(latents, 500.0, model.condition(inputs))
        placement = Placement(model)
        for plan in (OffloadPlan(0, slice_tokens=256), OffloadPlan(2, slots=1, keeps_keys_values=False)):
            with placement.on(CPU, plan) as network, accelerated(network, sparse, plan):
                torch.testing.assert_close(network(latents, 500.0, network.condition(inputs)), expected)


@pytest.fixture
def chance(fresh_seed):
    return np.random.default_rng(fresh_seed)


def test_umt5_computes_the_same_under_every_plan(chance):
    encoder = TextEncoder(SIZES).requires_grad_(False)
    ids = torch.from_numpy(chance.integers(0, 40, (1, 9)))
    with torch.inference_mode():
        expected = encoder.encode_ids(ids, torch.ones_like(ids))
        placement = Placement(encoder)
        for plan in plans(SIZES["num_layers"]):
            with placement.on(CPU, plan) as network:
                assert torch.equal(network.encode_ids(ids, torch.ones_like(ids)), expected), plan
    assert encoder.network.encoder.embed_tokens.weight is encoder.table.weight


class Layers(nn.Module):
    """Numbers that pass through layers in any order."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(count)).requires_grad_(False)

    def forward(self, x, order):
        for index in order:
            x = self.layers[index](x)
        return x


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_layers_may_come_in_any_order_and_fail(slots, locks, chance):
    network = Layers(6)
    packed = [PackedLayer(layer) for layer in network.layers]
    if locks:
        [layer.pack() for layer in packed]
    x = torch.from_numpy(chance.normal(size=(2, 3))).float()
    orders = [chance.integers(0, 6, 20).tolist() for _ in range(3)] + [[*range(6)] * 2]
    with torch.inference_mode():
        expected = [network(x, order) for order in orders]
        with BlockSwap([Lane(packed, slots)], CPU) as swap:
            for order, wanted in zip(orders, expected, strict=True):
                assert torch.equal(network(x, order), wanted)
                with pytest.raises(RuntimeError):
                    network(x[:, :2], order)
                assert sum(layer.module.weight.data_ptr() != layer.places[0].tensor.data_ptr() for layer in packed) == 0
            assert swap.bytes == slots * packed[0].bytes
        assert torch.equal(network(x, orders[0]), expected[0])
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.layers)


def test_few_layers_are_fetched_ahead_and_each_once(monkeypatch):
    """In order, every layer crosses once a pass, and is sent for before the one before it has ended."""
    network, sent, computed = Layers(5), [], []
    packed = [PackedLayer(layer) for layer in network.layers]
    plain = Transfer.send
    monkeypatch.setattr(Transfer, "send", lambda *given: (sent.append(packed.index(given[1])), plain(*given))[1])
    with torch.inference_mode(), BlockSwap([Lane(packed, 2)], CPU):
        for number, layer in enumerate(network.layers):
            layer.register_forward_pre_hook(lambda *_, number=number: computed.append((number, list(sent))))
        for _ in range(3):
            network(torch.ones(1, 3), range(5))
    assert sent == [*range(5), *range(5), *range(5), 0, 1]
    assert all(number in before and (number + 1) % 5 in before[-2:] for number, before in computed)


def test_a_changed_layer_is_packed_again():
    layer = nn.Linear(3, 3).requires_grad_(False)
    packed = PackedLayer(layer)
    packed.pack()
    assert packed.is_packed
    layer.weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    assert not packed.is_packed
    packed.pack()
    assert packed.is_packed and torch.equal(layer.weight, torch.ones(3, 3))


def test_compiled_layers_are_swapped(make_model, make_inputs):
    model = make_model(DEEPER)
    inputs, latents = make_inputs(DEEPER)
    with torch.inference_mode():
        condition = model.condition(inputs)
        expected = model(latents, 500.0, condition)
        for block in model.stack.blocks:
            block.compile(backend="eager")
        with Placement(model).on(CPU, OffloadPlan(1)):
            for _ in range(2):
                assert torch.equal(model(latents, 500.0, condition), expected)


def test_residents_are_spread():
    assert residents(10, OffloadPlan(5)) == [1, 3, 5, 7, 9]
    assert all(len(set(residents(40, OffloadPlan(count)))) == count for count in range(41))
    assert residents(3, OffloadPlan()) == residents(3, OffloadPlan(7)) == [0, 1, 2] and not residents(0, OffloadPlan(1))


def test_memory_that_cannot_be_locked_is_told_once(monkeypatch, caplog):
    """Layers then travel through buffers; nothing asks again."""

    class Runtime:
        asked = 0

        def cudaHostRegister(self, *_) -> int:
            self.asked += 1
            return 2

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(Locking, "fails", False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    layers = [PackedLayer(nn.Linear(3, 3).requires_grad_(False)) for _ in range(2)]
    for layer in layers:
        layer.pack()
    assert not any(layer.lock() for layer in layers) and runtime.asked == 1
    assert len([record for record in caplog.records if "cannot be locked" in record.getMessage()]) == 1


def test_locked_memory_is_unlocked_with_its_layer(monkeypatch):
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, _: calls.append(("lock", address)) or 0,
        cudaHostUnregister=lambda address: calls.append(("unlock", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(Locking, "fails", False)
    module = nn.Linear(3, 3).requires_grad_(False)
    layer = PackedLayer(module)
    layer.pack()
    assert layer.lock() and layer.lock() and len(calls) == 1
    module.weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    layer.pack()  # in new memory: the old one is let go
    assert [what for what, _ in calls] == ["lock", "unlock"] and layer.lock()
    del layer
    gc.collect()
    assert [what for what, _ in calls] == ["lock", "unlock", "lock", "unlock"]
    assert calls[2][1] == calls[3][1]
