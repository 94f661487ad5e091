"""One clip, or some of its steps: solver steps over the noise levels."""

from collections.abc import Callable

from torch import Tensor

from ..seams import Denoiser
from .solvers import Solver, SolverState

OnStep = Callable[[int, Tensor], None]
"""Called in each step with its number (from 1) and the clean latents it predicts; may raise to stop."""


def denoise(
    denoiser: Denoiser, solver: Solver, state: SolverState, steps: range, on_step: OnStep | None = None
) -> SolverState:
    """The state behind some steps. Taking a clip's steps in several ranges gives the same bits as taking them in one.

    Args:
        state: before the first of them: `SolverState(noise)` at the beginning of a clip.
        steps: counted from 0; `solver.schedule.steps` for a whole clip.
    """
    schedule = solver.schedule
    for step in steps:
        assert step == state.step, "steps follow one another from where the state is"
        velocity = denoiser(state.latents, schedule.timesteps[step])
        if on_step:
            on_step(step + 1, state.latents - schedule.sigmas[step] * velocity)
        state = solver.step(state, velocity)
    return state
