"""Finds the mouth of a talking head without a model: the place that keeps changing while the rest only moves.

Heads sway, and then each patch of the picture is found again a little aside. A talking mouth is not: it shows teeth
and darkness that were not there an eighth of a second ago. Blinks are rare. The sound is never looked at, so a wrong
voice cannot steer where is measured.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import blurred, grey, scaled

MAP_PX = 128
"""Longer side of the pictures that are searched."""
APART_SECONDS = 0.125
"""Between the two pictures of a comparison: half a syllable."""
EVERY = 2
"""Frames from one comparison to the next; each is slow."""
REACH_PX, PATCH_PX = 2, 7
"""How far a patch may have moved meanwhile, and its side."""
SMALLEST_CHANGE = 0.7
"""Of the map's peak (square root of grey levels); talking heads have 3 to 5."""
SMALLEST_CONTRAST = 1.6
"""Peak over middle of the map; pure noise has 1.0, talking heads 2.5 to 20."""


@dataclass(frozen=True)
class MouthPlace:
    """Where the mouth is, in pixels of the video: its middle and its half width."""

    y: float
    x: float
    half_px: float


class RestlessnessMap:
    """Adds up, picture by picture, how much each patch changes beyond having moved."""

    def __init__(self, fps: float):
        self.past: deque[Tensor] = deque(maxlen=max(1, round(APART_SECONDS * fps)))
        self.total, self.frames, self.pairs, self.side_px = torch.zeros(()), 0, 0, 0

    def add(self, picture: Tensor) -> None:  # picture: 1 3 H W
        self.side_px = max(picture.shape[-2:])
        now = blurred(grey(scaled(picture, MAP_PX / self.side_px)), 1.0)
        if len(self.past) == self.past.maxlen and self.frames % EVERY == 0:
            self.total, self.pairs = self.total + change(self.past[0], now).sqrt(), self.pairs + 1  # root: blinks less
        self.past.append(now)
        self.frames += 1

    def find(self) -> MouthPlace | str:
        """The mouth, or why there is none."""
        if not self.pairs:
            return "the video is too short to find a mouth in"
        smooth = blurred(self.total / self.pairs, 2.0)[0, 0]
        peak, middle = smooth.max().item(), smooth.median().item()
        if peak < SMALLEST_CHANGE:
            return "nothing in the picture changes as a talking mouth does: it is still, or only moves"
        if peak < SMALLEST_CONTRAST * middle:
            return "no mouth is found: all of the picture changes alike, as noise does"
        return _place(smooth, (peak + middle) / 2, self.side_px / MAP_PX)


def change(before: Tensor, now: Tensor) -> Tensor:
    """1 1 H W: the mean difference of each patch from the best match nearby."""
    side = 2 * REACH_PX + 1
    aside = F.unfold(F.pad(now, (REACH_PX,) * 4, mode="replicate"), side).unflatten(-1, now.shape[-2:])  # 1 side² H W
    edge = PATCH_PX // 2
    difference = F.pad((aside - before).abs(), (edge,) * 4, mode="replicate")
    return F.avg_pool2d(difference, PATCH_PX, 1).amin(1, keepdim=True)


def _place(smooth: Tensor, level: float, scale: float) -> MouthPlace:
    """The spot around the peak that lies above `level`."""
    above, spot = (smooth > level).float(), torch.zeros_like(smooth)
    spot.view(-1)[smooth.argmax()] = 1
    grown = spot
    while True:
        spot = grown
        grown = F.max_pool2d(spot[None, None], 3, 1, 1)[0, 0] * above
        if torch.equal(grown, spot):
            break
    rows, columns = spot.nonzero(as_tuple=True)
    weights = smooth[rows, columns] / smooth[rows, columns].sum()
    y, x = ((places * weights).sum().item() for places in (rows, columns))
    half = max(2.0, *((places.max() - places.min() + 1).item() / 2 for places in (rows, columns)))
    half = min(half, MAP_PX / 8)  # a larger spot is no mouth alone
    return MouthPlace((y + 0.5) * scale - 0.5, (x + 0.5) * scale - 0.5, half * scale)
