"""The timeline of a video: peaks do not depend on how the sound comes in, and small films are small."""

import numpy as np
import pytest
import torch

from wan_s2v_core.conditioning.timeline import (
    ENCODER_STEPS,
    Loudness,
    expected_timeline,
    feature_frames,
    loudness,
    loudness_of,
)
from wan_s2v_core.config import VideoConfig
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.io.small_film import shrunk

CHANCE = np.random.default_rng()


def random_sound(samples: int, rate: int, channels: int = 1) -> Recording:
    return Recording(torch.from_numpy(CHANCE.uniform(-1, 1, (channels, samples)).astype(np.float32)), rate)


@pytest.mark.parametrize("rate", [50, 8000, 11025, 22050, 44100, 96000])
def test_peaks_do_not_depend_on_the_pieces(rate):
    recording = random_sound(int(CHANCE.integers(1, 3 * rate)), rate, 2)
    whole, pieces, position = loudness_of(recording), [], 0
    while position < recording.samples.shape[1]:
        size = int(CHANCE.integers(1, 2000))
        pieces.append((recording.samples[:, position : position + size].numpy(), rate))
        position += size
    found = loudness(pieces)
    assert np.array_equal(found.peaks, whole.peaks) and found.samples == recording.samples.shape[1]
    assert whole.peaks.max() == recording.samples.abs().max()


def test_a_stretch_shows_its_own_peaks_and_nothing_after_the_end():
    peaks = np.zeros(1000, np.float32)
    peaks[500:510] = 0.7
    heard = Loudness(peaks, 160, 160_000, 16_000)
    shown = heard.between(0.0, 10.0)
    assert len(shown) == 600 and shown.index(0.7) == 300 and set(shown[307:]) == {0.0}
    assert heard.between(5.0, 0.1) == [0.7] * 10
    assert heard.between(9.9, 5.0)[20:] == [0.0] * 480 and heard.between(50.0, 1.0) == [0.0] * 100
    assert len(heard.between(0.0, 0.001)) == 1


def test_features_are_counted_as_the_encoder_makes_them():
    samples = int(CHANCE.integers(400, 100_000))
    x = torch.zeros(1, 1, samples)
    for kernel, stride in ENCODER_STEPS:
        x = torch.nn.functional.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
    assert feature_frames(Recording(torch.zeros(1, samples), 16000)) == int(x.shape[-1] / 50 * 30)


def test_limits():
    with pytest.raises(ConfigError, match="longer than 2 s"):
        loudness([(np.zeros((1, 1000), np.float32), 400)], most_seconds=2)
    with pytest.raises(ConfigError, match="no sample"):
        loudness([])
    with pytest.raises(ConfigError, match="25 ms"):
        expected_timeline(loudness_of(random_sound(100, 16000)), 0.0, None, VideoConfig())


@pytest.mark.parametrize(
    "size, small", [((64, 64), (64, 64)), ((480, 832), (220, 384)), ((4096, 64), (384, 16)), ((65, 63), (64, 62))]
)
def test_small_films_are_small_and_even(size, small):
    frames = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    assert shrunk(frames).shape == (2, *small, 3) and shrunk(frames).dtype == torch.uint8


def test_what_a_run_makes_softer_is_drawn_softer():
    loud = Recording(2.5 * random_sound(32000, 16000).samples, 16000)
    told = expected_timeline(loudness_of(loud), 0.5, None, VideoConfig())
    assert max(told["peaks"]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ConfigError, match="peak of"):
        expected_timeline(loudness_of(Recording(1000 * loud.samples, 16000)), 0.0, None, VideoConfig())


@pytest.mark.parametrize("start, seconds", [(1e308, None), (float("inf"), None), (0.0, 1e308), (float("nan"), 1.0)])
def test_stretches_that_no_recording_has(start, seconds):
    with pytest.raises(ConfigError, match="seconds="):
        expected_timeline(loudness_of(random_sound(32000, 16000)), start, seconds, VideoConfig())
