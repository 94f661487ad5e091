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
    frames = resampled_length(hidden_states.shape[1], rate, target_rate)
    x = F.interpolate(hidden_states.transpose(1, 2), size=frames, align_corners=True, mode="linear")
    return x.transpose(1, 2)


def resampled_length(frames: int, rate: int, target_rate: int = FEATURE_HZ) -> int:
    return max(1, int(frames / rate * target_rate))


class Resampling:
    """`resample_features` of a recording of `frames` frames, in stretches: equal but for the last bit.

    Places and weights are in float32, as in torch's interpolation.
    """

    def __init__(self, frames: int, rate: int, target_rate: int = FEATURE_HZ):
        count = resampled_length(frames, rate, target_rate)
        scale = torch.tensor(float(frames - 1)) / torch.tensor(float(max(1, count - 1)))
        places = torch.arange(count, dtype=torch.float32) * scale
        self.frames, self.before = frames, places.long().clamp(max=frames - 1)
        self.weight = (places - self.before).clamp(0, 1)

    def __len__(self) -> int:
        return len(self.before)

    def fill(self, features: Tensor, first: int, states: Tensor) -> None:
        """Write the part of `features` that lies between two frames of a stretch.

        Args:
            features: T E at the target rate, of the whole recording.
            first: frame of the recording that `states` begins with, the last one of the stretch before.
            states: T E of one stretch.
        """
        last = first + len(states) - 1
        start, stop = torch.searchsorted(self.before, torch.tensor([first, last])).tolist()
        stop = len(self) if last == self.frames - 1 else stop
        before = (self.before[start:stop] - first).to(states.device)
        after, weight = (before + 1).clamp(max=len(states) - 1), self.weight[start:stop, None].to(states.device)
        features[start:stop] = states[before] * (1 - weight) + states[after] * weight


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


def voice_per_frame(
    features: Tensor, frames: int, fps: float, lead: int, first: int = 0, end: int | None = None
) -> Tensor:
    """One embedding per frame that the clips make, silence before time 0 and past the end.

    Args:
        features: A T E at 30 Hz.
        frames: all frames that the clips make, the `lead` frames before time 0 included.
        first, end: of these, the ones that are wanted; all by default.
    Returns:
        1 A E T with T = end - first.
    """
    end = frames if end is None else end
    picked = frame_indices(features.shape[1], frames - lead, fps)[max(0, first - lead) : max(0, end - lead)]
    return F.pad(embeddings_at(features, picked, [0]), (max(0, min(end, lead) - first), 0))


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
    picked = frame_indices(features.shape[1], clips * clip_frames, fps, rate)
    spacing = int(rate / fps)
    return embeddings_at(features, picked, [spacing * step for step in range(-neighbours, neighbours + 1)])


def embeddings_at(features: Tensor, picked: np.ndarray, offsets: list[int]) -> Tensor:
    """Features A T E at some places and at `offsets` from each: 1 A E(offsets) T; zeros for places past the end."""
    frames, device = features.shape[1], features.device
    places = torch.from_numpy(picked).to(device)
    windows = (places[:, None] + torch.tensor(offsets, device=device)).clamp(0, frames - 1)  # T W
    embeddings = features[:, windows].masked_fill((places >= frames)[None, :, None, None], 0.0)  # A T W E
    return embeddings.flatten(2).transpose(1, 2)[None]
