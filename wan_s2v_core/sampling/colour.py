"""Clips with the colours of the reference picture, so that they do not drift away from it over a long video."""

import torch
from torch import Tensor

FLAT = 1 / 255
"""Deviation, of a range of 2, below which a channel has no contrast that could be stretched."""
LARGEST_GAIN = 2.0
"""By which contrast is changed at most, either way: beyond it, noise would be stretched to colour."""


def channel_statistics(video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over all pictures: B C T H W -> twice B C 1 1 1."""
    deviation, mean = torch.std_mean(video.float(), dim=(2, 3, 4), correction=0, keepdim=True)
    return mean, deviation


def match_colours(video: Tensor, picture: Tensor, strength: float) -> Tensor:
    """Give each channel of a clip the mean and deviation that it has in the picture.

    One affine change for the whole clip, on sRGB values as they are: their steps look even, and drift is such a change
    of brightness, contrast and tint. A channel that is flat on either side only gets the mean.

    Args:
        video: B 3 T H W in [-1, 1].
        picture: B 3 1 H W in [-1, 1].
        strength: 0 leaves the clip as it is, bit for bit; 1 is all of the change.
    Source: Reinhard et al. 2001, Color Transfer between Images. Differs: in sRGB, with bounded gain.
    """
    if not strength:
        return video
    mean, deviation = channel_statistics(video)
    wanted_mean, wanted_deviation = channel_statistics(picture)
    gain = (wanted_deviation / deviation.clamp(min=FLAT)).clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
    gain = gain.where((deviation >= FLAT) & (wanted_deviation >= FLAT), 1.0)
    matched = (video - mean) * gain + wanted_mean
    return torch.lerp(video.float(), matched, strength).clamp(-1, 1).to(video.dtype)
