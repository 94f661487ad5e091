"""Does the mouth follow the voice, and how late?"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..io.audio import sound_blocks

MOST_LAG_FRAMES = 8
FEWEST_FRAMES = 24
"""1.5 s at 16 fps: fewer say nothing about a correlation."""
SILENCE = 1e-4
"""RMS of the loudest frame, of full scale (-80 dB)."""
CLEAREST_LEAST = 0.3
"""A lag is told only where the correlation there reaches this; at their best, other voices reach 0.18 in the median."""


@dataclass(frozen=True)
class LipSync:
    """Correlation without shift, and the lag at which it is largest: positive where the picture is late."""

    correlation: float
    lag_frames: int
    correlation_at_lag: float


def voice_envelope(path: Path, times: np.ndarray) -> np.ndarray:
    """RMS of the sound while each frame is shown, linear; as many frames as the sound covers.

    Args:
        times: seconds at which frames start, and the end of the last one.
    """
    energy, counts, position = np.zeros(len(times) - 1), np.zeros(len(times) - 1), 0
    for block, rate in sound_blocks(path):
        edges = np.round(times * rate)
        places = np.searchsorted(edges, np.arange(position, position + block.shape[1]), side="right") - 1
        inside = (places >= 0) & (places < len(energy))
        squares = block.mean(0).astype(np.float64)[inside] ** 2
        energy += np.bincount(places[inside], squares, minlength=len(energy))
        counts += np.bincount(places[inside], minlength=len(energy))
        position += block.shape[1]
        if position >= edges[-1]:
            break
    covered = counts >= 0.5 * np.diff(times) * rate if position else counts > 0
    frames = len(counts) if covered.all() else int(covered.argmin())
    return np.sqrt(energy[:frames] / np.maximum(counts[:frames], 1))


def voice_fault(envelope: np.ndarray) -> str | None:
    """Why a mouth cannot be compared with this voice; None if it can."""
    if len(envelope) < FEWEST_FRAMES:
        return f"sound and picture share {len(envelope)} frames; {FEWEST_FRAMES} are needed"
    if not np.isfinite(envelope).all():
        return "the sound has samples that are not a number"
    if envelope.max() < SILENCE:
        return "the sound is silent"
    if envelope.std() < 0.01 * envelope.mean():
        return "the loudness of the sound does not change"
    return None


def compare(opening: np.ndarray, envelope: np.ndarray) -> LipSync:
    """Correlate mouth and voice at every lag of at most MOST_LAG_FRAMES."""
    frames = min(len(opening), len(envelope))
    opening, envelope = opening[:frames], envelope[:frames]
    found = {lag: _correlation(opening, envelope, lag) for lag in range(-MOST_LAG_FRAMES, MOST_LAG_FRAMES + 1)}
    best = max(found, key=found.get)
    return LipSync(found[0], best, found[best])


def _correlation(opening: np.ndarray, envelope: np.ndarray, lag: int) -> float:
    late, early = max(lag, 0), max(-lag, 0)
    mouth, voice = opening[late : len(opening) - early], envelope[early : len(envelope) - late]
    if mouth.std() == 0 or voice.std() == 0:
        return 0.0
    return float(np.corrcoef(mouth, voice)[0, 1])
