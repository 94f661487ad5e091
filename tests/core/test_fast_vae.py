"""The fast VAE: the same numbers as the plain one, whole, in tiles and in steps, and its kernels on an interpreter."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_s2v_core.acceleration.vae import network
from wan_s2v_core.acceleration.vae.network import FastNetwork, picture_tiles, speed_up
from wan_s2v_core.acceleration.vae.packing import spread_taps, up_taps
from wan_s2v_core.acceleration.vae.streams import LibraryStream
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.config import AccelerationPlan
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.memory.vae_room import LIBRARY_32, PLAIN
from wan_s2v_core.model import vae_parts
from wan_s2v_core.model.checkpoint import VAE
from wan_s2v_core.model.loading import load_vae
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.model.vae_parts import VaeParts, tiles
from wan_s2v_core.prepare import LoadPlan

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROUNDING = 1e-4
"""Of values of order one, after some 60 layers in float32."""


def random_vae(seed: int) -> VideoVAE:
    vae = VideoVAE(width=8)
    fill_random(vae, seed)
    return vae


def fast_copy(vae: VideoVAE, dtype=torch.bfloat16, **parts) -> VideoVAE:
    fast = copy.deepcopy(vae)
    speed_up(fast, CPU, dtype)
    fast.parts = VaeParts(**parts)
    return fast


def assert_same(fast: VideoVAE, plain: VideoVAE, video: torch.Tensor) -> None:
    with torch.inference_mode():
        latents = plain.encode(video)
        shown = plain.decode(latents)
        torch.testing.assert_close(fast.encode(video), latents, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(fast.decode(latents), shown, atol=ROUNDING, rtol=0)
    assert latents.std() > 0.05 and shown.std() > 0.01, "no constant picture"


@pytest.mark.parametrize("size", [(1, 1, 8, 16), (2, 10, 51, 37), (1, 17, 24, 40)], ids=str)
def test_a_whole_picture_is_the_same(size, fresh_seed):
    """Any number of frames, batch and size; what is not a multiple of 8 is cut off in the same way."""
    torch.manual_seed(fresh_seed)
    batch, frames, height, width = size
    plain = random_vae(fresh_seed)
    video = torch.rand(batch, 3, frames, height, width) * 2 - 1
    assert_same(fast_copy(plain, dtype=torch.float32), plain, video)


@pytest.mark.parametrize("size", [(5, 24, 188), (1, 201, 139)], ids=str)
def test_tiles_are_the_same(size, fresh_seed):
    """Inner tiles have neighbours all around. The attention sees the whole picture, so nothing differs."""
    torch.manual_seed(fresh_seed)
    plain = random_vae(fresh_seed)
    video = torch.rand(1, 3, *size) * 2 - 1
    fast = fast_copy(plain, dtype=torch.float32, tile_px=64)
    assert len(list(picture_tiles(size[1] // 8, size[2] // 8, fast.parts.tile, 1))) >= 3
    assert_same(fast, plain, video)


def tiled_differences(fast: VideoVAE, h: int, w: int, tile: int) -> tuple[float, float, float]:
    """Decoded in tiles against whole: mean difference beside the borders of tiles, elsewhere, and the largest."""
    latents = torch.randn(1, 16, 1, h, w)
    with torch.inference_mode():
        fast.parts = VaeParts()
        whole = fast.decode(latents)
        fast.parts = VaeParts(tile_px=8 * tile)
        difference = (fast.decode(latents) - whole).abs()
    beside = torch.zeros(8 * h, 8 * w, dtype=torch.bool)
    for rows, columns in picture_tiles(h, w, tile, 0):
        top, left = 8 * rows[1].start, 8 * columns[1].start
        if top:
            beside[top - 8 : top + 8] = True
        if left:
            beside[:, left - 8 : left + 8] = True
    assert 0.05 < beside.float().mean() < 0.95
    return difference[..., beside].mean().item(), difference[..., ~beside].mean().item(), difference.max().item()


def test_tiles_leave_no_seam(fresh_seed, monkeypatch):
    """The tiles that 3840x2160 is cut into (three rows, four columns), at a tenth of the size. With less around them
    than layers see, there is one."""
    torch.manual_seed(fresh_seed)
    fast = fast_copy(random_vae(fresh_seed), dtype=torch.float32)
    beside, elsewhere, most = tiled_differences(fast, 27, 48, 12)
    assert most < ROUNDING and beside < 1.5 * elsewhere + 1e-7
    monkeypatch.setattr(network, "DECODER_REACH", 2)
    beside, elsewhere, _ = tiled_differences(fast, 27, 48, 12)
    assert beside > 3 * elsewhere + 1e-6


@pytest.mark.parametrize("parts", [{}, {"tile_px": 32, "is_apart": True}], ids=str)
def test_frames_that_are_dropped(parts, fresh_seed):
    """The last ones are the same, bit for bit, and no more are stored; tiles and places may change between calls."""
    torch.manual_seed(fresh_seed)
    fast = fast_copy(random_vae(fresh_seed), dtype=torch.float32)
    latents = torch.randn(2, 16, 3, 5, 6)
    with torch.inference_mode():
        fast.parts = VaeParts(**parts)
        video = fast.decode(latents)
        for keep in (1, 4, 8, 9, 50):
            found = fast.decode(latents, keep)
            assert torch.equal(found, video[:, :, -keep:]) and found.untyped_storage().nbytes() == found.numel() * 4


def test_the_plain_network_keeps_frames_too(fresh_seed):
    torch.manual_seed(fresh_seed)
    plain, latents = random_vae(fresh_seed), torch.randn(1, 16, 2, 3, 4)
    assert not plain.works_in_parts
    with torch.inference_mode():
        video = plain.decode(latents)
        assert torch.equal(plain.decode(latents, 3), video[:, :, -3:]) and torch.equal(plain.decode(latents, 9), video)
        plain.parts = VaeParts(tile_px=8, is_apart=True)
        assert torch.equal(plain.decode(latents), video), "it computes whole pictures"


def test_reach_is_what_layers_see(fresh_seed):
    """By gradients: the features that eight pixels are made of, and the pixels that a latent is made of."""
    torch.manual_seed(fresh_seed)
    fast = fast_copy(random_vae(fresh_seed), dtype=torch.float32).network
    place = 12
    features = torch.randn(1, 1, 25, 32, requires_grad=True)
    shown = fast.decoder_local(features, LibraryStream())  # C T H W
    shown[:, :, :, 8 * place : 8 * place + 8].mul(torch.randn(3, 1, 8, 8)).sum().backward()
    seen = features.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert (seen.min(), seen.max()) == (place - network.DECODER_REACH, place + network.DECODER_REACH)
    video = torch.randn(1, 8, 200, 3, requires_grad=True)
    latents = fast.encoder_local(video, LibraryStream())  # F h w C
    latents[:, :, place].mul(torch.randn(32)).sum().backward()
    seen = video.grad.abs().sum((0, 1, 3)).nonzero().flatten() // 8
    assert (seen.min(), seen.max()) == (place - network.ENCODER_REACH + 1, place + network.ENCODER_REACH)


def test_steps_of_any_length_are_the_same(fresh_seed, monkeypatch):
    """Causal layers remember: frames may come a few at a time."""
    torch.manual_seed(fresh_seed)
    for name, step in (("ENCODER_STEP", 12), ("DECODER_STEP", 6)):
        monkeypatch.setattr(network, name, step)
    monkeypatch.setattr(vae_parts, "LATENT_STEP", 2)
    plain = random_vae(fresh_seed)
    assert_same(fast_copy(plain, dtype=torch.float32), plain, torch.rand(1, 3, 21, 16, 24) * 2 - 1)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_bfloat16_is_as_near_as_plain_bfloat16(fresh_seed):
    torch.manual_seed(fresh_seed)
    plain = random_vae(fresh_seed)
    low = copy.deepcopy(plain)
    low.network.bfloat16()
    fast = fast_copy(plain, dtype=torch.bfloat16)
    video = torch.rand(1, 3, 9, 48, 64) * 2 - 1
    with torch.inference_mode():
        latents = plain.encode(video)
        shown = plain.decode(latents)
        assert 0 < relative(fast.encode(video), latents) < 1.5 * relative(low.encode(video), latents)
        assert 0 < relative(fast.decode(latents), shown) < 1.5 * relative(low.decode(latents), shown)


def test_pictures_of_the_embedded_vae_stay(fresh_seed):
    """bfloat16 against float32 on a face: over 50 dB."""
    from PIL import Image

    plain = load_vae(ROOT / "assets" / "checkpoint")
    picture = Image.open(ROOT / "assets" / "portrait.png").convert("RGB").resize((128, 128))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(128, 128, 3).permute(2, 0, 1)
    video = torch.stack([pixels.roll(3 * t, 1) for t in range(5)], 1)[None] / 127.5 - 1
    fast = fast_copy(plain)
    with torch.inference_mode():
        shown = plain.decode(plain.encode(video))
        error = (fast.decode(fast.encode(video)) - shown).square().mean()
        exact, tiled = (fast_copy(plain, dtype=torch.float32, **parts) for parts in ({}, {"tile_px": 40}))
        for found in (exact, tiled):
            torch.testing.assert_close(found.decode(found.encode(video)), shown, atol=ROUNDING, rtol=0)
    assert 50 < 10 * torch.log10(4 / error) < 90
    assert 10 * torch.log10(4 / (shown - video).square().mean()) > 20, "it shows the face"


def test_every_card_can_work_in_parts(fresh_seed):
    """In float32 as well; CPUs keep diffusers' network."""
    for device, is_fast in (("cuda", True), ("cpu", False)):
        plan = AccelerationPlan(vae="float32")
        loading = LoadPlan("bfloat16", device, acceleration=plan)
        vae = random_vae(fresh_seed)
        loading.finish(VAE, vae)
        assert vae.works_in_parts == is_fast and loading.vae_way == (LIBRARY_32 if is_fast else PLAIN)
        if is_fast:
            assert vae.network.compute_dtype == torch.float32 and vae.network.kind is LibraryStream


