"""The video VAE over a whole video at once: for training, and for encoding many videos on a card.

diffusers walks through a video four frames at a time and carries the ends of the last ones along. For a network that is
causal this is the same as one pass, but for the resampling in time, which treats the first frame on its own. Here only
that is written anew; the convolutions run as they are, padded with zeros in front.

Our tiny VAE looks at other frames only where it resamples time (`confine_time`). Every latent frame then depends on the
last few ones and on nothing further back, so what short clips teach holds for videos of any length. The convolutions
that see one frame are 2D ones here, a third of the work.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_s2v_core.model.vae import VideoVAE

CAUSAL = "WanCausalConv3d"
RESAMPLE = "WanResample"
GAIN = 1.3 * 3**0.5
"""PyTorch's first weights are small, and two thirds of them are gone."""
BRANCH_GAIN = 0.1
"""Residual branches begin nearly silent: the network starts as its shortcuts and learns several times faster."""


def time_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The convolutions of the network that look back in time, by name."""
    return {name: m for name, m in network.named_modules() if type(m).__name__ == CAUSAL and m.kernel_size[0] > 1}


@torch.no_grad()
def confine_time(network: nn.Module) -> None:
    """Let a fresh Wan VAE look at other frames only where it resamples time; there it begins as mean and repetition.

    The Wan VAE is causal, with zeros in front of a video. All its layers together look back over 250 frames, so in any
    video of ours some of that is zeros: each place in time is a case of its own, and those beyond the length of the
    training clips were never met (colours drift there). With the earlier two thirds of the 3x3x3 kernels zero, and kept
    zero, every latent frame from the sixth on is the same case.
    """
    for name, layer in time_layers(network).items():
        if not name.endswith("time_conv"):
            layer.weight[:, :, :-1] = 0
            layer.weight *= GAIN
            layer.bias.zero_()
            continue
        layer.weight.zero_()
        layer.bias.zero_()
        width = layer.in_channels
        same = torch.eye(width).to(layer.weight)
        if layer.out_channels == width:  # two frames become one
            layer.weight[:, :, -2:, 0, 0] += same[..., None] / 2
        else:  # one becomes two
            layer.weight[:, :, -1, 0, 0] += torch.cat([same, same])
    for layer in network.modules():
        if type(layer).__name__ == "WanResidualBlock":
            layer.conv2.weight *= BRANCH_GAIN
        elif type(layer).__name__ == "WanAttentionBlock":
            layer.proj.weight *= BRANCH_GAIN


def is_confined(weight: Tensor) -> bool:
    """Whether a causal kernel O C T H W sees the present alone."""
    return not weight[:, :, :-1].any()


def convolve_frames(layer: nn.Module, x: Tensor, cache_x=None) -> Tensor:
    """A causal convolution whose kernel is zero but for the frame itself. B C T H W -> B O T H W."""
    frames = x.transpose(1, 2).flatten(0, 1)
    made = F.conv2d(frames, layer.weight[:, :, -1], layer.bias, padding=(layer._padding[2], layer._padding[0]))
    return made.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def convolve_time(layer: nn.Module, x: Tensor, cache_x=None) -> Tensor:
    """A causal convolution that sees one place only. B C T H W -> B O T' H W."""
    before = layer._padding[4]
    padded = F.pad(x.flatten(3), (0, 0, before, 0))
    made = F.conv2d(padded, layer.weight.squeeze(-1), layer.bias, stride=(layer.stride[0], 1))
    return made.unflatten(3, x.shape[3:])


def resample_whole(layer: nn.Module, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    """What AutoencoderKLWan's resampling does to a video, from its first frame on. B C T H W -> B C' T' H' W'."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:])  # sees zeros where the first frame is, as with the cache
        later = (
            later.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2).flatten(1, 2)
        )  # B 2T H W C, two of a frame in a row
        later = later.movedim(-1, 1)
        x = torch.cat([x[:, :, :1], later], dim=2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


class WholeVAE(nn.Module):
    """`vae` without slices: the same parameters, the same results up to rounding, differentiable.

    `vae` itself no longer serves afterwards: its resampling is the one for whole videos. Weights that are loaded later
    must be confined in time (`confine_time`) if those found here are.
    """

    def __init__(self, vae: VideoVAE):
        super().__init__()
        self.vae, self.network = vae, vae.network
        for layer in self.network.modules():
            kind = type(layer).__name__
            if kind == RESAMPLE:
                layer.forward = MethodType(resample_whole, layer)
            elif kind == "WanUpsample":  # the nearest pixel is the same in any precision
                layer.forward = MethodType(nn.Upsample.forward, layer)
            elif kind == CAUSAL and layer.kernel_size[1:] == (1, 1) and layer.kernel_size[0] > 1:
                layer.forward = MethodType(convolve_time, layer)
            elif kind == CAUSAL and is_confined(layer.weight):
                layer.forward = MethodType(convolve_frames, layer)

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
