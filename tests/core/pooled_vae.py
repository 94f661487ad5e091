"""Pooling in place of the VAE's convolutions, for tests of what happens around them: in a run of the tiny checkpoint
they are seven tenths of the work. Golden cases and one run of each kind keep the real ones."""

import math

import pytest
import torch
from torch import Tensor, nn

from wan_s2v_core.geometry import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT
from wan_s2v_core.model.vae import VideoVAE

COLOURS = math.sqrt(2 / LATENT_CHANNELS) * torch.cos(
    math.pi / LATENT_CHANNELS * (torch.arange(LATENT_CHANNELS) + 0.5)[:, None] * torch.arange(1, 4)
)
"""16 3, orthonormal columns: three colours as sixteen channels, and back."""
SCALE = 4.0
"""Of latents beside pixels, so that both are about as large as the real ones."""


def tell(network: nn.Module) -> None:
    """Call what waits before every layer, as `pipeline.told` has it."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    for layer in (layer for layers in lists for layer in layers):
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())


def encode(vae: VideoVAE, video: Tensor) -> Tensor:
    """As VideoVAE.encode: means over 8x8 pixels, of the first frame and then of four frames each."""
    tell(vae.network)
    video = video.to(vae.device).float()
    frames = (video.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    first, later = video[:, :, :1], video[:, :, 1 : 1 + frames]
    means = torch.cat([first, later.unflatten(2, (-1, FRAMES_PER_LATENT)).mean(3)], dim=2)
    means = means.unflatten(-1, (-1, PIXELS_PER_LATENT)).mean(-1).unflatten(-2, (-1, PIXELS_PER_LATENT)).mean(-2)
    return SCALE * torch.einsum("nc,bcfhw->bnfhw", COLOURS.to(means.device), means)


def decode(vae: VideoVAE, latents: Tensor, keep_frames: int | None = None) -> Tensor:
    """As VideoVAE.decode: each latent is a patch of one colour, for one frame or four."""
    tell(vae.network)
    means = torch.einsum("nc,bnfhw->bcfhw", COLOURS.to(latents.device), latents.float()) / SCALE
    video = means.repeat_interleave(FRAMES_PER_LATENT, dim=2)[:, :, FRAMES_PER_LATENT - 1 :]
    video = video.repeat_interleave(PIXELS_PER_LATENT, dim=3).repeat_interleave(PIXELS_PER_LATENT, dim=4)
    video = video if keep_frames is None else video[:, :, max(0, video.shape[2] - keep_frames) :]
    return video.to("cpu" if vae.parts.is_apart else video.device).clamp(-1, 1)


def pool(patch: pytest.MonkeyPatch) -> None:
    """Let every VAE pool: its network is loaded, placed and planned for as ever."""
    patch.setattr(VideoVAE, "encode", encode)
    patch.setattr(VideoVAE, "decode", decode)