def test_the_plain_network_can_go(fresh_seed):
    """The fast one holds all weights, in its own precision, and moves and casts nothing of the plain one."""
    vae = random_vae(fresh_seed)
    before = sum(parameter.numel() for parameter in vae.parameters())
    speed_up(vae, CPU)
    assert isinstance(vae.network, FastNetwork) and vae.network.kind is LibraryStream
    assert vae.dtype == torch.float32 and not any(parameter.requires_grad for parameter in vae.parameters())
    kept = sum(parameter.numel() for parameter in vae.parameters())
    assert kept == before
    moved = vae.to("meta")
    assert all(parameter.is_meta for parameter in moved.parameters())


@pytest.mark.parametrize("side", [0, 4, 100, -8])
def test_tiles_of_other_sides_are_told(side):
    with pytest.raises(ConfigError, match=f"tile_px={side} .* multiple of 8"):
        VaeParts(tile_px=side)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 60), size=st.one_of(st.none(), st.integers(1, 30)), reach=st.integers(0, 9))
def test_tiles_cover_each_pixel_once(length, size, reach):
    parts = tiles(length, size, reach)
    assert [i for _, alone in parts for i in range(alone.start, alone.stop)] == list(range(length))
    for around, alone in parts:
        assert alone.stop - alone.start <= (size or length)
        assert around.start in (0, alone.start - reach) and around.stop in (length, alone.stop + reach)
        assert 0 <= around.start <= alone.start < alone.stop <= around.stop <= length


