"""The video VAE over a whole video at once: for training, and for encoding many videos on a card.

diffusers walks through a video four frames at a time and carries the ends of the last ones along. For a network that is
causal this is the same as one pass, but for the resampling in time, which treats the first frame on its own. Here only
that is written anew; the convolutions run as they are, padded with zeros in front.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from wan_s2v_core.model.vae import VideoVAE


def resample_whole(layer: nn.Module, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    """What AutoencoderKLWan's resampling does to a video, from its first frame on. B C T H W -> B C' T' H' W'."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:])  # sees zeros where the first frame is, as with the cache
        later = later.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # B C 2T H W, the two of a frame in a row
        x = torch.cat([x[:, :, :1], later], dim=2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


class WholeVAE(nn.Module):
    """`vae` without slices: the same parameters, the same results up to rounding, differentiable.

    `vae` itself no longer serves afterwards: its resampling is the one for whole videos.
    """

    def __init__(self, vae: VideoVAE):
        super().__init__()
        self.vae, self.network = vae, vae.network
        for layer in self.network.modules():
            if type(layer).__name__ == "WanResample":
                layer.forward = MethodType(resample_whole, layer)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """B 3 4n+1 H W in [-1, 1] -> mean and log variance of the latents, B C n+1 h w, before normalisation."""
        mean, log_variance = self.network.quant_conv(self.network.encoder(video)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def pixels(self, raw: Tensor) -> Tensor:
        """The reverse, not clamped."""
        return self.network.decoder(self.network.post_quant_conv(raw))

    def encode(self, video: Tensor) -> Tensor:
        """As VideoVAE.encode."""
        mean = self.moments(video)[0].float()
        statistic = self.vae._statistic
        return (mean - statistic(self.vae.latents_mean, mean)) / statistic(self.vae.latents_std, mean)

    def decode(self, latents: Tensor) -> Tensor:
        """As VideoVAE.decode."""
        statistic = self.vae._statistic
        raw = latents * statistic(self.vae.latents_std, latents) + statistic(self.vae.latents_mean, latents)
        return self.pixels(raw).float().clamp(-1, 1)


@torch.no_grad()
def fold_statistics(vae: VideoVAE, mean: Tensor, std: Tensor) -> None:
    """Move the latents to the place and scale that the Wan VAE's constants expect. mean, std: C, as measured.

    VideoVAE normalises with the constants M, S of the released VAE. Latents mu of mean m and deviation s become
    (mu - m) S/s + M, which it then takes to mean 0 and deviation 1. Both ends of the latent space are 1x1x1
    convolutions, so this goes into their weights without changing the pictures: rows of the first, columns of the
    second.
    """
    like = vae.network.quant_conv.weight
    ours, wan = (mean.to(like), std.to(like)), (like.new_tensor(vae.latents_mean), like.new_tensor(vae.latents_std))
    channels, gain = len(ours[0]), wan[1] / ours[1]
    into, out = vae.network.quant_conv, vae.network.post_quant_conv
    out.bias += out.weight.flatten(1) @ (ours[0] - wan[0] / gain)
    out.weight /= gain.view(1, -1, 1, 1, 1)
    into.weight[:channels] *= gain.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - ours[0]) * gain + wan[0]
    into.bias[channels:] += 2 * gain.log()  # the log variance that goes with it
