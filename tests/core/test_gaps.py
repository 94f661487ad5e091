"""Plans leave room for what torch's allocator cannot use: forwards and VAE at real size, of tensors without data."""

import contextlib
import importlib
import random
from dataclasses import replace

import pytest
import torch
from card_memory import LARGE, MIB, CardMemory, Tensors

from wan_s2v_core.acceleration import pointwise
from wan_s2v_core.acceleration.keys_values import kept_keys_values
from wan_s2v_core.attach import attached, attending
from wan_s2v_core.bench.engine import RELEASED, loading_of, meta_network, with_blocks
from wan_s2v_core.bench.flops import ForwardShape
from wan_s2v_core.clip_denoiser import clip_shape
from wan_s2v_core.config import MemoryLimits, OffloadPlan
from wan_s2v_core.memory.activations import ForwardWay
from wan_s2v_core.memory.budget import CONTEXT_BYTES, NoPlanFits, Planned, Room, Sizes, dit_plan, vae_plan
from wan_s2v_core.memory.placement import Placement
from wan_s2v_core.memory.slices import in_slices
from wan_s2v_core.memory.vae_room import KERNELS, VaeWork, peak_bytes
from wan_s2v_core.model import attention
from wan_s2v_core.model.checkpoint import DIT
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer
from wan_s2v_core.model.loading import set_types
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.model.vae_parts import VaeParts
from wan_s2v_core.seams import Rows8

META = torch.device("meta")
TRIALS = 6


def test_card_memory_is_laid_out_as_torch_does():
    card = CardMemory(100 * MIB)
    small, middle = card.take(100), card.take(3 * MIB)
    assert card.reserved == 22 * MIB and card.allocated == 512 + 3 * MIB
    beside = card.take(9 * MIB)
    assert card.reserved == 22 * MIB and beside == middle + 3 * MIB
    large = card.take(60 * MIB)
    assert card.reserved == 82 * MIB
    with pytest.raises(torch.OutOfMemoryError, match="held"):
        card.take(LARGE + 10 * MIB)
    card.put_back(large)
    assert card.take(59.5 * MIB) == large and card.reserved == 82 * MIB  # half a MiB is not worth a piece
    card.put_back(large)
    first, second = card.take(20 * MIB), card.take(20 * MIB)
    assert (first, second) == (large, large + 20 * MIB)
    card.put_back(first)
    with pytest.raises(torch.OutOfMemoryError):
        card.take(30 * MIB)  # 20 and 20 are free, but apart
    card.put_back(second)
    assert card.take(60 * MIB) == large
    for address in (small, middle, beside, large):
        card.put_back(address)
    card.give_back()
    assert (card.reserved, card.allocated, len(card.pieces)) == (0, 0, 0)


@pytest.fixture
def without_kernels(monkeypatch):
    """Kernels that would run on a card make their results without computing them."""
    jit = pytest.importorskip("triton.runtime.jit")
    from wan_s2v_core.acceleration.attention import hopper
    from wan_s2v_core.acceleration.quantization import fp8, linear8

    def nothing(*_, **__):
        return contextlib.nullcontext()

    def multiplied(layer, rows):
        return rows.values.new_empty(len(rows.values), layer.out_features, dtype=rows.dtype)

    def in_8_bits(x, dtype):
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        return Rows8(torch.empty_like(x, dtype=dtype), scale, x.dtype)

    monkeypatch.setattr(jit.JITFunction, "run", nothing)
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    for name in ("norm", "rotary", "rows8"):
        module = importlib.import_module(f"wan_s2v_core.acceleration.kernels.{name}")
        monkeypatch.setattr(module, "on_device", nothing)
    for name in ("launch", "tensor_map"):
        monkeypatch.setattr(hopper, name, nothing)
    monkeypatch.setattr(pointwise, "serves", lambda *tensors: True)
    monkeypatch.setattr(attention, "scaled_dot_product", lambda q, k, v, mask=None: torch.empty_like(q))
    monkeypatch.setattr(fp8.Float8Product, "multiply", multiplied)
    monkeypatch.setattr(linear8, "quantize_rows", in_8_bits)


def clip_tensors(
    network: S2VTransformer, shape: ForwardShape, plan: OffloadPlan, bits: int, branches: int
) -> list[tuple[int, int | None]]:
    """What comes and goes in two steps of sampling a clip, besides weights."""
    from wan_s2v_core.acceleration.attention.hopper import prepare8, prepare16
    from wan_s2v_core.acceleration.attention.registry import prepared

    techniques = [attending(prepared(prepare8 if bits == 8 else prepare16)[0]), in_slices(plan.slice_tokens)]
    techniques += [kept_keys_values] if plan.keeps_keys_values else []
    (height, width), frames = shape.latent_size, shape.latent_frames

    def made(*sizes: int) -> torch.Tensor:
        return torch.empty(1, *sizes, device=META)

    with torch.inference_mode(), attached(network, techniques), Tensors(META) as tensors:
        inputs = ClipInputs(
            reference_latents=made(16, 1, height, width),
            motion_latents=made(16, shape.motion_latents, height, width) if shape.has_motion else None,
            pose_latents=made(16, frames, height, width),
            audio=made(25, 1024, shape.frames),
            text=made(100, 4096),
            motion_frames=73,
        )
        noise = made(16, frames, height, width)
        conditions = [network.condition(inputs, "0")]
        for branch in range(1, branches):
            own = replace(inputs, audio=torch.empty_like(inputs.audio))
            conditions.append(network.condition(own, str(branch), conditions[-1]))
        for _ in range(2):
            for condition in conditions:
                network(noise, 723.0, condition)
        events = list(tensors.events)
    return events


