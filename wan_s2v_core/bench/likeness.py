"""How alike two videos are: PSNR, SSIM and, with weights, LPIPS."""

import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.video import frames_of
from .pictures import grey, planes

BEST_PSNR = 100.0
"""dB that equal videos are given; PSNR has no bound."""
SSIM_SIDE, SSIM_SIGMA = 11, 1.5
Distance = Callable[[Tensor, Tensor], float]


def likeness(path: Path, other: Path, distance: Distance | None = None) -> dict[str, float] | str:
    """`psnr` of all pixels, means over frames of `ssim` and (with a `distance`) `lpips`; or why they have none."""
    squares = pixels = ssims = distances = 0.0
    frames = 0
    for first, second in zip_longest(frames_of(path), frames_of(other)):
        if first is None or second is None:
            return f"the videos differ in their number of frames; both have the first {frames}"
        a, b = planes(first[0]), planes(second[0])
        if a.shape != b.shape:
            sizes = " and ".join(f"{side.shape[-1]}x{side.shape[-2]}" for side in (a, b))
            return f"the videos differ in size: {sizes} px"
        frames += 1
        squares += (a - b).square().sum(dtype=torch.float64).item()
        pixels += a.numel()
        ssims += ssim(a, b)
        distances += distance(a, b) if distance else 0.0
    measured = {"psnr": psnr(squares / pixels), "ssim": ssims / frames}
    return measured | ({"lpips": distances / frames} if distance else {})


def psnr(mean_square: float) -> float:
    """dB for 8-bit pictures, BEST_PSNR at most."""
    return min(BEST_PSNR, 10 * math.log10(255**2 / mean_square)) if mean_square > 0 else BEST_PSNR


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of the brightness of two pictures, 1 3 H W. Source: Wang et al. 2004."""
    side = min(SSIM_SIDE, *a.shape[-2:])
    line = torch.exp(-0.5 * ((torch.arange(side) - (side - 1) / 2) / SSIM_SIGMA) ** 2)
    line = line / line.sum()

    def local(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line[None, None, None, :]), line[None, None, :, None])

    a, b = grey(a), grey(b)
    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    both = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return alike.mean().item()
