"""The VAE's norm over channels, for CPUs: their norm along a strided dimension takes a quarter of decoding."""

from torch import Tensor, nn

SMALLEST_NORM = 1e-12
"""As in torch.nn.functional.normalize."""


class ChannelNorm(nn.Module):
    """RMS norm over the channels of B C ..., with the parameters of the layer whose place it takes.

    Squares are added up channel by channel, each pass over contiguous memory. Equal up to rounding.
    """

    def __init__(self, gamma: nn.Parameter, bias: nn.Parameter | float):
        super().__init__()
        self.gamma, self.bias = gamma, bias

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        total = values[:, :1].square()
        for channel in range(1, values.shape[1]):
            one = values[:, channel : channel + 1]
            total.addcmul_(one, one)
        gain = total.sqrt_().clamp_(min=SMALLEST_NORM).reciprocal_().mul_(values.shape[1] ** 0.5)
        return ((values * gain).to(x.dtype) * self.gamma) + self.bias


def swap_channel_norms(network: nn.Module) -> None:
    """Give a Wan VAE norms that are fast on CPUs, before or after it has weights."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for name, layer in list(network.named_modules()):
        if isinstance(layer, WanRMS_norm) and layer.channel_first:
            network.set_submodule(name, ChannelNorm(layer.gamma, layer.bias))
