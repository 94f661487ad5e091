"""The DiT as the denoiser of one clip: its guidance branches, what they see, and how it can be placed for them."""

from dataclasses import replace

import torch
from torch import Tensor

from .config import S2VModelConfig, SamplingConfig
from .geometry import PATCH, PIXELS_PER_LATENT, motion_tokens
from .memory.activations import ClipShape
from .memory.budget import Choose, dit_plan
from .model.dit import ClipCondition, ClipInputs, S2VTransformer
from .networks import RunNetworks
from .sampling.denoise import OnStep, denoise
from .sampling.guidance import classifier_free_guidance, map_needed, needed_branches
from .sampling.solvers import SolverState, make_solver
from .seams import Denoiser


def branch_inputs(inputs: ClipInputs, negative_text: Tensor, branch: str) -> ClipInputs:
    """What a guidance branch sees: both voice and prompt, the prompt in silence, the negative prompt in silence."""
    text = negative_text if branch == "negative" else inputs.text
    if branch == "both":
        return replace(inputs, text=text)
    past = None if inputs.audio_past is None else torch.zeros_like(inputs.audio_past)
    return replace(inputs, text=text, audio=torch.zeros_like(inputs.audio), audio_past=past)


def clip_denoiser(model: S2VTransformer, inputs: ClipInputs, negative_text: Tensor, config: SamplingConfig) -> Denoiser:
    """One clip's guided denoiser; everything that stays the same over its steps is embedded here, once."""

    made: list[ClipCondition] = []  # each shares what it can with the one before

    def branch_denoiser(branch: str) -> Denoiser:
        condition = model.condition(branch_inputs(inputs, negative_text, branch), branch, made[-1] if made else None)
        made[:] = [condition]
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
    """Denoise one clip with a model that is in place.

    Args:
        inputs: with the prompt as its text.
        negative_text: 1 L E, embeddings of the negative prompt.
        noise: B C F h w.
    Returns:
        Latents B C F h w.
    """
    solver, denoiser = make_solver(config), clip_denoiser(model, inputs, negative_text, config)
    return denoise(denoiser, solver, SolverState(noise), solver.schedule.steps, on_step).latents


def clip_shape(
    config: S2VModelConfig, size_px: tuple[int, int], latent_frames: int, motion_latents: int, has_pose: bool
) -> ClipShape:
    """The tokens of a clip.

    Args:
        size_px: height and width.
        motion_latents: latent frames of the past, 0 without one.
    """
    height, width = (side // PIXELS_PER_LATENT for side in size_px)
    rows, columns = height // PATCH, width // PATCH
    past = motion_tokens(height, width, motion_latents, config.packs_motion)
    return ClipShape((latent_frames, rows, columns), rows * columns + past, has_pose)


def sampling_plan(networks: RunNetworks, shape: ClipShape, config: SamplingConfig) -> Choose:
    """How a clip of that shape can be denoised."""
    dit = networks.dit_config()
    way = replace(networks.loading.forward_way(dit), branches=len(needed_branches(config)))
    return dit_plan(dit, shape, way, networks.limits)


def clip_plan(networks: RunNetworks, latents: Tensor, inputs: ClipInputs, config: SamplingConfig) -> Choose:
    """How this clip can be denoised. `latents`: B C F h w."""
    past = 0 if inputs.motion_latents is None else inputs.motion_latents.shape[2]
    frames, height, width = latents.shape[2:]
    size = PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width
    shape = clip_shape(networks.dit_config(), size, frames, past, inputs.pose_latents is not None)
    return sampling_plan(networks, shape, config)
