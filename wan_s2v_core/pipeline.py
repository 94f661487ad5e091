"""Puts the parts together: a conditioned model becomes a sampler of clips. What command line, nodes and tests call."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import SamplingConfig
from .model.dit import ClipInputs, S2VTransformer
from .sampling.clips import ClipTask
from .sampling.denoise import OnStep, denoise
from .sampling.guidance import classifier_free_guidance, map_needed
from .seams import Denoiser


@dataclass(frozen=True)
class Prompts:
    """Embeddings of the prompt and the negative prompt, each 1 L E without padding."""

    positive: Tensor
    negative: Tensor


def branch_inputs(inputs: ClipInputs, prompts: Prompts, branch: str) -> ClipInputs:
    """What a guidance branch sees: both voice and prompt, the prompt in silence, the negative prompt in silence."""
    text = prompts.negative if branch == "negative" else prompts.positive
    audio = inputs.audio if branch == "both" else torch.zeros_like(inputs.audio)
    return replace(inputs, text=text, audio=audio)


def clip_denoiser(model: S2VTransformer, inputs: ClipInputs, prompts: Prompts, config: SamplingConfig) -> Denoiser:
    """One clip's guided denoiser; everything that stays the same over its steps is embedded here, once."""

    def branch_denoiser(branch: str) -> Denoiser:
        condition = model.condition(branch_inputs(inputs, prompts, branch), branch)
        return lambda latents, timestep: model(latents, timestep, condition)

    return classifier_free_guidance(map_needed(branch_denoiser, config), config)


def sample_clip(
    model: S2VTransformer,
    task: ClipTask,
    audio: Tensor,
    pose_latents: Tensor | None,
    prompts: Prompts,
    motion_frames: int,
    config: SamplingConfig,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise one clip. audio: 1 A E T of this clip -> latents B C F h w."""
    inputs = ClipInputs(
        reference_latents=task.reference_latents,
        motion_latents=task.motion_latents,
        pose_latents=pose_latents,
        audio=audio,
        text=prompts.positive,
        motion_frames=motion_frames,
    )
    return denoise(clip_denoiser(model, inputs, prompts, config), task.noise, config, on_step)
