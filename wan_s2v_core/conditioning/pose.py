"""The driving video: pose frames of one clip, ready for the VAE."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from .image import center_crop, to_pixels


def pose_pixels(frames: Tensor, clip_frames: int, height_px: int, width_px: int) -> Tensor:
    """The pose video of one clip.

    Args:
        frames: T H W 3 uint8, the clip's own frames; fewer than `clip_frames` when the driving video has ended.
    Returns:
        1 3 T H W in [-1, 1] with T = clip_frames + 1: the first frame stands twice, because the VAE treats the first
        frame of a video on its own and its latent is dropped. Frames past the end are black, as in the reference.
    """
    missing = clip_frames - len(frames)
    if not len(frames):
        return torch.full((1, 3, clip_frames + 1, height_px, width_px), -1.0)
    rows, columns = frames.shape[1:3]
    scale = max(height_px / rows, width_px / columns)
    size = (max(height_px, round(rows * scale)), max(width_px, round(columns * scale)))
    fitted = torch.full((len(frames) + missing, 3, height_px, width_px), -1.0)
    for frame, place in zip(frames, fitted, strict=False):  # one at a time: large frames in float take much memory
        scaled = F.interpolate(to_pixels(frame)[None], size=size, mode="bilinear", antialias=True)[0]  # 3 H W
        place.copy_(center_crop(scaled.movedim(0, -1), height_px, width_px).movedim(-1, 0))
    video = fitted.movedim(1, 0)[None]
    return torch.cat([video[:, :, :1], video], dim=2)


def frames_at(pictures: Tensor, source_fps: float, fps: float, start_frame: int, frames: int) -> Tensor:
    """Frames of a driving video in memory on our clock: the nearest picture to k / fps, fewer where it has ended.

    Of two that are equally near the later one, always: 24 fps become 16 in even steps.

    Args:
        pictures: T H W 3 at `source_fps`.
    """
    places = [Fraction(source_fps) * k / Fraction(fps) for k in range(start_frame, start_frame + frames)]
    last = len(pictures) - 1
    return pictures[[min(last, math.floor(place + Fraction(1, 2))) for place in places if place < len(pictures)]]
