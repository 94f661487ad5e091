"""Classifier-free guidance over two conditions, the prompt and the voice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from ..config import SamplingConfig
from ..seams import Denoiser

T = TypeVar("T")


@dataclass(frozen=True)
class GuidanceBranches(Generic[T]):
    """One value per branch: prompt with voice, prompt in silence, negative prompt in silence."""

    both: T
    text_only: T
    negative: T


def needed_branches(config: SamplingConfig) -> tuple[str, ...]:
    """Which branches run: one without guidance, two when both scales are equal (the reference), else up to three.

    Scaling only the voice leaves out the negative prompt: 1 x text + (scale - 1) x voice needs no third forward.
    """
    text, audio = config.guidance_scale, config.audio_scale
    used = {"both": True, "text_only": text != audio, "negative": text > 1}
    return tuple(name for name, is_used in used.items() if is_used)


def evaluate(
    branches: GuidanceBranches[Denoiser | None], latents: Tensor, timestep: float
) -> GuidanceBranches[Tensor | None]:
    """The velocity of each branch that there is, B C F h w, one after the other."""
    every = (branches.both, branches.text_only, branches.negative)
    return GuidanceBranches(*(None if branch is None else branch(latents, timestep) for branch in every))


def combine(values: GuidanceBranches[Tensor | None], config: SamplingConfig) -> Tensor:
    """u + g_text (text_only - u) + g_audio (both - text_only), from the branches that `needed_branches` names."""
    text, audio, needed = config.guidance_scale, config.audio_scale, needed_branches(config)
    both, text_only, negative = values.both, values.text_only, values.negative
    if needed == ("both",):
        return both
    if "text_only" not in needed:
        return negative + text * (both - negative)
    if "negative" not in needed:
        return text_only + audio * (both - text_only)
    return negative + text * (text_only - negative) + audio * (both - text_only)


def classifier_free_guidance(branches: GuidanceBranches[Denoiser | None], config: SamplingConfig) -> Denoiser:
    """One denoiser of several, with as few forwards as the scales allow.

    Args:
        branches: denoisers of those that `needed_branches` names, None for the others.
    """
    return lambda latents, timestep: combine(evaluate(branches, latents, timestep), config)


def map_needed(make: Callable[[str], T], config: SamplingConfig) -> GuidanceBranches[T | None]:
    """`make(branch)` for the branches that run, None for the others."""
    needed = needed_branches(config)
    return GuidanceBranches(*(make(name) if name in needed else None for name in ("both", "text_only", "negative")))
