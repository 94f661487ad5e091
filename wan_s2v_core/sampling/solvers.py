"""Steps from one noise level to the next. A solver is made for one clip and remembers its last predictions.

All of them integrate a flow model: velocity v = noise - clean, latents x = (1 - sigma) clean + sigma noise. The
multistep ones work on the predicted clean latents x - sigma v over lambda = log((1 - sigma) / sigma). Coefficients
are float32 scalars on the CPU, as in the reference: its rounding of lambda is visible after 40 steps.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..config import SamplingConfig
from .schedule import Schedule


class Solver(Protocol):
    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """Latents at the next noise level, from the velocity at this one."""


class Euler:
    """First order: along the velocity."""

    def __init__(self, schedule: Schedule):
        self.sigmas, self.index = schedule.sigmas, 0

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        here, there = self.sigmas[self.index : self.index + 2]
        self.index += 1
        return latents + (there - here) * velocity


class DPMSolverPP:
    """DPM-Solver++(2M), midpoint, first order at the last step. Source: arXiv 2211.01095."""

    def __init__(self, schedule: Schedule):
        self.sigmas = torch.tensor(schedule.sigmas)
        self.lambdas = torch.log(1 - self.sigmas) - torch.log(self.sigmas)  # -inf at pure noise, inf at the end
        self.index = 0
        self.last_clean: Tensor | None = None

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        i = self.index
        here, there = self.sigmas[i], self.sigmas[i + 1]
        h = self.lambdas[i + 1] - self.lambdas[i]
        gain = (1 - there) * (torch.exp(-h) - 1)
        clean = latents - here * velocity
        moved = there / here * latents - gain * clean
        if self.last_clean is not None and there > 0:
            ratio = (self.lambdas[i] - self.lambdas[i - 1]) / h  # inf when the clip began as pure noise
            moved = moved - 0.5 * gain * ((clean - self.last_clean) / ratio)
        self.last_clean, self.index = clean, i + 1
        return moved


class UniPC:
    """UniPC of order 2 with B(h) = e^h - 1: each step corrects the last one, then predicts. Source: arXiv 2302.04867.

    The last step predicts at first order.
    """

    def __init__(self, schedule: Schedule):
        self.sigmas = torch.tensor(schedule.sigmas)
        self.lambdas = torch.log(1 - self.sigmas) - torch.log(self.sigmas)
        self.index = 0
        self.clean: list[Tensor] = []
        self.start: Tensor | None = None
        self.order = 1

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        i = self.index
        clean = latents - self.sigmas[i] * velocity
        if self.start is not None:
            latents = self._correct(clean)
        steps_left = len(self.sigmas) - 1 - i
        self.order = min(2, steps_left, i + 1)
        self.clean, self.start = [*self.clean[-1:], clean], latents
        moved, gain = self._first_order(i)
        if self.order == 2:
            moved = moved - gain * (0.5 * self._slope(i))
        self.index = i + 1
        return moved

    def _first_order(self, i: int) -> tuple[Tensor, Tensor]:
        """The step from level i for a constant prediction, and the gain that weighs a change of the prediction."""
        here, there = self.sigmas[i], self.sigmas[i + 1]
        gain = (1 - there) * torch.expm1(self.lambdas[i] - self.lambdas[i + 1])
        return there / here * self.start - gain * self.clean[-1], gain

    def _position(self, i: int) -> Tensor:
        """Where the prediction before level i lies, in steps from level i."""
        return (self.lambdas[i - 1] - self.lambdas[i]) / (self.lambdas[i + 1] - self.lambdas[i])

    def _slope(self, i: int) -> Tensor:
        """How the prediction changed on the way to level i, per step from there."""
        return (self.clean[-2] - self.clean[-1]) / self._position(i)

    def _correct(self, clean: Tensor) -> Tensor:
        """Redo the last step, now that the prediction at its end is known."""
        i = self.index - 1
        moved, gain = self._first_order(i)
        change = clean - self.clean[-1]
        if self.order == 1:
            return moved - gain * (0.5 * change)
        weight_slope, weight_change = corrector_weights(self.lambdas[i + 1] - self.lambdas[i], self._position(i))
        return moved - gain * (weight_slope * self._slope(i) + weight_change * change)


def corrector_weights(h: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Weights a, b of the two differences: a + b and a position + b meet the first two order conditions."""
    z = -h
    phi_2 = torch.expm1(z) / z - 1
    phi_3 = phi_2 / z - 0.5
    first, second = phi_2 / torch.expm1(z), 2 * phi_3 / torch.expm1(z)
    weight_slope = (first - second) / (1 - position)
    return weight_slope, first - weight_slope


SOLVER_CLASSES = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler}


def make_solver(config: SamplingConfig, schedule: Schedule) -> Solver:
    return SOLVER_CLASSES[config.solver](schedule)
