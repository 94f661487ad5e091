"""What a video will be, for people to look at: which clip makes which frames, and how loud the voice is there."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..config import VideoConfig
from ..errors import ConfigError
from ..geometry import ClipGeometry, ClipPlan
from ..io.audio import SPEECH_HZ, Recording, check_peak, check_recording
from ..model.audio_encoder import SPEECH_FEATURE_HZ
from .audio import FEATURE_HZ
from .bundle import make_plan

PEAKS_HZ = 100
MOST_PEAKS = 600
"""More than any screen has columns for a node."""
ENCODER_STEPS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of wav2vec 2.0's convolutions, which say how many features a recording has."""


@dataclass(frozen=True)
class Loudness:
    """How loud a recording is along its time."""

    peaks: np.ndarray
    """The largest sample of each hundredth of a second, of any channel."""
    hop: int
    """Samples that each of them stands for."""
    samples: int
    rate_hz: int

    def between(self, start_seconds: float, seconds: float) -> list[float]:
        """At most 600 peaks, evenly over a stretch; 0 past the end."""
        start, stop = (time * self.rate_hz / self.hop for time in (start_seconds, start_seconds + seconds))
        columns = max(1, min(MOST_PEAKS, math.ceil(stop - start)))
        edges = np.linspace(start, stop, columns + 1)
        first, last = edges[:-1].astype(int), np.maximum(np.ceil(edges[1:]), edges[:-1] + 1).astype(int)
        return [round(float(self.peaks[a:b].max(initial=0.0)), 3) for a, b in zip(first, last, strict=True)]


def loudness(blocks: Iterable[tuple[np.ndarray, int]], most_seconds: float = math.inf) -> Loudness:
    """How loud some sound is, of which no more than a block is held.

    Args:
        blocks: (C N float32, rate in Hz) one after the other, as `sound_blocks` gives them.
    Raises:
        ConfigError: if it is longer than `most_seconds`, or empty.
    """
    peaks, rest, samples, rate = [], np.zeros(0, np.float32), 0, 0
    for block, rate in blocks:
        samples, hop = samples + block.shape[1], max(1, rate // PEAKS_HZ)
        if samples > most_seconds * rate:
            raise ConfigError(
                f"the recording is longer than {most_seconds:g} s. Its timeline is shown once it runs, which takes any "
                "length; a part of it as a file of its own is shown before."
            )
        mono = np.nan_to_num(np.abs(block).max(axis=0), nan=0.0, posinf=0.0, neginf=0.0)
        joined = np.concatenate([rest, mono])
        whole = len(joined) // hop * hop
        peaks.append(joined[:whole].reshape(-1, hop).max(axis=1))
        rest = joined[whole:]
    if not samples:
        raise ConfigError("the recording holds no sample. Use a file with sound.")
    if len(rest):
        peaks.append(rest.max(keepdims=True))
    return Loudness(np.concatenate(peaks), hop, samples, rate)


def loudness_of(recording: Recording) -> Loudness:
    """The same of a recording at hand."""
    return loudness([(recording.samples.detach().cpu().numpy(), recording.rate_hz)])


def feature_frames(recording: Recording) -> int:
    """Frames at 30 Hz that the audio encoder will make of a recording."""
    frames = round(recording.samples.shape[-1] * SPEECH_HZ / recording.rate_hz)
    for kernel, stride in ENCODER_STEPS:
        frames = (frames - kernel) // stride + 1
    return int(frames / SPEECH_FEATURE_HZ * FEATURE_HZ)


def expected_timeline(
    heard: Loudness, start_seconds: float, seconds: float | None, video: VideoConfig
) -> dict[str, Any]:
    """The timeline of a video that has not been begun, from the loudness of the whole recording.

    Raises:
        ConfigError: for what a run would refuse too.
    """
    silence = Recording(torch.zeros(1, 1).expand(1, heard.samples), heard.rate_hz)  # as long, and takes no memory
    stretch = silence.cut(start_seconds, seconds)
    if stretch.seconds < 1:
        check_recording(stretch)
    loudest = max(heard.between(start_seconds, stretch.seconds))
    check_peak(loudest, "the recording")
    if loudest > 1:  # a run makes it softer
        heard = replace(heard, peaks=heard.peaks / loudest)
    geometry = ClipGeometry(video.clip_frames, video.motion_frames)
    plan = make_plan(stretch.seconds, feature_frames(stretch), video, geometry)
    return timeline(plan, video.fps, stretch.seconds, heard, start_seconds)


def timeline(
    plan: ClipPlan, fps: float, sound_seconds: float, heard: Loudness, start_seconds: float = 0.0
) -> dict[str, Any]:
    """A plan and the voice that belongs to it, as JSON has it: seconds, sound_seconds, fps, frames, clips, peaks.

    `peaks` are spread evenly over `peaks_seconds` from the start of the video on.

    Args:
        sound_seconds: how long the whole voice is, of which the video may show less.
        heard: how loud it is, from `start_seconds` on.
    """
    shown = min(sound_seconds, plan.frames / fps)
    clips, start = [], 0
    for clip in range(len(plan.clip_frames)):
        frames = plan.shown(clip)
        clips.append({"start_frame": start, "frames": frames, "start_seconds": round(start / fps, 3)})
        start += frames
    return {
        "seconds": round(plan.frames / fps, 3),
        "sound_seconds": round(sound_seconds, 3),
        "fps": fps,
        "frames": plan.frames,
        "clips": clips,
        "peaks_seconds": round(shown, 3),
        "peaks": heard.between(start_seconds, shown),
    }
