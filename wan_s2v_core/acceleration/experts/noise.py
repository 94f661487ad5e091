"""Experts by noise level: one denoiser for each range of sigma, as in the A14B pairs of Wan2.2."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ...errors import ConfigError
from ...seams import Denoiser

OnSwitch = Callable[[int], None]
"""Called with the number of an expert before its first step and after every change: make it the resident one."""


def check_boundaries(boundaries: Sequence[float], experts: int) -> None:
    """Raises ConfigError if these sigmas do not separate that many experts."""
    edges = [1.0, *boundaries, 0.0]
    if len(boundaries) != experts - 1:
        raise ConfigError(
            f"{len(boundaries)} boundaries for {experts} noise experts. Give one less, such as 0.9 for two experts."
        )
    if not all(high > low for high, low in pairwise(edges)):
        raise ConfigError(
            f"boundaries={list(boundaries)} must fall and lie between 1 and 0: the first expert has the most noise."
        )


def expert_at(boundaries: Sequence[float], timestep: float) -> int:
    """The number of the expert that serves a timestep in 0..1000; one on a boundary belongs to the noisier side."""
    return sum(timestep < 1000 * boundary for boundary in boundaries)


def noise_experts(
    boundaries: Sequence[float], denoisers: Sequence[Denoiser], on_switch: OnSwitch | None = None
) -> Denoiser:
    """One denoiser that hands each step to the expert for its noise.

    Args:
        boundaries: falling sigmas; A14B switches at 0.875 (text) and 0.9 (picture).
        denoisers: noisiest first, one more than boundaries. A single one comes back as it is.
    Raises:
        ConfigError: if they do not fit together.
    Source: Wan2.2 text2video.py at 42bf4cf (Apache-2.0), which switches at timestep >= boundary * 1000.
    """
    check_boundaries(boundaries, len(denoisers))
    if len(denoisers) == 1 and on_switch is None:
        return denoisers[0]
    resident: int | None = None

    def denoise_by_expert(latents: Tensor, timestep: float) -> Tensor:
        nonlocal resident
        wanted = expert_at(boundaries, timestep)
        if wanted != resident and on_switch:
            on_switch(wanted)
        resident = wanted
        return denoisers[wanted](latents, timestep)

    return denoise_by_expert
