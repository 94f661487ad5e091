"""A quick look at latents, for pictures of steps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PIXELS_PER_LATENT

RIDGE = 0.01
"""Share of a mean square of 1, as normalised latents have it, that keeps the factors of a plain picture small."""


def colour_factors(picture: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from the latents of a picture to its colours: right for any VAE and for this picture's colours.

    Args:
        picture: 1 3 1 H W in [-1, 1].
        latents: 1 C 1 h w, of the picture.
    Returns:
        Factors 3 C and bias 3, for colours in [-1, 1].
    """
    colours = F.avg_pool2d(picture[:, :, 0].float(), PIXELS_PER_LATENT)[0].flatten(1).T.double().cpu()
    known = latents[0, :, 0].flatten(1).T.double().cpu()
    middle, mean = known.mean(0), colours.mean(0)
    known = known - middle
    square = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
    factors = torch.linalg.solve(square, known.T @ (colours - mean)).T
    return factors.float(), (mean - factors @ middle).float()
