"""The Wan 2.1 video VAE, from diffusers, in the latent space of the DiT."""

import torch
from torch import Tensor, nn


class VideoVAE(nn.Module):
    """Video to normalised latents and back. Latents are the posterior's mean; no noise is drawn.

    Frames beyond 4n+1 are ignored by `encode`, as in the reference. `network` is the seam: one that encodes and decodes
    in the same way, such as `acceleration.vae.network.FastNetwork`, may take its place.
    """

    def __init__(self, width: int = 96, latent_channels: int = 16):
        super().__init__()
        from diffusers import AutoencoderKLWan  # slow to import

        self.network = AutoencoderKLWan(base_dim=width, z_dim=latent_channels)
        self.latents_mean = tuple(self.network.config.latents_mean)
        self.latents_std = tuple(self.network.config.latents_std)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def _statistic(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device).view(1, -1, 1, 1, 1)

    def encode(self, video: Tensor) -> Tensor:
        """B 3 T H W in [-1, 1] -> B C F h w in float32."""
        mean = self.network.encode(video.to(self.dtype)).latent_dist.mode().float()
        return (mean - self._statistic(self.latents_mean, mean)) * (1 / self._statistic(self.latents_std, mean))

    def decode(self, latents: Tensor) -> Tensor:
        """B C F h w -> B 3 T H W in [-1, 1], float32, T = 4(F - 1) + 1."""
        latents = latents.float()
        # As the reference rounds: divided by the inverse, not multiplied.
        raw = latents / (1 / self._statistic(self.latents_std, latents)) + self._statistic(self.latents_mean, latents)
        return self.network.decode(raw.to(self.dtype)).sample.float().clamp(-1, 1)
