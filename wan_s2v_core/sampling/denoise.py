"""One clip: solver steps over the noise levels."""

from collections.abc import Callable

from torch import Tensor

from ..config import SamplingConfig
from ..seams import Denoiser
from .schedule import make_schedule
from .solvers import make_solver

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its number (from 1) and the clean latents it predicts; may raise to stop."""


def denoise(denoiser: Denoiser, noise: Tensor, config: SamplingConfig, on_step: OnStep | None = None) -> Tensor:
    """Noise B C F h w -> latents B C F h w; the state stays in the precision of `noise`."""
    schedule = make_schedule(config)
    solver, latents = make_solver(config, schedule), noise
    for step, (timestep, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=False), start=1):
        velocity = denoiser(latents, timestep)
        if on_step:
            on_step(step, latents - sigma * velocity)
        latents = solver.step(velocity, latents).to(noise.dtype)
    return latents
