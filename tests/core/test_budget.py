"""Plans that fit: chosen by the room there is, the fastest first, and true to what they predict."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import TINY
from live_bytes import LiveBytes

from wan_s2v_core.attach import accelerated
from wan_s2v_core.bench.engine import RELEASED, meta_network, plan_loading
from wan_s2v_core.clip_denoiser import clip_shape
from wan_s2v_core.config import MEMORY_PROFILES, AccelerationPlan, MemoryLimits, OffloadPlan
from wan_s2v_core.errors import ConfigError, OutOfMemory
from wan_s2v_core.io import host_memory
from wan_s2v_core.io.host_memory import free_ram_bytes
from wan_s2v_core.memory import budget
from wan_s2v_core.memory.activations import ForwardWay
from wan_s2v_core.memory.budget import (
    CONTEXT_BYTES,
    TEXT_BYTES,
    Planned,
    Room,
    Sizes,
    dit_plan,
    tighter,
    whole,
)
from wan_s2v_core.memory.placement import Placement
from wan_s2v_core.model.checkpoint import DIT, TEXT_ENCODER
from wan_s2v_core.model.loading import set_types
from wan_s2v_core.model.rope import rotary_table

CPU = torch.device("cpu")
GB = 10**9
SIZES_PX = {"480p": (480, 832), "720p": (704, 1280)}


def released_sizes(kind: str, precision: str = "bfloat16") -> Sizes:
    loading = plan_loading(precision, CPU)
    return Sizes.of(Placement(set_types(meta_network(kind, RELEASED[kind], loading), loading.dtype(kind))))


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return released_sizes(DIT)


def card(gigabytes: float, ram_bytes: int | None = None) -> Room:
    return Room(round(gigabytes * GB) - CONTEXT_BYTES, ram_bytes)


def choose(size: str, room: Room, sizes: Sizes, limits: MemoryLimits = MemoryLimits(), **way) -> Planned:  # noqa: B008
    config = RELEASED[DIT]
    shape = clip_shape(config, SIZES_PX[size], 20, 19, has_pose=True)
    return dit_plan(config, shape, ForwardWay(branches=2, **way), limits)(room, sizes)


@pytest.mark.parametrize("size", SIZES_PX)
@pytest.mark.parametrize("profile", MEMORY_PROFILES)
def test_every_profile_has_a_plan_that_fits(profile, size, sizes):
    """In bfloat16, with guidance and a driving video."""
    planned = choose(size, card(MEMORY_PROFILES[profile]), sizes)
    assert planned.bytes <= card(MEMORY_PROFILES[profile]).usable_bytes
    assert planned.plan.swaps == (MEMORY_PROFILES[profile] < 40)
    assert choose(size, card(6.0), sizes).bytes < 5.2 * GB, "and a card of 6 GB"


def test_the_embedded_and_the_released_model_take_what_they_should(sizes):
    assert sizes.whole == pytest.approx(33.16 * GB, rel=0.001) and len(sizes.blocks) == 40
    assert sizes.on_device(OffloadPlan()) == sizes.whole
    assert sizes.on_device(OffloadPlan(40)) == sizes.whole
    tightest = OffloadPlan(0, slots=1, keeps_injectors=False, keeps_seldom=False)
    assert sizes.on_device(tightest) == max(sizes.blocks) + sizes.others


def order_of(plan: OffloadPlan) -> tuple:
    """Larger for plans that take more memory."""
    slices = plan.slice_tokens or 10**9
    return (not plan.swaps, slices, plan.keeps_keys_values, plan.keeps_injectors, plan.keeps_seldom, plan.slots)


@pytest.mark.parametrize("size", SIZES_PX)
def test_more_room_never_gives_a_tighter_plan(size, sizes, fresh_seed):
    chance = random.Random(fresh_seed)
    plans = [choose(size, card(gb), sizes) for gb in sorted(chance.uniform(6, 60) for _ in range(40))]
    for one, two in pairwise(plans):
        assert order_of(one.plan) <= order_of(two.plan)
        if order_of(one.plan) == order_of(two.plan) and two.plan.swaps:
            assert one.plan.resident_layers <= two.plan.resident_layers


def test_a_room_is_filled(sizes):
    """One more block would be too many."""
    for gb in (9, 14, 20, 30):
        room = card(gb)
        planned = choose("480p", room, sizes)
        if planned.plan.resident_layers < len(sizes.blocks):
            more = replace(planned.plan, resident_layers=planned.plan.resident_layers + 1)
            needed = sizes.on_device(more) + planned.working_bytes + planned.gap_bytes
            assert needed > room.usable_bytes


def test_what_does_not_fit_is_told_with_numbers(sizes):
    with pytest.raises(OutOfMemory, match=r"needs \d\.\d GB in its tightest form, 2\.2 GB are free"):
        choose("720p", card(3), sizes)


def test_by_hand(sizes):
    limits = MemoryLimits(resident_blocks=7, slice_tokens=4096)
    assert choose("480p", card(80), sizes, limits).plan.resident_layers == 7
    plan = choose("480p", card(12), sizes, limits).plan
    assert plan.slice_tokens == 4096 and plan.resident_layers == 7
    assert choose("480p", card(80), sizes, MemoryLimits(resident_blocks=0)).plan.resident_layers == 0
    assert choose("720p", card(24), sizes, MemoryLimits(slice_tokens=0)).plan.slice_tokens is None
    for wrong in ({"vram_limit_gb": 0}, {"resident_blocks": -1}, {"tile_px": 100}, {"weights": "disk"}):
        with pytest.raises(ConfigError):
            MemoryLimits(**wrong)
    assert MemoryLimits.from_dict(limits.to_dict()) == limits


def test_layers_are_locked_where_main_memory_has_room(sizes):
    assert choose("480p", card(12, 80 * GB), sizes).plan.locks
    assert not choose("480p", card(12, 24 * GB), sizes).plan.locks
    asked = [replace(card(12, ram), weights=kind) for ram, kind in ((24 * GB, "locked"), (80 * GB, "mapped"))]
    assert [choose("480p", room, sizes).plan.locks for room in asked] == [True, False]


def test_the_text_encoder_fits_into_4_gb():
    sizes = released_sizes(TEXT_ENCODER)
    planned = whole(TEXT_BYTES)(Room(4 * GB), sizes)
    assert planned.bytes < 4 * GB and planned.plan.swaps
    assert whole(TEXT_BYTES)(Room(24 * GB), sizes).plan == OffloadPlan()


def test_tighter_leads_down_the_ladder(sizes):
    """Every failure gives another plan that takes less, until there is none."""
    room, seen = card(48), []
    with pytest.raises(OutOfMemory):
        while True:
            seen.append(choose("720p", room, sizes))
            room = tighter(room, seen[-1])
    assert 6 < len(seen) < 30 and all(two.bytes < one.bytes for one, two in pairwise(seen))


def test_main_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    free = free_ram_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 50\ninactive_file 40\n")
    assert free_ram_bytes() == pytest.approx(free, rel=0.05)
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_ram_bytes() == 940, "what is read of files can be dropped"


@pytest.mark.parametrize("trial", range(4))
def test_a_chosen_plan_runs_on_a_card_of_that_size(trial, make_model, make_inputs, fresh_seed, monkeypatch):
    """On a simulated card: what is predicted is within 10 % of what is counted, and nothing runs out of memory."""
    monkeypatch.setattr(budget, "MARGIN_BYTES", 0)
    monkeypatch.setattr(budget, "SLICES", (None, 512, 256, 128))
    chance = random.Random(fresh_seed + trial)
    width = chance.choice((96, 144, 192))
    config = replace(TINY, width=width, feed_forward_width=3 * width, blocks=8, injected_blocks=(0, 3, 6))
    model = make_model(config)
    inputs, noise = make_inputs(config, chance.randint(4, 8), 32, chance.choice((20, 32)))
    placement = Placement(model)
    sizes, shape = Sizes.of(placement), clip_shape(config, (256, 8 * noise.shape[4]), noise.shape[2], 19, True)
    way = ForwardWay(dtype_bytes=4, fused=False)
    plan = dit_plan(config, shape, way, MemoryLimits())
    most = plan(Room(10**12), sizes).bytes
    with torch.inference_mode():
        with accelerated(model, AccelerationPlan()):
            expected = model(noise, 500.0, model.condition(inputs))
        room = Room(round(chance.uniform(0.45, 1.1) * most))
        planned = plan(room, sizes)
        with placement.on(CPU, OffloadPlan(0)):
            pass  # pack outside of the count
        rotary_table.cache_clear()
        with (
            LiveBytes(cap=room.device_bytes) as live,
            placement.on(CPU, planned.plan) as network,
            accelerated(network, AccelerationPlan(), planned.plan),
        ):
            pose = inputs.pose_latents.clone()
            condition = network.condition(replace(inputs, pose_latents=pose))
            for _ in range(2):
                found = network(noise.clone(), 500.0, condition)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    here = sizes.others if planned.plan.swaps else sizes.whole  # on a CPU these are not copied
    assert live.peak + here == pytest.approx(planned.bytes, rel=0.1), planned
