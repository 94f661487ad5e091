"""Small films for a quick look at a clip while the next one is made."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .audio import Recording
from .video import DEFAULT_PRESET, VideoWriter

LONGEST_SIDE_PX = 384
SHORTEST_SIDE_PX = 16


def write_small_film(path: Path, frames: Tensor, fps: float, sound: Recording) -> None:
    """Write T H W 3 uint8 with its sound, its longer side at most 384 px, as every browser plays it.

    Raises:
        ConfigError: if the disk does not take it.
        BackendUnavailable: if PyAV or the encoder is missing.
    """
    small = shrunk(frames.cpu())  # GPUs cannot resize integers
    height, width = small.shape[1:3]
    with VideoWriter(path, width, height, fps, sound, DEFAULT_PRESET) as writer:
        writer.write(small)


def shrunk(frames: Tensor) -> Tensor:
    """T H W 3 uint8 -> the same at most 384 px on its longer side, both sides even; never larger."""
    longest = max(frames.shape[1:3])
    target = min(LONGEST_SIDE_PX, longest)
    size = [max(SHORTEST_SIDE_PX, side * target // longest // 2 * 2) for side in frames.shape[1:3]]
    if size == list(frames.shape[1:3]):
        return frames
    resized = F.interpolate(frames.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)