def weights_on_card(placement: Placement, plan: OffloadPlan) -> list[int]:
    """Bytes of what `Placement.on` puts there, one by one."""
    lanes, resident = placement.lanes(plan)
    others = {id(place.tensor): place.tensor.nbytes for place in placement.home.places}
    slots = [lane.slot_bytes for lane in lanes for _ in range(lane.count)]
    return [*others.values(), *(layer.bytes for layer in resident), *slots]


def planned_clip(network: S2VTransformer, shape: ForwardShape, room: Room, way: ForwardWay) -> Planned:
    past = shape.motion_latents if shape.has_motion else 0
    size = clip_shape(network.config, (shape.height_px, shape.width_px), shape.latent_frames, past, has_pose=True)
    return dit_plan(network.config, size, way, MemoryLimits())(room, Sizes.of(Placement(network)))


@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", 16), ("float8", 16), ("float8", 8)])
def test_no_plan_runs_out_of_memory(without_kernels, precision, bits, fresh_seed, attach):
    chance, seen = random.Random(fresh_seed), 0
    config, loading = with_blocks(RELEASED[DIT], 3), loading_of(precision, torch.device("cpu"))
    network = set_types(meta_network(DIT, config, loading), loading.dtype(DIT))
    attach(network, pointwise.fused_everywhere())
    while seen < TRIALS:
        sizes = ((832, 480), (1280, 704), (chance.randrange(256, 1600, 16), chance.randrange(256, 1300, 16)))
        shape = ForwardShape(*chance.choice(sizes), chance.choice((5, 10, 20, 30)), chance.random() < 0.7)
        room = Room(round(chance.uniform(3, 16) * 1e9) - CONTEXT_BYTES)
        way = ForwardWay(branches=chance.choice((1, 2, 3)), rows_in_8_bits=precision == "float8", attention_bits=bits)
        try:
            planned = planned_clip(network, shape, room, way)
        except NoPlanFits:
            continue
        seen += 1
        case, card = (shape, room, way, planned), CardMemory(room.device_bytes)
        try:
            for size in weights_on_card(Placement(network), planned.plan):
                card.take(size)
            card.replay(clip_tensors(network, shape, planned.plan, bits, way.branches))
        except torch.OutOfMemoryError as error:
            raise AssertionError(f"{error}: {case}") from error
        assert 0.9 < planned.bytes / card.most_allocated < 1.1, (card.most_allocated, case)


@pytest.fixture
def fast_vae(without_kernels, monkeypatch):
    """With kernels, which a card would have."""
    from wan_s2v_core.acceleration.vae import network

    monkeypatch.setattr(network, "has_kernels", lambda device: True)
    monkeypatch.setattr(network.F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    vae = VideoVAE().to(META)
    network.speed_up(vae, META, torch.bfloat16)
    return vae


def test_no_vae_plan_runs_out_of_memory(fast_vae, fresh_seed):
    chance, seen = random.Random(fresh_seed), 0
    while seen < TRIALS:
        any_size = chance.randrange(256, 2000, 16), chance.randrange(256, 1600, 16)
        width, height = chance.choice(((832, 480), (1280, 704), (3840, 2160), any_size))
        work = VaeWork(height, width, 5 if width > 2000 else chance.choice((1, 5, 21)), chance.random() < 0.6)
        room = Room(round(chance.uniform(2, 9) * 1e9))
        try:
            planned = vae_plan(work, KERNELS, MemoryLimits())(room, Sizes())
        except NoPlanFits:
            continue
        if not planned.plan.holds_pixels:
            continue  # they would lie in main memory, with data
        seen += 1
        fast_vae.parts = VaeParts(planned.plan.tile_px)
        latents = 1, 16, *work.latent_size
        with torch.inference_mode():
            given = torch.empty(latents if work.decodes else (1, 3, work.frames, height, width), device=META)
            with Tensors(META) as tensors:
                (fast_vae.decode if work.decodes else fast_vae.encode)(given)
            events = list(tensors.events)
        card = CardMemory(room.device_bytes)
        try:
            card.replay(events)
        except torch.OutOfMemoryError as error:
            raise AssertionError(f"{error}: {work}, {planned}") from error
        ratio = peak_bytes(replace(work, way=KERNELS, parts=fast_vae.parts)) / card.most_allocated
        assert 0.95 < ratio < 1.05, (ratio, work, planned)
