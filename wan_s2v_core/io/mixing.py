"""Many channels become the two of a film and the one that the audio encoder hears."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 0.71
"""-3 dB, by which ITU-R BS.775 mixes the centre and the surrounds into left and right."""
LEFT, RIGHT, BOTH, NEITHER = (1.0, 0.0), (0.0, 1.0), (SIDE, SIDE), (0.0, 0.0)
SIDE_LEFT, SIDE_RIGHT, BEHIND = (SIDE, 0.0), (0.0, SIDE), (0.5, 0.5)
SHARES: dict[str, tuple[float, float]] = {
    "FL": LEFT, "FR": RIGHT, "DL": LEFT, "DR": RIGHT, "FC": BOTH, "LFE": NEITHER, "LFE2": NEITHER,
    "FLC": SIDE_LEFT, "FRC": SIDE_RIGHT, "BL": SIDE_LEFT, "BR": SIDE_RIGHT, "SL": SIDE_LEFT, "SR": SIDE_RIGHT,
    "WL": SIDE_LEFT, "WR": SIDE_RIGHT, "SDL": SIDE_LEFT, "SDR": SIDE_RIGHT, "BC": BEHIND, "TC": BEHIND,
    "TFL": SIDE_LEFT, "TFR": SIDE_RIGHT, "TBL": SIDE_LEFT, "TBR": SIDE_RIGHT, "TSL": SIDE_LEFT, "TSR": SIDE_RIGHT,
    "TFC": BEHIND, "TBC": BEHIND, "BFC": BEHIND, "BFL": SIDE_LEFT, "BFR": SIDE_RIGHT,
    "AMBI0": BOTH, **{f"AMBI{number}": NEITHER for number in range(1, 64)},
}  # fmt: skip
"""What left and right take of a channel, by FFmpeg's names."""
GUESSES = {6: ("FL", "FR", "FC", "LFE", "BL", "BR"), 8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR")}
"""How so many channels are taken that come without names, as FFmpeg does: 5.1 and 7.1."""
FAR_WEAKER = 10**-1.5
"""In power, -15 dB. Two channels with a voice of their own, or with delays between them, lose 3 to 6 dB in a mean."""
SILENT = 1e-4
"""In power, -40 dB: channels this much weaker than the loudest one hold noise, and moments this weak are pauses."""
MOST_CANCELLED = 0.1
"""The share of the moments with sound that may be lost in a mix."""
MOMENT_SECONDS = 0.5
SAMPLES_AT_ONCE = 1 << 20


class Powers(NamedTuple):
    """How strong channels and their mix are, and where the mix loses what a channel has."""

    channels: Tensor
    """C, summed over all samples."""
    mixed: float
    cancelled: float
    """Of the moments with sound, those in which the mix is far weaker than the loudest channel that it takes."""
    loudest: int
    """Of the channels that it takes, in these moments."""


class Mix:
    """How C channels become two or one, decided once for a recording.

    Args:
        samples: C N, float32.
        names: of the channels, as FFmpeg has them; none where they are not known.
    """

    def __init__(self, samples: Tensor, names: tuple[str, ...], rate_hz: int):
        self.samples, self.moment = samples, max(1, round(MOMENT_SECONDS * rate_hz))
        self.names = names if all(name in SHARES for name in names) else ()
        self.names = self.names or GUESSES.get(len(samples), ())

    @cached_property
    def film_weights(self) -> Tensor | None:
        """2 C or 1 C; None where the channels stay as they are."""
        if len(self.samples) <= 2:
            return None
        if self.alone is not None:
            return one_of(self.alone, len(self.samples))
        return self._by_names if self.names else self._by_power

    @cached_property
    def alone(self) -> int | None:
        """The channel that is listened to alone, because a mix would lose the voice; None where a mix serves."""
        if len(self.samples) == 1 or not self.samples.numel():
            return None
        found = powers(self.samples, self._mono, self.moment)
        if found.cancelled > MOST_CANCELLED:
            return found.loudest
        if float(found.channels.amax()) * FAR_WEAKER > found.mixed:  # a channel that the mix leaves out
            return int(found.channels.argmax())
        return None

    @cached_property
    def _by_names(self) -> Tensor:
        return torch.tensor([SHARES[name] for name in self.names]).T.contiguous()

    @cached_property
    def _by_power(self) -> Tensor:
        """The mean of the channels that hold sound."""
        strong = powers(self.samples, torch.zeros(len(self.samples)), self.moment).channels
        active = (strong >= SILENT * strong.amax()).float()
        return (active / active.sum())[None]

    @cached_property
    def _mono(self) -> Tensor:  # C
        if len(self.samples) == 2:
            return torch.full((2,), 0.5)
        return (self._by_names if self.names else self._by_power).mean(0)

    def film(self) -> Tensor:
        """C N, two channels at most. Where the mix exceeds full scale it gets softer, but for rare peaks no more than
        3 dB softer than the loudest channel was."""
        if self.film_weights is None:
            return self.samples
        mixed = weighted(self.samples, self.film_weights)
        peak = float(mixed.abs().amax()) if mixed.numel() else 0.0
        if peak <= 1:
            return mixed
        level = float(mixed.square().mean().sqrt())
        loudest = float(self.samples.square().mean(1).amax().sqrt())
        return mixed * max(1 / peak, min(1.0, SIDE * loudest / level))

    def voice(self) -> Tensor:
        """N: what is heard of it in one channel."""
        if len(self.samples) == 1:
            return self.samples[0]
        if self.alone is not None:
            return self.samples[self.alone]
        return weighted(self.samples, self._mono[None])[0]

    def note(self) -> str | None:
        """What was done that nobody would expect, in words."""
        if self.alone is None:
            return None
        return (
            "a mix of its channels loses the voice, as where one of them is turned upside down: channel "
            f"{self.alone + 1} of {len(self.samples)} alone is heard by the audio encoder"
        )


def one_of(channel: int, channels: int) -> Tensor:
    """1 C: weights that take one channel alone."""
    weights = torch.zeros(1, channels)
    weights[0, channel] = 1
    return weights


def weighted(samples: Tensor, weights: Tensor) -> Tensor:
    """C N and M C -> M N."""
    taken = weights[0] != 0
    if len(weights) == 1 and len(weights[0][taken].unique()) == 1 and float(weights.sum()) > 0.999:
        return (samples if bool(taken.all()) else samples[taken]).mean(0, keepdim=True)
    return weights.to(samples) @ samples


def powers(samples: Tensor, weights: Tensor, moment: int) -> Powers:
    """C N under the weights C of a mix, looked at in moments of so many samples."""
    found = list(_moments(samples, weights, moment))
    channels, mixed = torch.cat([part for part, _ in found], 1), torch.cat([part for _, part in found])
    taken = weights > 0
    if not bool(taken.any()):
        return Powers(channels.sum(1), 0.0, 0.0, 0)
    seen = channels * taken[:, None]
    loudest = seen.amax(0)
    with_sound = loudest > SILENT * loudest.amax()
    lost = with_sound & (mixed < FAR_WEAKER * loudest)
    share = float(lost.sum() / with_sound.sum().clamp(min=1))
    return Powers(channels.sum(1), float(mixed.sum()), share, int(seen[:, lost].sum(1).argmax()))


def _moments(samples: Tensor, weights: Tensor, moment: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums of squares per moment, C M and M, a bounded stretch at a time."""
    step = max(1, SAMPLES_AT_ONCE // moment) * moment
    for start in range(0, samples.shape[1], step):
        part = samples[:, start : start + step].float()
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % moment))
        mixed = weights @ part
        yield part.unflatten(1, (-1, moment)).square().sum(2), mixed.unflatten(0, (-1, moment)).square().sum(1)
