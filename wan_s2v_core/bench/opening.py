"""How far a mouth is open in each frame, from its pictures alone.

An opening mouth runs through one line of pictures: lips part, teeth show, darkness and tongue follow. None of these
alone grows steadily (teeth brighten what the gap darkens), so the frames are put in order along that line: Isomap,
distances between pictures summed over small steps, and its first axis. Source: Tenenbaum, de Silva and Langford 2000.
Which end is open is told by the lower lip and chin, which go down.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .head import CUT_PX, MOUTH_HALF_PX, MOUTH_ROW
from .pictures import blurred, grey

LANDMARKS = 320
"""Frames that span the line; others lie between their nearest ones."""
NEIGHBOURS = 10
STEPS = 6
"""Along the line, for telling which way is down."""
BRIGHTNESS_SAYS = 0.2
"""What a darker mouth counts beside a chin that goes down."""
SMALLEST_SPAN = 0.5
"""Grey levels between the most different mouths; less is the noise of the codec."""
LEFT, RIGHT = CUT_PX // 2 - 16, CUT_PX // 2 + 16
CHIN_TOP = MOUTH_ROW + 6
"""Above it teeth and darkness come and go, which is no movement."""
CHIN_LEFT, CHIN_RIGHT = CUT_PX // 2 - 12, CUT_PX // 2 + 12


class MouthPictures:
    """Keeps the mouth of every frame, small: 1.2 KB a frame; and of some frames the chin."""

    def __init__(self, frames: int):
        self.mouths: list[Tensor] = []
        self.chins: list[Tensor] = []
        self.landmarks = np.unique(np.linspace(0, frames - 1, min(frames, LANDMARKS)).round().astype(int))
        self._wanted = set(self.landmarks.tolist())

    def add(self, cut: Tensor) -> None:  # cut: 3 CUT_PX CUT_PX
        if len(self.mouths) in self._wanted:
            self.chins.append(blurred(grey(cut[None]), 1.2)[0, 0, CHIN_TOP:, CHIN_LEFT:CHIN_RIGHT])
        mouth = cut[:, MOUTH_ROW - MOUTH_HALF_PX : MOUTH_ROW + 14, LEFT:RIGHT]
        self.mouths.append(F.avg_pool2d(mouth, 2).half())

    def opening(self) -> np.ndarray | None:
        """One number per frame, larger for a wider mouth, of no unit; None if the mouth does not change."""
        mouths = torch.stack(self.mouths).flatten(1)  # T P
        marks = mouths[self.landmarks].float()
        near = torch.cdist(marks, marks, p=1) / marks.shape[1]
        if near.max() < SMALLEST_SPAN:
            return None
        line = first_axis(walked(near.numpy()))
        line = line if self._is_opening(line) else -line
        return np.concatenate([_between(part.float(), marks, line) for part in mouths.split(1000)])

    def _is_opening(self, line: np.ndarray) -> bool:
        """Whether what lies below the mouth goes down along the line."""
        groups = [group for group in np.array_split(np.argsort(line), STEPS) if len(group)]
        chins = torch.stack([torch.stack([self.chins[i] for i in group]).mean(0) for group in groups])
        changes, means = chins[1:] - chins[:-1], (chins[1:] + chins[:-1]) / 2
        slopes = torch.gradient(means, dim=1)[0]
        falls = -(changes * slopes).sum() / (slopes.square().sum() * changes.square().sum()).sqrt().clamp(min=1e-6)
        brightness = torch.stack(self.mouths)[self.landmarks].float().mean((1, 2, 3)).numpy()
        together = np.corrcoef(line, brightness)[0, 1] if brightness.std() > 0 else 0.0
        return falls.item() - BRIGHTNESS_SAYS * together > 0


def walked(near: np.ndarray) -> np.ndarray:
    """N N distances -> N N lengths of the shortest walks over nearest neighbours (Floyd and Warshall)."""
    frames = len(near)
    walks = near.astype(np.float64) * 10  # far steps only where nothing else leads
    for row, neighbours in enumerate(np.argsort(near, axis=1)[:, : NEIGHBOURS + 1]):
        walks[row, neighbours] = near[row, neighbours]
    walks = np.minimum(walks, walks.T)
    for stop in range(frames):
        np.minimum(walks, walks[:, stop, None] + walks[None, stop], out=walks)
    return walks


def first_axis(distances: np.ndarray) -> np.ndarray:
    """N N -> N places on a line that keep the distances best (classical multidimensional scaling)."""
    squares = distances**2
    middled = squares - squares.mean(0) - squares.mean(1, keepdims=True) + squares.mean()
    values, vectors = np.linalg.eigh(-middled / 2)
    return vectors[:, -1] * np.sqrt(max(values[-1], 0.0))


def _between(mouths: Tensor, marks: Tensor, line: np.ndarray) -> np.ndarray:
    """Places of mouths among those of the landmarks: weighted means of the three nearest."""
    nearest = (torch.cdist(mouths, marks, p=1) / marks.shape[1]).topk(min(3, len(marks)), largest=False)
    weights = 1 / (nearest.values + 1e-3) ** 2
    places = torch.from_numpy(line)[nearest.indices]
    return ((places * weights).sum(1) / weights.sum(1)).numpy()
