"""The reference picture: read, and fitted to the size of the video."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, shown_path
from ..io.media import LARGEST_AREA_PX
from ..io.pictures import decode_picture

SIDE_LIMITS_PX = (16, 16384)


def read_picture(path: str | Path) -> Tensor:
    """A picture file as H W 3, uint8: upright, in sRGB, transparency on black, grey as RGB, the first of several.

    Raises:
        ConfigError: if it is missing, no picture, or of an unreasonable size.
    """
    return decode_picture(path, lambda height, width: check_sides(height, width, shown_path(path)))


def check_sides(height_px: int, width_px: int, origin: str) -> None:
    """Raises ConfigError for pictures too small to show anything, or too large to be meant."""
    lowest, highest = SIDE_LIMITS_PX
    if not (lowest <= height_px <= highest and lowest <= width_px <= highest):
        raise ConfigError(
            f"{origin} is {width_px}x{height_px} px; sides from {lowest} to {highest} px can be used. "
            "Resize the picture."
        )
    if height_px * width_px > LARGEST_AREA_PX:
        raise ConfigError(
            f"{origin} is {width_px}x{height_px} px, {height_px * width_px / 1e6:.0f} million pixels; up to "
            f"{LARGEST_AREA_PX / 1e6:.0f} million can be used. Resize the picture."
        )


def fit_picture(picture: Tensor, height_px: int, width_px: int, fit: str = "crop") -> Tensor:
    """Bring a picture to the video's size.

    Args:
        picture: H W 3, uint8.
        fit: crop fills the frame and cuts what is over; pad shows all of the picture between black bars; reference
            scales the short side to the frame's short side, then cuts or pads, as the reference does.
    Returns:
        1 3 1 H W in [-1, 1].
    """
    from PIL import Image

    rows, columns = picture.shape[:2]
    if fit == "reference":
        short = min(height_px, width_px)
        scaled = (short, int(short * columns / rows)) if rows <= columns else (int(short * rows / columns), short)
    else:
        ratios = (height_px / rows, width_px / columns)
        scale = max(ratios) if fit == "crop" else min(ratios)
        scaled = (round(rows * scale), round(columns * scale))
    image = Image.fromarray(picture.cpu().numpy())
    filter_ = Image.Resampling.BILINEAR if fit == "reference" else Image.Resampling.LANCZOS
    resized = torch.from_numpy(np.array(image.resize((max(1, scaled[1]), max(1, scaled[0])), filter_)))
    return to_pixels(center_crop(resized, height_px, width_px))[None, :, None]


def center_crop(picture: Tensor, height_px: int, width_px: int) -> Tensor:
    """Cut H W C around its centre to the size; where it is too small, fill with zeros (black)."""
    for dim, size in ((0, height_px), (1, width_px)):
        over = picture.shape[dim] - size
        if over >= 0:
            picture = picture.narrow(dim, round(over / 2), size)
        else:
            shape = list(picture.shape)
            shape[dim] = size
            padded = picture.new_zeros(shape)
            padded.narrow(dim, -over // 2, picture.shape[dim]).copy_(picture)
            picture = padded
    return picture


def to_pixels(picture: Tensor) -> Tensor:
    """H W 3 uint8 -> 3 H W in [-1, 1]."""
    return picture.movedim(-1, -3).float() / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """3 T H W in [-1, 1], on any device -> T H W 3 uint8, rounded, in host memory: they are to be written or shown."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu()
