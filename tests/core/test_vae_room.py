"""The room that the VAE needs: predicted from its layers, and counted tensor by tensor; tiles that fit a budget."""

import random
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes

from wan_s2v_core.acceleration.vae import network, places
from wan_s2v_core.acceleration.vae.network import speed_up
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.config import MemoryLimits, OffloadPlan
from wan_s2v_core.errors import OutOfMemory
from wan_s2v_core.memory.budget import MARGIN_BYTES, MARGIN_SHARE, Room, Sizes, vae_bytes, vae_plan
from wan_s2v_core.memory.vae_room import (
    KERNELS,
    LIBRARY_16,
    LIBRARY_32,
    VaeWay,
    VaeWork,
    decoder_layers,
    encoder_layers,
    peak_bytes,
)
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.model.vae_parts import VaeParts

CPU = torch.device("cpu")
WIDTH = 8
WAYS = {torch.float32: VaeWay(4, False, copies=True, width=WIDTH), torch.bfloat16: VaeWay(2, False, width=WIDTH)}
"""PyTorch on CPUs turns the results of convolutions in time in float32 alone."""
GB = 10**9


def fast_vae(seed: int, dtype: torch.dtype) -> VideoVAE:
    vae = VideoVAE(WIDTH)
    fill_random(vae, seed)
    speed_up(vae, CPU, dtype)
    return vae


def random_work(choice: random.Random, dtype: torch.dtype, is_apart: bool) -> tuple[VaeWork, VaeWork]:
    """A video of a random size to encode, not of whole latents, and its latents to decode."""
    height, width = choice.randint(16, 110), choice.randint(16, 110)
    frames = choice.choice([1, 5, 9, 13])
    tile_px = choice.choice([None, None, 32, 56])
    way, parts = WAYS[dtype], VaeParts(tile_px, is_apart)
    whole = height // 8 * 8, width // 8 * 8
    keep = choice.choice([None, max(1, frames - 3)])
    encoding = VaeWork(height, width, frames, False, None, way, parts)
    return encoding, VaeWork(*whole, frames, True, keep, way, parts)


def counted(vae: VideoVAE, work: VaeWork, cap: int | None = None) -> tuple[int, torch.Tensor]:
    """Peak bytes of the work as done, and its result."""
    vae.parts = work.parts
    h, w = work.height_px, work.width_px
    given = torch.randn(1, 16, work.latent_size[0], h // 8, w // 8) if work.decodes else torch.rand(
        1, 3, work.frames, h, w
    )  # fmt: skip
    with torch.inference_mode(), LiveBytes(cap) as live:
        result = vae.decode(given, work.keep_frames) if work.decodes else vae.encode(given)
    return live.peak, result


@pytest.mark.parametrize("dtype", WAYS, ids=str)
def test_the_peak_is_predicted(dtype, fresh_seed):
    """Within 10 %, for random sizes, frames and tiles, of what all tensors that are alive at once take."""
    torch.manual_seed(fresh_seed)
    choice, vae = random.Random(fresh_seed), fast_vae(fresh_seed, dtype)
    for _ in range(5):
        for work in random_work(choice, dtype, False):
            peak, _ = counted(vae, work)
            assert peak_bytes(work) == pytest.approx(peak, rel=0.1), work


