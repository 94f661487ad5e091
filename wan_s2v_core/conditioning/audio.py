"""Speech features at 50 Hz become one embedding per video frame, cut into clips.

Source: Wan2.2 audio_encoder.py at 42bf4cf (Apache-2.0), rewritten.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_HZ = 30
"""Rate that the reference resamples wav2vec's 50 Hz to before it picks video frames."""


def resample_features(hidden_states: Tensor, rate: int, target_rate: int = FEATURE_HZ) -> Tensor:
    """Linear interpolation over time, ends aligned. A T E at `rate` -> A T E at `target_rate`, at least one."""
    frames = max(1, int(hidden_states.shape[1] / rate * target_rate))
    x = F.interpolate(hidden_states.transpose(1, 2), size=frames, align_corners=True, mode="linear")
    return x.transpose(1, 2)


def clip_count(feature_frames: int, clip_frames: int, fps: float, rate: int = FEATURE_HZ) -> int:
    """Clips that the reference makes. It always rounds up, also past an exact multiple: a silent clip at the end."""
    return int(feature_frames / (clip_frames * rate / fps)) + 1


def frame_indices(feature_frames: int, video_frames: int, fps: float, rate: int = FEATURE_HZ) -> np.ndarray:
    """Which feature frame belongs to each video frame; those at or past `feature_frames` are silence.

    Rounds halves to even on numpy's linspace, as the reference does: the ties matter.
    """
    seconds = video_frames / fps
    padding = math.ceil(seconds * rate) - feature_frames
    times = np.linspace(0, seconds, video_frames, endpoint=False)
    return np.clip(np.round(times * rate).astype(np.int64), 0, feature_frames + padding - 1)


def voice_per_frame(features: Tensor, frames: int, fps: float, lead: int) -> Tensor:
    """One embedding per frame that the clips make, silence before time 0 and past the end.

    Args:
        features: A T E at 30 Hz.
        frames: all frames that the clips make, the `lead` frames before time 0 included.
    Returns:
        1 A E T with T = frames.
    """
    return F.pad(audio_embeddings(features, 1, frames - lead, fps), (lead, 0))


def audio_embeddings(
    features: Tensor, clips: int, clip_frames: int, fps: float, neighbours: int = 0, rate: int = FEATURE_HZ
) -> Tensor:
    """One embedding per video frame for `clips` clips.

    Args:
        features: A T E at `rate`.
        neighbours: feature frames taken along on either side of each, at the distance of about a video frame.
    Returns:
        1 A E(2 neighbours + 1) T with T = clips * clip_frames; zeros past the end of the recording.
    """
    frames = features.shape[1]
    picked = torch.from_numpy(frame_indices(frames, clips * clip_frames, fps, rate)).to(features.device)
    spacing = int(rate / fps)
    offsets = torch.arange(-neighbours, neighbours + 1, device=features.device) * spacing
    windows = (picked[:, None] + offsets).clamp(0, frames - 1)  # T W
    embeddings = features[:, windows].masked_fill((picked >= frames)[None, :, None, None], 0.0)  # A T W E
    return embeddings.flatten(2).transpose(1, 2)[None]
