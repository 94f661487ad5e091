"""3D rotary position embedding for noisy, reference and motion tokens.

Tables are made once per shape in float64 on the CPU and kept as float32 cosines and sines, which kernels read and
compilers know; nothing in a forward pass is float64.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..geometry import MOTION_BUCKETS, PATCH, REFERENCE_TIME

THETA = 10000.0


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, row and column: 44, 42, 42 of 128."""
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side


def segment_positions(start: int, extent: tuple[int, int, int], counts: tuple[int, int, int]) -> np.ndarray:
    """Time, row and column of every token of one segment, in frame, row, column order.

    Args:
        start: first time position; negative for motion, whose times run from `start` towards zero.
        extent: the frames, rows and columns that the segment spans.
        counts: how many tokens it has along each of them.
    Returns:
        L 3, integers as float64. Truncated from float64 steps as in the reference: exact integer division differs
        for a few sizes.
    """
    spans = ((start, start + extent[0] - 1), (0, extent[1] - 1), (0, extent[2] - 1))
    axes = (np.trunc(np.linspace(first, last, count)) for (first, last), count in zip(spans, counts, strict=True))
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)


def packed_motion_positions(rows: int, columns: int) -> np.ndarray:
    """Positions of the packed motion tokens, newest bucket first. `rows` and `columns` count tokens."""
    parts, newest = [], 0
    for level, latent_frames in enumerate(MOTION_BUCKETS):  # level n packs 2^n x 2^n tokens into one
        oldest = newest - latent_frames
        steps = latent_frames >> level
        sides = (PATCH * rows // (PATCH << level), PATCH * columns // (PATCH << level))
        # Two latent frames of the middle bucket become one token at the older of the two.
        parts.append(segment_positions(oldest, (latent_frames, rows, columns), (steps, *sides)))
        newest = oldest
    return np.concatenate(parts)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept tables must serve training as well
def rotary_table(
    head_width: int, latent_frames: int, rows: int, columns: int, motion_latent_frames: int, packs_motion: bool
) -> Tensor:
    """Rotations of all tokens of a clip: noisy, reference, motion (none when `motion_latent_frames` is 0).

    Args:
        rows, columns: size of the token grid, half of the latent size.
    Returns:
        L D/2 2, float32 on the CPU: cosine and sine.
    """
    positions = [
        segment_positions(0, (latent_frames, rows, columns), (latent_frames, rows, columns)),
        segment_positions(REFERENCE_TIME, (1, rows, columns), (1, rows, columns)),
    ]
    if motion_latent_frames and packs_motion:
        positions.append(packed_motion_positions(rows, columns))
    elif motion_latent_frames:
        shape = (motion_latent_frames, rows, columns)
        positions.append(segment_positions(-motion_latent_frames, shape, shape))
    angles = [  # L width/2 for each axis, which has a frequency ladder of its own
        np.concatenate(positions)[:, axis, None] * THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        for axis, width in enumerate(axis_widths(head_width))
    ]
    turns = np.concatenate(angles, axis=1)
    return torch.from_numpy(np.stack([np.cos(turns), np.sin(turns)], axis=-1)).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring channel pairs by `rope`. B L N D, L D/2 2 -> B L N D in the precision of `x`."""
    pairs = x.to(torch.float32, copy=True).unflatten(-1, (-1, 2))
    even, odd, (cosine, sine) = pairs[..., 0], pairs[..., 1], rope[:, None].unbind(-1)
    turned = even * cosine
    turned -= odd * sine
    odd *= cosine  # in place: these float32 copies are the largest tensors of a forward
    odd += even * sine
    even.copy_(turned)
    return pairs.flatten(-2).to(x.dtype)
