"""From a clip's noise to its latents: the cut at which sampling can move to other processes.

Tensors and settings go in, latents and the predictions of each step come out; whoever calls owns all else of a run.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .acceleration.experts.noise import ranges
from .acceleration.experts.router import take_load
from .attach import KeptTechniques, attached
from .clip_denoiser import clip_denoiser, clip_plan
from .config import ExpertRouting, SamplingConfig
from .memory.attempts import Attempts
from .memory.budget import Planned
from .memory.stage import placed
from .model.checkpoint import DIT, PART_LABELS
from .model.dit import ClipInputs
from .model.experts import ExpertLoad
from .networks import RunNetworks
from .sampling.denoise import OnStep, denoise
from .sampling.solvers import SolverState, make_solver
from .sampling.sound_results import WatchedSteps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipWork:
    """What a clip is denoised by, besides its noise."""

    inputs: ClipInputs
    """With the prompt as its text."""
    negative_text: Tensor
    """1 L E, embeddings of the negative prompt."""
    config: SamplingConfig
    routing: ExpertRouting | None = None
    """How experts are used; None for models without."""
    name: str = "a clip"
    """Which one it is, for people."""


class ClipSampler(Protocol):
    """Who denoises clips, in this process or elsewhere."""

    expert_load: ExpertLoad
    """What the experts had to do since somebody set this to an empty one; empty for a dense model."""

    def sample(self, noise: Tensor, work: ClipWork, on_step: OnStep) -> Tensor:
        """Denoise one clip.

        Args:
            noise: B C F h w.
            on_step: may raise to stop.
        Returns:
            Latents B C F h w.
        Raises:
            CheckpointError: if what the DiT gives cannot be sampled.
            OutOfMemory: if there is no room for it.
        """


class LocalSampler:
    """Denoises clips in this process, on the device of its networks.

    Args:
        networks: where one DiT or a pair comes from; of a pair, one is in place at a time.
        check: called before every layer; may raise to stop.
    """

    def __init__(self, networks: RunNetworks, check: Callable[[], None] = lambda: None):
        self.networks, self.check = networks, check
        self.expert_load = ExpertLoad()
        self.techniques = KeptTechniques()

    def sample(self, noise: Tensor, work: ClipWork, on_step: OnStep) -> Tensor:
        """As `ClipSampler.sample`."""
        return self.denoise_until(SolverState(noise), work.config.steps, work, on_step).latents

    @torch.inference_mode()
    def denoise_until(self, state: SolverState, stop: int, work: ClipWork, on_step: OnStep) -> SolverState:
        """Denoise a clip from where it is up to a step, so that it can be left and gone on with between any two.

        Where memory runs out, the step that failed is taken again under a tighter plan.

        Args:
            state: of the clip, on the device.
            stop: the first step, counted from 0, that is not taken.
        """
        config = work.config
        solver, watched = make_solver(config), WatchedSteps(config.steps)
        choose = clip_plan(self.networks, state.latents, work.inputs, config)
        timesteps = solver.schedule.timesteps

        def denoise_range(name: str, last: int, planned: Planned) -> None:
            nonlocal state
            with placed(self.networks, name, planned, self.check) as model:
                plan = self.networks.loading.acceleration
                with attached(model, self.techniques.of(model, plan, planned.plan, timesteps, work.routing)):
                    denoiser = clip_denoiser(model, work.inputs, work.negative_text, config)
                    log.info("%s: in place, denoising begins", PART_LABELS.get(name, name))
                    while (step := state.step) < last:
                        one = range(step, step + 1)
                        state = denoise(watched.watch(denoiser, step), solver, state, one, on_step)
                        self.expert_load += take_load(model)  # not of a step that is taken again
                    del denoiser  # what it has embedded is not to be there when the network leaves

        for name, steps in ranges(timesteps, config.noise_boundary):
            if state.step < (last := min(steps.stop, stop)):
                Attempts(self.networks, name, choose).run(partial(denoise_range, name, last))
        watched.check(PART_LABELS[DIT], f"sampling {work.name}")
        return state
