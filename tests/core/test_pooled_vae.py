"""The stand-in for the VAE behaves as the VAE where tests lean on it."""

import pytest
import torch
from pooled_vae import COLOURS, pool

from wan_s2v_core.model.vae import VideoVAE


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return VideoVAE(width=8).eval()


@pytest.mark.parametrize("frames", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("keep_frames", [None, 3, 99])
@torch.inference_mode()
def test_shapes_and_types_are_the_vae_s(frames, keep_frames, vae, monkeypatch):
    video = torch.rand(1, 3, frames, 16, 24) * 2 - 1
    latents = vae.encode(video)
    decoded = vae.decode(latents, keep_frames)
    pool(monkeypatch)
    pooled = vae.encode(video)
    again = vae.decode(pooled, keep_frames)
    assert (pooled.shape, pooled.dtype) == (latents.shape, latents.dtype)
    assert (again.shape, again.dtype) == (decoded.shape, decoded.dtype)


def test_every_frame_that_counts_is_seen(vae, monkeypatch):
    pool(monkeypatch)
    video = torch.rand(1, 3, 8, 16, 24) * 2 - 1
    latents = vae.encode(video)
    for frame in range(8):
        changed = video.clone()
        changed[:, 1, frame, 9, 20] *= -1
        differs = (vae.encode(changed) != latents).any(dim=1).nonzero().tolist()
        assert differs == ([] if frame > 4 else [[0, (frame + 3) // 4, 1, 2]]), "frames beyond 4n+1 are ignored"


def test_patches_of_one_colour_come_back(vae, monkeypatch):
    pool(monkeypatch)
    torch.testing.assert_close(COLOURS.T @ COLOURS, torch.eye(3))
    colours = torch.rand(1, 3, 3, 2, 3) * 2 - 1
    video = colours.repeat_interleave(8, 3).repeat_interleave(8, 4).repeat_interleave(4, 2)[:, :, 3:]
    torch.testing.assert_close(vae.decode(vae.encode(video)), video)
