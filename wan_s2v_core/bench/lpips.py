"""LPIPS with AlexNet, from a weights file of the package of that name.

Source: Zhang et al. 2018, and package lpips 0.1.4 (BSD-2-Clause). The file is what
`torch.save(lpips.LPIPS(net="alex").state_dict(), FILE)` writes. Differs: no package is needed to read it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..io.weights import open_weights

LAYERS = ((1, 0, 4, 2, False), (2, 3, 1, 2, True), (3, 6, 1, 1, True), (4, 8, 1, 1, False), (5, 10, 1, 1, False))
"""Slice and number of each convolution, its stride and padding, and whether pooling comes before it."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_SIDE_PX = 64
"""AlexNet's poolings leave nothing of less."""


def alexnet_lpips(path: Path) -> Callable[[Tensor, Tensor], float]:
    """A distance of two pictures, 1 3 H W, 0 to 255: 0 for equal ones.

    Raises:
        CheckpointError: if the file is no such weights file, or cannot be read without running code.
    """
    weights = open_weights(path)
    names = [f"net.slice{part}.{number}.{kind}" for part, number, *_ in LAYERS for kind in ("weight", "bias")]
    names += [f"lin{index}.model.1.weight" for index in range(len(LAYERS))]
    if missing := [name for name in names if name not in weights.entries]:
        raise CheckpointError(
            f"{path} is no weights file of LPIPS with AlexNet: {missing[0]} is missing. "
            'Write one with torch.save(lpips.LPIPS(net="alex").state_dict(), FILE).'
        )
    tensors = {name: weights.entries[name].read().float() for name in names}

    @torch.inference_mode()
    def distance(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for index, features in enumerate(_features(tensors, torch.cat([a, b]))):
            unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
            apart = (unit[:1] - unit[1:]).square()
            total += F.conv2d(apart, tensors[f"lin{index}.model.1.weight"]).mean().item()
        return total

    return distance


def _features(tensors: dict[str, Tensor], pictures: Tensor) -> list[Tensor]:
    """What AlexNet's five layers see in pictures N 3 H W."""
    shift, scale = (torch.tensor(values)[:, None, None] for values in (SHIFT, SCALE))
    x, seen = (pictures / 127.5 - 1 - shift) / scale, []
    for part, number, stride, padding, pools in LAYERS:
        name = f"net.slice{part}.{number}"
        x = F.max_pool2d(x, 3, 2) if pools else x
        x = F.relu(F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride, padding))
        seen.append(x)
    return seen
