"""All clips of a video: noise, denoise, decode, and the motion that the next clip starts from.

Source: Wan2.2 speech2video.py at 42bf4cf (Apache-2.0), rewritten. Motion passes from clip to clip as float pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LARGEST_SEED
from ..geometry import FIRST_CLIP_SKIP, FRAMES_PER_LATENT
from ..io.clip_store import StoredClips
from .colour import match_colours

START_PICTURE_FRAMES = 6
"""Frames at the end of the motion video that show the reference picture when a video starts from it."""


@dataclass(frozen=True)
class ClipTask:
    """What the caller needs to denoise clip `index`."""

    index: int
    noise: Tensor
    """B C F h w."""
    reference_latents: Tensor
    """B C 1 h w."""
    motion_latents: Tensor | None
    """B C F h w; None where the clip has no past."""


@dataclass(frozen=True)
class Clip:
    """A finished clip."""

    index: int
    latents: Tensor
    """B C F h w in float32, as sampled."""
    video: Tensor
    """B 3 T H W in [-1, 1]: the frames that this clip adds to the video."""
    motion_video: Tensor
    """B 3 T H W in [-1, 1]: the motion frames that the next clip starts from."""


def clip_noise(
    shape: tuple[int, ...], seed: int, index: int, device: torch.device | str, source: str = "cpu"
) -> Tensor:
    """Noise of one clip, seeded with seed + index.

    Args:
        source: cpu for float32 from a CPU generator, the same on every device; reference for bfloat16 drawn on
            `device`, as the reference does.
    """
    seed = (seed + index) % (LARGEST_SEED + 1)
    if source == "cpu":
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def generate_clips(
    sample: Callable[[ClipTask], Tensor],
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor, int], Tensor],
    reference: Tensor,
    motion_frames: int,
    noises: Iterable[Tensor],
    starts_from_reference: bool = False,
    finished: StoredClips | None = None,
    colour_match: float = 0.0,
) -> Iterator[Clip]:
    """Yield clip after clip, each as soon as it is decoded.

    The chain goes on behind `finished` clips with the motion that was kept with the last of them. Where it was not,
    their latents are decoded again, one after the other, which gives the same motion and takes a fraction of sampling.

    Args:
        sample: denoises one clip, B C F h w.
        encode, decode: the VAE, pixels B 3 T H W in [-1, 1] and latents B C F h w. `decode` is told how many frames at
            the end are needed, and gives them wherever they are to lie; `encode` takes videos that lie there.
        reference: B 3 1 H W in [-1, 1].
        motion_frames: video frames of past that a clip sees.
        noises: one per clip, B C F h w; their number is the number of clips, their F the length of each.
        starts_from_reference: the first clip continues from the picture instead of being free.
        finished: clips of an earlier run, which are neither sampled nor yielded.
        colour_match: strength with which a clip gets the colours of the reference picture, before the next goes on from
            it, so that no clip sees colours that have drifted and drift does not add up.
    """
    reference_latents = encode(reference)
    motion_video = torch.zeros(*reference.shape[:2], motion_frames, *reference.shape[3:])  # mid grey, in main memory
    if starts_from_reference:
        motion_video[:, :, -START_PICTURE_FRAMES:] = reference
    known, first = len(finished.clip_frames) if finished else 0, 0
    if finished and known and (kept := finished.motion_video()) is not None and kept.shape == motion_video.shape:
        motion_video, first = kept, known
    for index, noise in enumerate(noises):
        if index < first:
            continue
        is_free = index == 0 and not starts_from_reference
        motion_latents = None if is_free else encode(motion_video)
        if index < known:
            latents = finished.latents(index).to(reference.device)
        else:
            latents = sample(ClipTask(index, noise, reference_latents, motion_latents)).float()
        # Behind the picture or the past, no frame is the VAE's first, which it blurs.
        lead_in = reference_latents if is_free else motion_latents
        frames = FRAMES_PER_LATENT * latents.shape[2] - (FIRST_CLIP_SKIP if is_free else 0)
        video = decode(torch.cat([lead_in, latents], dim=2), frames)
        video = match_colours(video, reference.to(video.device), colour_match)
        if (older := motion_frames - video.shape[2]) > 0:
            motion_video = torch.cat([motion_video[:, :, -older:].to(video.device), video], dim=2)
        else:
            motion_video = video[:, :, -motion_frames:]
        if index >= known:
            yield Clip(index, latents, video, motion_video)
