"""Small operations on pictures that the measures share. Pictures are float32, 0 to 255, N C H W."""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in BT.601 brightness."""


def planes(picture: Tensor) -> Tensor:
    """H W 3 uint8 -> 1 3 H W float32."""
    return picture.movedim(-1, 0)[None].float()


def grey(pictures: Tensor) -> Tensor:
    """N 3 H W -> N 1 H W."""
    weights = pictures.new_tensor(LUMA)[:, None, None]
    return (pictures * weights).sum(1, keepdim=True)


def scaled(pictures: Tensor, factor: float) -> Tensor:
    """Sides times `factor`; smaller pictures are means over areas, so that nothing aliases."""
    size = tuple(max(1, round(side * factor)) for side in pictures.shape[-2:])
    if size == tuple(pictures.shape[-2:]):
        return pictures
    if factor < 1:
        return F.interpolate(pictures, size, mode="area")
    return F.interpolate(pictures, size, mode="bilinear", align_corners=False)


def blurred(pictures: Tensor, sigma_px: float) -> Tensor:
    """N 1 H W through a Gaussian, the edges held."""
    reach = max(1, round(3 * sigma_px))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_px) ** 2)
    kernel = kernel / kernel.sum()
    across = F.conv2d(F.pad(pictures, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None, :])
    return F.conv2d(F.pad(across, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
