"""Noise levels of a clip: sigma runs from about 1 to 0, the model is told the timestep 1000 sigma.

Source: Wan2.2 fm_solvers.py and fm_solvers_unipc.py at 42bf4cf (Apache-2.0), rewritten from their numbers. Karras
spacing: arXiv 2206.00364, eq. 5.
"""

from dataclasses import dataclass

import numpy as np

from ..config import TRAIN_TIMESTEPS, SamplingConfig

UNIPC_START = float(np.float32(0.999))
"""UniPC starts just below pure noise, in float32, because the logarithm of 1 - sigma has to exist."""
KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the steps and the final 0, and the timestep that goes with each step."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @property
    def steps(self) -> range:
        """All steps of the clip, counted from 0."""
        return range(len(self.timesteps))


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move noise levels towards 1. shift 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def karras_spacing(first: float, last: float, steps: int) -> np.ndarray:
    """Noise levels evenly spaced in sigma^(1/7): more steps at low noise."""
    ramp = np.linspace(first ** (1 / KARRAS_RHO), last ** (1 / KARRAS_RHO), steps)
    return ramp**KARRAS_RHO


def make_schedule(config: SamplingConfig) -> Schedule:
    """The noise levels of one clip. UniPC and DPM++ get the reference's whole timesteps, Euler exact ones.

    Timesteps that are given go to the model as they are, and noise levels are a thousandth of them, without shift.
    """
    if config.timesteps:
        timesteps = np.array(config.timesteps, float)
        sigmas = timesteps / TRAIN_TIMESTEPS
        if config.solver == "unipc":  # below pure noise, and above the next one
            sigmas[0] = min(sigmas[0], max(UNIPC_START, (1 + np.append(sigmas, 0)[1]) / 2))
    else:
        start = UNIPC_START if config.solver == "unipc" else 1.0
        sigmas = shift_sigmas(np.linspace(start, 0, config.steps + 1)[:-1], config.shift)
        if config.spacing == "karras":
            sigmas = karras_spacing(sigmas[0], sigmas[-1], config.steps)
        timesteps = sigmas * TRAIN_TIMESTEPS
        if config.solver != "euler":
            timesteps = np.trunc(timesteps)
    levels = np.append(sigmas, 0).astype(np.float32)
    return Schedule(tuple(levels.tolist()), tuple(timesteps.tolist()))
