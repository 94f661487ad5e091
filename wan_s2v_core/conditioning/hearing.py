"""A recording becomes features at 30 Hz, whatever its length."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from ..io.scratch import MOST_IN_MEMORY_BYTES, scratch
from ..model.audio_encoder import SPEECH_FEATURE_HZ, SpeechEncoder
from ..model.long_speech import WINDOWS, Windows, hear_in_windows
from .audio import Resampling, resample_features

log = logging.getLogger(__name__)


def hear(
    encoder: SpeechEncoder,
    samples: Tensor,
    windows: Windows = WINDOWS,
    folder: Path | None = None,
    most_in_memory: int = MOST_IN_MEMORY_BYTES,
) -> Tensor:
    """All layers of a recording at 30 Hz, A T E.

    Up to a window's length it is heard whole, as the reference does. A longer one takes the room of a window on the
    encoder's device, and in main memory no more than twice `most_in_memory` and a window.

    Args:
        samples: at 16 kHz, mono, any scale.
        folder, most_in_memory: as for `scratch`.
    Raises:
        ConfigError: if the disk has no room for what main memory should not hold.
    """
    frames, (layers, width) = encoder.frames_of(len(samples)), encoder.shape
    if frames <= windows.window:
        return resample_features(encoder.hidden_states(samples), SPEECH_FEATURE_HZ).cpu()
    log.info("%.0f s of voice are heard in %d windows", frames / SPEECH_FEATURE_HZ, len(windows.cut(frames)))
    resampling = Resampling(frames, SPEECH_FEATURE_HZ)
    features = scratch((layers, len(resampling), width), folder, most_in_memory)
    states = scratch((frames, width), folder, most_in_memory)
    before = torch.empty(0, width)
    for layer, first, heard in hear_in_windows(encoder, samples, states, windows):
        joined = torch.cat([before, heard]) if first else heard  # the frame before, to interpolate from
        resampling.fill(features[layer], first + len(heard) - len(joined), joined)
        before = heard[-1:]
    return features