def test_taps_of_an_enlarged_picture(fresh_seed):
    """Four convolutions over a picture give the pixels of one over the picture of twice the size."""
    torch.manual_seed(fresh_seed)
    weight, x = torch.randn(5, 4, 1, 3, 3), torch.randn(1, 4, 1, 6, 7)
    wanted = F.conv3d(x.repeat_interleave(2, 3).repeat_interleave(2, 4), weight, padding=(0, 1, 1))
    for i, taps in enumerate(up_taps(weight).split(5)):
        down, right = divmod(i, 2)
        found = F.conv3d(F.pad(x, (1 - right, right, 1 - down, down)), taps)
        torch.testing.assert_close(found, wanted[..., down::2, right::2], atol=1e-4, rtol=0)


def test_taps_as_channels(fresh_seed):
    torch.manual_seed(fresh_seed)
    weight, x = torch.randn(3, 4, 3, 3, 3), torch.randn(1, 4, 5, 6, 7)
    spread = F.pad(F.conv3d(x, spread_taps(weight)), (1, 1, 1, 1)).unflatten(1, (9, 3))
    found = sum(spread[:, tap, :, :, tap // 3 :, tap % 3 :][..., :6, :7] for tap in range(9))
    torch.testing.assert_close(found, F.conv3d(x, weight, padding=(0, 1, 1)), atol=1e-4, rtol=0)
