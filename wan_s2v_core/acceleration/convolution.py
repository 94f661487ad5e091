"""Video convolutions as picture convolutions, for CPUs.

PyTorch hands a 3D convolution of one small video to its slowest CPU kernel; a 2D convolution of the same size goes to
oneDNN. Stacking the frames that a kernel sees as channels turns the one into the other, exactly up to rounding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..private_torch import set_convolution


def flat_convolution(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` computes without padding of its own. B C T H W -> B O T' H' W'."""
    steps, stride = layer.kernel_size[0], layer.stride[0]
    windows = x.unfold(2, steps, stride)  # B C T' H W kt
    pictures = windows.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)  # B*T' C*kt H W
    padding = layer.padding[1:]
    flat = F.conv2d(pictures, weight.flatten(1, 2), bias, layer.stride[1:], padding)
    return flat.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def flatten_convolutions(network: nn.Module) -> None:
    """Let every 3D convolution of a network run as a 2D one that neither dilates nor groups, does not pad in time, and
    pads in space with zeros if at all."""
    for layer in network.modules():
        if not isinstance(layer, nn.Conv3d) or layer.dilation != (1, 1, 1) or layer.groups > 1:
            continue
        if not layer.padding[0] and (layer.padding_mode == "zeros" or not any(layer.padding)):
            set_convolution(layer, flat_convolution)
