"""Steps from one noise level to the next. Solvers keep nothing: what they know of a clip is in its `SolverState`.

All of them integrate a flow model: velocity v = noise - clean, latents x = (1 - sigma) clean + sigma noise. The
multistep ones work on the predicted clean latents x - sigma v over lambda = log((1 - sigma) / sigma). Coefficients
are float32 scalars on the CPU, as in the reference: its rounding of lambda is visible after 40 steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import SamplingConfig
from .schedule import Schedule, make_schedule


@dataclass(frozen=True)
class SolverState:
    """A clip between two steps: all that its solver needs to go on, in this process or in another one."""

    latents: Tensor
    """B C F h w, at the noise level of `step`; their type is kept from step to step."""
    step: int = 0
    """The next step, from 0."""
    history: tuple[Tensor, ...] = ()
    """What the solver keeps of earlier steps, B C F h w each; the solver says what."""

    def next(self, latents: Tensor, *history: Tensor) -> "SolverState":
        return SolverState(latents.to(self.latents.dtype), self.step + 1, history)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As tensors by name, and the rest as JSON."""
        tensors = {"latents": self.latents} | {f"history.{n}": past for n, past in enumerate(self.history)}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"step": self.step}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "SolverState":
        """What `pack` was given."""
        return cls(tensors["latents"], facts["step"], tuple(tensors[f"history.{n}"] for n in range(len(tensors) - 1)))


class Solver(Protocol):
    schedule: Schedule

    def step(self, state: SolverState, velocity: Tensor, noise: Tensor | None = None) -> SolverState:
        """The state at the next noise level, from the velocity at this one.

        Args:
            noise: B C F h w, new for this step, for samplers that add some. Those below are deterministic: they ignore
                it, and nobody has to draw any for them.
        """


class Euler:
    """First order: along the velocity. Keeps no history."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def step(self, state: SolverState, velocity: Tensor, noise: Tensor | None = None) -> SolverState:
        here, there = self.schedule.sigmas[state.step : state.step + 2]
        return state.next(state.latents + (there - here) * velocity)


class DPMSolverPP:
    """DPM-Solver++(2M), midpoint, first order at the last step. Source: arXiv 2211.01095.

    History: the clean latents that the step before predicted.
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.sigmas = schedule, torch.tensor(schedule.sigmas)
        self.lambdas = torch.log(1 - self.sigmas) - torch.log(self.sigmas)  # -inf at pure noise, inf at the end

    def step(self, state: SolverState, velocity: Tensor, noise: Tensor | None = None) -> SolverState:
        i = state.step
        here, there = self.sigmas[i], self.sigmas[i + 1]
        h = self.lambdas[i + 1] - self.lambdas[i]
        gain = (1 - there) * (torch.exp(-h) - 1)
        clean = state.latents - here * velocity
        moved = there / here * state.latents - gain * clean
        if state.history and there > 0:
            (last_clean,) = state.history
            ratio = (self.lambdas[i] - self.lambdas[i - 1]) / h  # inf when the clip began as pure noise
            moved = moved - 0.5 * gain * ((clean - last_clean) / ratio)
        return state.next(moved, clean)


class UniPC:
    """UniPC of order 2 with B(h) = e^h - 1: each step corrects the last one, then predicts. Source: arXiv 2302.04867.

    The last step predicts at first order. History: the latents that the step before started from, corrected, and the
    clean latents that the last one or two steps predicted, as many as the order of the step before.
    """

    def __init__(self, schedule: Schedule):
        self.schedule, self.sigmas = schedule, torch.tensor(schedule.sigmas)
        self.lambdas = torch.log(1 - self.sigmas) - torch.log(self.sigmas)

    def step(self, state: SolverState, velocity: Tensor, noise: Tensor | None = None) -> SolverState:
        i, start = state.step, state.latents
        clean, cleans = start - self.sigmas[i] * velocity, ()
        if state.history:
            last_start, *cleans = state.history
            start = self._correct(i - 1, last_start, cleans, clean)
        cleans = [*cleans[-1:], clean]
        moved, gain = self._first_order(i, start, clean)
        if len(cleans) == 2 and i + 1 < len(self.schedule.steps):
            moved = moved - gain * (0.5 * self._slope(i, cleans))
        return state.next(moved, start, *cleans)

    def _first_order(self, i: int, start: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The step from level i for a constant prediction, and the gain that weighs a change of the prediction."""
        here, there = self.sigmas[i], self.sigmas[i + 1]
        gain = (1 - there) * torch.expm1(self.lambdas[i] - self.lambdas[i + 1])
        return there / here * start - gain * clean, gain

    def _position(self, i: int) -> Tensor:
        """Where the prediction before level i lies, in steps from level i."""
        return (self.lambdas[i - 1] - self.lambdas[i]) / (self.lambdas[i + 1] - self.lambdas[i])

    def _slope(self, i: int, cleans: Sequence[Tensor]) -> Tensor:
        """How the prediction changed on the way to level i, per step from there."""
        before, at = cleans
        return (before - at) / self._position(i)

    def _correct(self, i: int, start: Tensor, cleans: Sequence[Tensor], clean: Tensor) -> Tensor:
        """Redo step i, now that the prediction at its end is known: `clean`, behind those that it was made with."""
        moved, gain = self._first_order(i, start, cleans[-1])
        change = clean - cleans[-1]
        if len(cleans) == 1:
            return moved - gain * (0.5 * change)
        weight_slope, weight_change = corrector_weights(self.lambdas[i + 1] - self.lambdas[i], self._position(i))
        return moved - gain * (weight_slope * self._slope(i, cleans) + weight_change * change)


def corrector_weights(h: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Weights a, b of the two differences: a + b and a position + b meet the first two order conditions."""
    z = -h
    phi_2 = torch.expm1(z) / z - 1
    phi_3 = phi_2 / z - 0.5
    first, second = phi_2 / torch.expm1(z), 2 * phi_3 / torch.expm1(z)
    weight_slope = (first - second) / (1 - position)
    return weight_slope, first - weight_slope


SOLVER_CLASSES = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler}


def make_solver(config: SamplingConfig) -> Solver:
    return SOLVER_CLASSES[config.solver](make_schedule(config))
