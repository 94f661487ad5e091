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


def classifier_free_guidance(branches: GuidanceBranches[Denoiser | None], config: SamplingConfig) -> Denoiser:
    """u + g_text (text_only - u) + g_audio (both - text_only), with as few forwards as the scales allow.

    Args:
        branches: denoisers; those that `needed_branches` does not name may be None.
    """
    text, audio = config.guidance_scale, config.audio_scale
    needed = needed_branches(config)

    def guided(latents: Tensor, timestep: float) -> Tensor:
        both = branches.both(latents, timestep)
        if needed == ("both",):
            return both
        if "text_only" not in needed:
            negative = branches.negative(latents, timestep)
            return negative + text * (both - negative)
        text_only = branches.text_only(latents, timestep)
        if "negative" not in needed:
            return text_only + audio * (both - text_only)
        negative = branches.negative(latents, timestep)
        return negative + text * (text_only - negative) + audio * (both - text_only)

    return guided


def map_needed(make: Callable[[str], T], config: SamplingConfig) -> GuidanceBranches[T | None]:
    """`make(branch)` for the branches that run, None for the others."""
    needed = needed_branches(config)
    return GuidanceBranches(*(make(name) if name in needed else None for name in ("both", "text_only", "negative")))
