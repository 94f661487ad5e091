"""Puts the parts together: a conditioned model becomes a sampler of clips. What command line, nodes and tests call."""

from dataclasses import replace

import torch
from torch import Tensor

from .config import SamplingConfig
from .model.dit import ClipInputs, S2VTransformer
from .sampling.denoise import OnStep, denoise
from .sampling.guidance import classifier_free_guidance, map_needed
from .seams import Denoiser


def branch_inputs(inputs: ClipInputs, negative_text: Tensor, branch: str) -> ClipInputs:
    """What a guidance branch sees: both voice and prompt, the prompt in silence, the negative prompt in silence."""
    text = negative_text if branch == "negative" else inputs.text
    audio = inputs.audio if branch == "both" else torch.zeros_like(inputs.audio)
    return replace(inputs, text=text, audio=audio)


def clip_denoiser(model: S2VTransformer, inputs: ClipInputs, negative_text: Tensor, config: SamplingConfig) -> Denoiser:
    """One clip's guided denoiser; everything that stays the same over its steps is embedded here, once."""

    def branch_denoiser(branch: str) -> Denoiser:
        condition = model.condition(branch_inputs(inputs, negative_text, branch), branch)
        return lambda latents, timestep: model(latents, timestep, condition)

    return classifier_free_guidance(map_needed(branch_denoiser, config), config)


def sample_clip(
    model: S2VTransformer,
    inputs: ClipInputs,
    negative_text: Tensor,
    noise: Tensor,
    config: SamplingConfig,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise one clip.

    Args:
        inputs: with the prompt as its text.
        negative_text: 1 L E, embeddings of the negative prompt.
        noise: B C F h w.
    Returns:
        Latents B C F h w.
    """
    return denoise(clip_denoiser(model, inputs, negative_text, config), noise, config, on_step)