def test_the_peak_with_videos_in_main_memory(fresh_seed, monkeypatch):
    """On a simulated card: what a canvas holds lies elsewhere, and what is brought from there is a copy."""
    torch.manual_seed(fresh_seed)
    choice, vae = random.Random(fresh_seed), fast_vae(fresh_seed, torch.float32)
    begin, current = places.Canvas.begin, []

    def begin_elsewhere(self, shape, dtype):
        with current[0].paused():
            begin(self, shape, dtype)

    monkeypatch.setattr(places.Canvas, "begin", begin_elsewhere)
    monkeypatch.setattr(network, "bring", lambda part, device: part.clone())
    for _ in range(3):
        for work in random_work(choice, torch.float32, True):
            vae.parts = work.parts
            sides = work.height_px, work.width_px
            given = torch.rand(1, 3, work.frames, *sides)
            if work.decodes:
                given = torch.randn(1, 16, work.latent_size[0], *(side // 8 for side in sides))
            with torch.inference_mode(), LiveBytes() as live:
                current[:] = [live]
                vae.decode(given, work.keep_frames) if work.decodes else vae.encode(given)
            assert peak_bytes(work) == pytest.approx(live.peak, rel=0.1), work


def test_layers_are_those_of_the_network():
    """Parameters of the convolutions that the prediction walks through, against the network's."""
    vae = VideoVAE(WIDTH)

    def weights(layers):
        for layer in layers:
            a, b = layer.inputs, layer.outputs
            yield {
                "first": 27 * a * b,
                "last": 27 * a * b,
                "show": 27 * a * b,
                "block": 27 * b * (a + b) + (a * b if a != b else 0),
                "attention": 4 * a * a,
                "enlarge": 9 * a * b,
                "shrink": 9 * a * b,
                "double": 3 * a * 2 * b,
                "halve": 3 * a * b,
            }[layer.kind]

    for own, made in ((vae.network.encoder, encoder_layers), (vae.network.decoder, decoder_layers)):
        wanted = sum(p.numel() for n, p in own.named_parameters() if n.endswith("weight"))
        assert sum(sum(weights(layers)) for layers in made(WIDTH, 16)) == wanted


def test_memory_in_main_memory_does_not_grow_with_frames():
    for decodes in (False, True):
        short, long = (
            peak_bytes(VaeWork(704, 1280, frames, decodes, None, KERNELS, VaeParts(256, True))) for frames in (81, 801)
        )
        latents = 720 // 4 * 16 * 4 * 88 * 160 * (3 if decodes else 8)
        assert short <= long < short + latents, "but for latents"


def test_what_was_measured_on_a_card():
    """81 frames of 1280x704 with kernels of our own, whole: about 9 kB a pixel on an H200."""
    assert peak_bytes(VaeWork(704, 1280, 81, True)) / (704 * 1280) == pytest.approx(9000, rel=0.1)
    assert sum(vae_bytes(VaeWork(704, 1280, 81, True, parts=VaeParts(256, True)))) < 4 * GB


def choose(work: VaeWork, budget: int) -> OffloadPlan:
    """The plan for work in so many bytes."""
    room = Room(round((budget + MARGIN_BYTES) / (1 - MARGIN_SHARE)))
    return vae_plan(work, work.way, MemoryLimits())(room, Sizes()).plan


@pytest.mark.parametrize("way", [KERNELS, LIBRARY_16, LIBRARY_32], ids=["kernels", "library 16", "library 32"])
@pytest.mark.parametrize("decodes", [False, True])
def test_tiles_fit_their_budget(way, decodes, fresh_seed):
    """Whole pictures where they do; a budget that is too small is told with numbers."""
    choice = random.Random(fresh_seed)
    work = VaeWork(
        choice.randint(40, 130) * 16, choice.randint(40, 240) * 16, 77, decodes, None, way, VaeParts(None, True)
    )
    fitted = 0
    for budget in (300 * GB, 16 * GB, 8 * GB, 5 * GB):
        try:
            plan = choose(work, budget)
        except OutOfMemory:
            continue
        fitted += 1
        assert sum(vae_bytes(replace(work, parts=VaeParts(plan.tile_px, not plan.holds_pixels)))) <= budget
        assert budget < 300 * GB or plan == OffloadPlan(), "whole pictures where there is room"
    assert fitted
    with pytest.raises(OutOfMemory, match=r"needs .* GB in its tightest form, 0.3 GB are free"):
        choose(work, GB // 10)


def test_chosen_tiles_run_where_the_whole_does_not(fresh_seed):
    """A simulated card that runs out of memory at the whole picture decodes the same in the tiles that are chosen."""
    torch.manual_seed(fresh_seed)
    vae, way = fast_vae(fresh_seed, torch.float32), WAYS[torch.float32]
    latents = torch.randn(1, 16, 2, 10, 48)
    work = VaeWork(80, 384, 5, True, None, way)
    with torch.inference_mode():
        whole = vae.decode(latents)
        cap = round(0.8 * peak_bytes(work))
        with pytest.raises(torch.OutOfMemoryError, match="simulated card"), LiveBytes(cap):
            vae.decode(latents)
        plan = choose(work, cap + way.margin(cap))
        assert plan.tile_px and plan.tile_px % 8 == 0
        vae.parts = VaeParts(plan.tile_px, not plan.holds_pixels)
        with LiveBytes(cap) as live:
            tiled = vae.decode(latents)
    assert cap / 4 < live.peak <= cap
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)


def test_live_bytes_counts_storages():
    """Views and in-place ops add nothing; what is freed is gone; what was there before and what lies elsewhere too."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        made = torch.zeros(1000)
        view = made.view(10, 100)[3]
        made.add_(1), before.add_(1), before.view(10, 100)
        assert live.now == live.peak == 4000 and live.allocations == 1
        del made
        assert live.now == 4000, "the view holds it"
        del view
        assert live.now == 0 and live.frees == 1
        total = torch.randn(100) + torch.randn(100)
        assert live.now == 400 and live.peak == 4000 and live.freed_bytes == 4800
        total.resize_(300)
        assert live.now == 1200
        with live.paused():
            elsewhere = torch.zeros(5000)
        assert live.now == 1200 and elsewhere.view(50, 100).shape == (50, 100)
        del total, elsewhere
    assert live.now == 0
    with pytest.raises(torch.OutOfMemoryError, match="simulated card"), LiveBytes(cap=1000) as live:
        torch.zeros(100), torch.zeros(251)
    assert live.now == 0 and live.peak == 1404
