"""Experts by noise level: each serves a range of a clip's steps, as in the A14B pairs of Wan2.2."""

from collections.abc import Sequence

from ...model.checkpoint import DIT, LOW_NOISE_DIT


def ranges(timesteps: Sequence[float], boundary: float | None) -> list[tuple[str, range]]:
    """Which DiT serves which steps, in their order; one without steps is left out.

    Args:
        timesteps: of the steps, 0 to 1000, falling.
        boundary: the sigma below which LOW_NOISE_DIT serves; None for one DiT. A14B: 0.875 (text) and 0.9 (picture).
    Source: Wan2.2 text2video.py at 42bf4cf (Apache-2.0), which switches at timestep >= boundary * 1000.
    """
    steps = len(timesteps)
    switch = steps if boundary is None else sum(timestep >= 1000 * boundary for timestep in timesteps)
    served = ((DIT, range(switch)), (LOW_NOISE_DIT, range(switch, steps)))
    return [(name, part) for name, part in served if part]
