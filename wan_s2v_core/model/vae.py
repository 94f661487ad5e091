"""The Wan 2.1 video VAE, from diffusers, in the latent space of the DiT."""

import torch
from torch import Tensor, nn

from .vae_parts import VaeParts


class VideoVAE(nn.Module):
    """Video to normalised latents and back. Latents are the posterior's mean; no noise is drawn.

    Frames beyond 4n+1 are ignored by `encode`, as in the reference. `network` is the seam: one that computes the same
    in parts (`encode_means` and `decode_frames`), such as `acceleration.vae.network.FastNetwork`, may take its place.
    `parts` then says in which, and may be changed before any call; diffusers' own network computes whole pictures.
    """

    def __init__(self, width: int = 96, latent_channels: int = 16):
        super().__init__()
        from diffusers import AutoencoderKLWan  # slow to import

        self.network = AutoencoderKLWan(base_dim=width, z_dim=latent_channels)
        self.latents_mean = tuple(self.network.config.latents_mean)
        self.latents_std = tuple(self.network.config.latents_std)
        self.parts = VaeParts()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def works_in_parts(self) -> bool:
        """Whether its network does as `parts` says."""
        return hasattr(self.network, "decode_frames")

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def _statistic(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device).view(1, -1, 1, 1, 1)

    def encode(self, video: Tensor) -> Tensor:
        """B 3 T H W in [-1, 1], on the device or in main memory -> B C F h w in float32, on the device."""
        if self.works_in_parts:
            mean = self.network.encode_means(video, self.parts)
        else:
            mean = self.network.encode(video.to(self.device, self.dtype)).latent_dist.mode().float()
        return (mean - self._statistic(self.latents_mean, mean)) * (1 / self._statistic(self.latents_std, mean))

    def decode(self, latents: Tensor, keep_frames: int | None = None) -> Tensor:
        """B C F h w -> B 3 T H W in [-1, 1], float32: the last `keep_frames` of 4(F - 1) + 1, or all, in main memory
        where `parts` says so."""
        latents = latents.float()
        # As the reference rounds: divided by the inverse, not multiplied.
        raw = latents / (1 / self._statistic(self.latents_std, latents)) + self._statistic(self.latents_mean, latents)
        if self.works_in_parts:
            return self.network.decode_frames(raw, self.parts, keep_frames)
        video = self.network.decode(raw.to(self.dtype)).sample
        if keep_frames is not None:
            video = video[:, :, max(0, video.shape[2] - keep_frames) :]
        return video.to("cpu" if self.parts.is_apart else video.device).float().clamp(-1, 1)
