"""Colours of clips: drift is taken back, nothing else is, and no clip goes on from colours that have drifted."""

import pytest
import torch

from wan_s2v_core.config import SamplingConfig
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.sampling.clips import generate_clips
from wan_s2v_core.sampling.colour import LARGEST_GAIN, channel_statistics, match_colours

MOTION_FRAMES = 9
DRIFT_GAIN, DRIFT_OFFSET = torch.tensor([1.12, 0.93, 1.05]), torch.tensor([0.04, -0.03, 0.02])
ROUNDING = 1e-5
"""Of float32, for values up to 1."""


def per_channel(values: torch.Tensor) -> torch.Tensor:
    return values[None, :, None, None, None]


@pytest.fixture
def film(fresh_seed):
    """1 3 T H W: a picture with some noise on it, far enough from black and white to drift."""
    generator = torch.Generator().manual_seed(fresh_seed)
    picture = 0.4 * torch.randn(1, 3, 1, 24, 20, generator=generator).clamp(-1.5, 1.5)
    moving = 0.02 * torch.randn(1, 3, 12, 24, 20, generator=generator).clamp(-2, 2)
    return picture, picture + moving


def test_drift_of_brightness_contrast_and_tint_is_taken_back(film):
    """To what the clip was, as far as it had the picture's statistics; the rest of it is its own."""
    picture, clip = film
    drifted = clip * per_channel(DRIFT_GAIN) + per_channel(DRIFT_OFFSET)
    matched = match_colours(drifted, picture, 1.0)
    torch.testing.assert_close(channel_statistics(matched), channel_statistics(picture), atol=ROUNDING, rtol=0)
    assert (drifted - clip).abs().mean() > 0.03 and (matched - clip).abs().max() < 0.005
    torch.testing.assert_close(matched, match_colours(clip, picture, 1.0), atol=ROUNDING, rtol=0)


def test_strength_is_how_far_it_goes(film):
    picture, clip = film
    drifted = clip * per_channel(DRIFT_GAIN) + per_channel(DRIFT_OFFSET)
    whole, half = (match_colours(drifted, picture, strength) for strength in (1.0, 0.5))
    torch.testing.assert_close(half, (drifted + whole) / 2, atol=ROUNDING, rtol=0)


def test_strength_0_changes_nothing(film):
    """Bit for bit, values that no picture has included."""
    picture, clip = film
    clip = torch.cat([3 * clip, torch.full_like(clip[:, :, :1], torch.nan)], dim=2)
    assert match_colours(clip, picture, 0.0) is clip


@pytest.mark.parametrize("level", [-1.0, 0.0, 0.37, 1.0])
def test_flat_pictures_give_numbers(film, level):
    picture, clip = film
    flat_picture, flat_clip = torch.full_like(picture, level), torch.full_like(clip, level)
    for seen, reference in ((flat_clip, picture), (clip, flat_picture), (flat_clip, flat_picture)):
        matched = match_colours(seen, reference, 1.0)
        assert torch.isfinite(matched).all() and matched.abs().max() <= 1
    assert torch.equal(match_colours(flat_clip, flat_picture, 1.0), flat_clip)
    contrast = channel_statistics(match_colours(0.01 * clip, picture, 1.0))[1] / channel_statistics(0.01 * clip)[1]
    assert (contrast <= LARGEST_GAIN + 1e-3).all(), "noise is not stretched to colour"


class Drifting:
    """A stand-in for the networks: latents are every fourth frame, and each clip repeats what it saw last, drifted."""

    def __init__(self):
        self.seen: list[float] = []

    def encode(self, video):
        return video[:, :, ::4]

    def decode(self, latents, keep_frames):
        return latents.repeat_interleave(4, dim=2)[:, :, -keep_frames:]

    def sample(self, task):
        last = task.reference_latents if task.motion_latents is None else task.motion_latents[:, :, -1:]
        self.seen.append(last.mean().item())
        return (last * per_channel(DRIFT_GAIN) + per_channel(DRIFT_OFFSET)).expand(-1, -1, 3, -1, -1)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_drift_does_not_add_up_over_clips(film, strength):
    picture, made = film[0], Drifting()
    noises = [torch.zeros(1, 3, 3, 24, 20)] * 8
    clips = list(
        generate_clips(
            made.sample, made.encode, made.decode, picture, MOTION_FRAMES, noises, colour_match=strength
        )
    )  # fmt: skip
    errors = [(clip.video - picture).abs().mean().item() for clip in clips]
    if strength == 1:
        assert max(errors) < 1e-3
        assert made.seen == pytest.approx([picture.mean().item()] * 8, abs=1e-3), "what the next clip goes on from"
    elif strength:
        assert errors[-1] < 3 * errors[0] and errors[-1] == pytest.approx(errors[-2], rel=0.05), "it comes to rest"
    else:
        assert errors[-1] > 4 * errors[0]


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_other_strengths_are_refused(strength):
    with pytest.raises(ConfigError, match="colour_match="):
        SamplingConfig(colour_match=strength)
