"""Puts the parts together: a picture, a voice and a prompt become clips. What command line, nodes and tests call."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .clip_sampler import ClipSampler, ClipWork, LocalSampler
from .conditioning.bundle import S2VConditioning
from .conditioning.pose import pose_pixels
from .config import ExpertRouting, SamplingConfig
from .geometry import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT
from .io.clip_store import StoredClips
from .model.checkpoint import DIT, PART_LABELS, VAE
from .model.dit import ClipInputs
from .model.experts import ExpertLoad
from .networks import RunNetworks
from .sampling.clips import Clip, ClipTask, clip_noise, generate_clips
from .sampling.sound_results import check_numbers, check_pixels
from .stages import Stages


def noise_of(job: S2VConditioning, clip: int, config: SamplingConfig, device: torch.device) -> Tensor:
    """What a clip is denoised from, 1 C F h w."""
    height, width = (side // PIXELS_PER_LATENT for side in job.size_px)
    shape = (1, LATENT_CHANNELS, job.plan.clip_frames[clip] // FRAMES_PER_LATENT, height, width)
    return clip_noise(shape, config.seed, clip, device, config.noise)


def clip_told(index: int, clips: int) -> str:
    return f"clip {index + 1} of {clips}"


class S2VPipeline(Stages):
    """From a picture, a voice and a prompt to clips.

    Args:
        networks, check: as for Stages.
        sampler: who denoises clips; None for this process, with these networks.
    """

    def __init__(
        self, networks: RunNetworks, check: Callable[[], None] | None = None, sampler: ClipSampler | None = None
    ):
        super().__init__(networks, check)
        self.sampler = sampler or LocalSampler(networks, self.check)

    @property
    def expert_load(self) -> ExpertLoad:
        """What the experts of the last generated video had to do; empty for a dense model."""
        return self.sampler.expert_load

    @torch.inference_mode()
    def generate(
        self,
        conditioning: S2VConditioning,
        config: SamplingConfig,
        on_step: Callable[[ClipTask, int, Tensor], None] | None = None,
        routing: ExpertRouting | None = None,
        finished: StoredClips | None = None,
    ) -> Iterator[Clip]:
        """Yield clip after clip, each as soon as it is decoded; frames past the end of the plan are cut.

        Args:
            on_step: called with the clip's task, step (from 1) and the clean latents it predicts; may raise to stop.
            routing: how experts are used; None for models without.
            finished: clips of an earlier run with the same keys; only those behind them are made.
        Raises:
            CheckpointError: if a network gives what cannot be filmed; the clip is not yielded.
        """
        self.sampler.expert_load = ExpertLoad()
        if finished and len(finished.clip_frames) == conditioning.clips:
            return
        job, device = conditioning, self.device
        text, negative_text = job.text.to(device), job.negative_text.to(device)

        def sample(task: ClipTask) -> Tensor:
            name = clip_told(task.index, job.clips)
            work = ClipWork(self.clip_inputs(job, task, text), negative_text, config, routing, name)

            def tell(step: int, clean: Tensor) -> None:
                if on_step:
                    on_step(task, step, clean)

            return self.sampler.sample(task.noise, work, tell)

        noises = (noise_of(job, clip, config, device) for clip in range(job.clips))
        past, starts = job.video.motion_frames, job.video.starts_from_reference
        reference = job.reference.to(device)
        ways = (sample, self.encode, self.decode)
        for clip in generate_clips(*ways, reference, past, noises, starts, finished, config.colour_match):
            where = clip_told(clip.index, job.clips)
            check_numbers(clip.latents, PART_LABELS[DIT], f"sampling {where}")
            check_pixels(clip.video, reference, PART_LABELS[VAE], f"decoding {where}")
            yield replace(clip, video=clip.video[:, :, : job.plan.shown(clip.index)])

    def clip_inputs(self, job: S2VConditioning, task: ClipTask, text: Tensor) -> ClipInputs:
        """The voice, the pose and the past of one clip."""
        voice, voice_past = job.voice_of(task.index)
        return ClipInputs(
            reference_latents=task.reference_latents,
            motion_latents=task.motion_latents,
            pose_latents=self.encode_pose(job, task.index),
            audio=voice.to(self.device),
            text=text,
            motion_frames=job.geometry.motion_frames,
            audio_past=None if voice_past is None else voice_past.to(self.device),
        )

    def encode_pose(self, job: S2VConditioning, clip: int) -> Tensor | None:
        """Pose latents of one clip, 1 C F h w."""
        seen, frames = job.pose_of(clip), job.plan.clip_frames[clip]
        if seen is None:
            return None
        return self.encode(pose_pixels(seen, frames, *job.size_px))[:, :, 1:]
