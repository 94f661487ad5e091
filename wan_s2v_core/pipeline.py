"""Puts the parts together: a picture, a voice and a prompt become clips. What command line, nodes and tests call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .clip_sampler import ClipSampler, LocalSampler
from .conditioning.bundle import S2VConditioning, Voice
from .conditioning.hearing import hear
from .conditioning.keys import ClipKeys
from .conditioning.pose import pose_pixels
from .config import AUTO, ExpertRouting, MemoryLimits, SamplingConfig
from .errors import BackendUnavailable
from .geometry import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT, frames_of
from .io.audio import Recording, check_recording
from .io.clip_store import StoredClips
from .io.outside import check_text
from .memory.attempts import Attempts
from .memory.budget import (
    TEXT_BYTES,
    WHOLE,
    Choose,
    Planned,
    vae_plan,
    voice_bytes,
    whole,
)
from .memory.stage import placed
from .memory.vae_room import VaeWork
from .model.checkpoint import DIT, LOW_NOISE_DIT, PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .model.dit import ClipInputs
from .model.experts import ExpertLoad
from .model.long_speech import WINDOWS, Windows
from .model.official import check_official
from .model.parts import Checkpoint
from .model.vae_parts import VaeParts
from .networks import CheckpointNetworks, RunNetworks
from .prepare import LoadPlan, picture_facts, warn_of_cpu
from .sampling.clips import Clip, ClipTask, clip_noise, generate_clips
from .sampling.sound_results import check_embeddings, check_numbers, check_pixels
from .seams import replaced

T = TypeVar("T")


def noise_of(job: S2VConditioning, clip: int, config: SamplingConfig, device: torch.device) -> Tensor:
    """What a clip is denoised from, 1 C F h w."""
    height, width = (side // PIXELS_PER_LATENT for side in job.size_px)
    shape = (1, LATENT_CHANNELS, job.plan.clip_frames[clip] // FRAMES_PER_LATENT, height, width)
    return clip_noise(shape, config.seed, clip, device, config.noise)


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        BackendUnavailable: if tensors cannot be placed there.
    """
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BackendUnavailable(f"device {name!r} cannot be used: {reason}. Use cpu, or cuda with a card.") from error
    return device


def open_checkpoint(
    checkpoint: str,
    loading: LoadPlan,
    offload: str = AUTO,
    text_device: str | None = None,
    noise_expert: str | None = None,
    limits: MemoryLimits = MemoryLimits(),  # noqa: B008  (frozen)
) -> CheckpointNetworks:
    """The networks of a checkpoint folder, found and checked but not loaded. Arguments as for CheckpointNetworks.

    Args:
        noise_expert: file or folder of a second DiT.
    Raises:
        CheckpointError, ConfigError: if a part is missing or does not fit the others.
    """
    folder = Path(checkpoint)
    check_official(folder)
    second = {LOW_NOISE_DIT: noise_expert} if noise_expert else {}
    opened = Checkpoint({**dict.fromkeys(PART_LABELS, folder), **second})
    opened.check()
    warn_of_cpu(opened.config(DIT), loading.torch_device)
    return CheckpointNetworks(opened, loading, offload, text_device, limits)


def clip_keys(
    job: S2VConditioning,
    config: SamplingConfig,
    routing: ExpertRouting | None,
    checkpoint: Checkpoint,
    loading: LoadPlan,
) -> ClipKeys:
    """The keys of the clips that `generate` makes of this with networks of a checkpoint."""
    facts = {
        "networks": picture_facts(checkpoint, loading),
        "sampling": config.to_dict(),
        "routing": routing and routing.to_dict(),
    }
    return ClipKeys(job, facts)


def clip_told(index: int, clips: int) -> str:
    return f"clip {index + 1} of {clips}"


class S2VPipeline:
    """The stages of a video, each with the network it needs.

    Args:
        networks: where they come from.
        check: called before every layer of every network; may raise to stop.
        sampler: who denoises clips; None for this process, with these networks.
    """

    def __init__(
        self, networks: RunNetworks, check: Callable[[], None] | None = None, sampler: ClipSampler | None = None
    ):
        self.networks, self.check = networks, check or (lambda: None)
        self.sampler = sampler or LocalSampler(networks, self.check)

    @property
    def expert_load(self) -> ExpertLoad:
        """What the experts of the last generated video had to do; empty for a dense model."""
        return self.sampler.expert_load

    @property
    def device(self) -> torch.device:
        return self.networks.device

    @contextmanager
    def network(self, name: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        """One network, for one stage, as planned. `name`: as for `Networks.use`."""
        parts = VaeParts(planned.plan.tile_px, is_apart=not planned.plan.holds_pixels)
        with placed(self.networks, name, planned, self.check) as network:
            changes = [(network, "parts", parts)] if name == VAE else []
            with replaced(changes):
                yield network

    def run(self, name: str, choose: Choose, work: Callable[[nn.Module], T]) -> T:
        """Do a stage's work with its network, under the fastest plan that fits.

        Raises:
            OutOfMemory: if none does.
        """

        def attempt(planned: Planned) -> T:
            with self.network(name, planned) as network:
                return work(network)

        return Attempts(self.networks, name, choose).run(attempt)

    @torch.inference_mode()
    def encode_prompts(self, *prompts: str) -> tuple[Tensor, ...]:
        """Each 1 L E, in main memory.

        Raises:
            ConfigError: if one is no text that can be read.
            CheckpointError: if no embeddings can be computed.
        """
        for prompt in prompts:
            check_text("the prompt", prompt)
        made = self.run(
            TEXT_ENCODER,
            whole(TEXT_BYTES),
            lambda encoder: tuple(encoder.encode(prompt).cpu() for prompt in prompts),
        )
        return tuple(check_embeddings(text, PART_LABELS[TEXT_ENCODER], "reading the prompt") for text in made)

    @torch.inference_mode()
    def encode_voice(self, recording: Recording, windows: Windows = WINDOWS, folder: Path | None = None) -> Voice:
        """What the audio encoder hears in a recording.

        Args:
            windows: how a long one is cut; shorter windows take less memory.
            folder: for what is heard in a very long one; None for the system's temporary folder.
        Raises:
            ConfigError: if no features can be computed from it, or the disk has no room for those of a long one.
            CheckpointError: if the encoder's weights give none.
        """
        check_recording(recording)

        needed, samples = voice_bytes(recording.seconds, windows), recording.speech()
        voice = self.run(
            SPEECH_ENCODER, whole(needed), lambda encoder: Voice(recording, hear(encoder, samples, windows, folder))
        )
        check_embeddings(voice.features, PART_LABELS[SPEECH_ENCODER], "hearing the voice")
        return voice

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
            inputs = self.clip_inputs(job, task, text)

            def tell(step: int, clean: Tensor) -> None:
                if on_step:
                    on_step(task, step, clean)

            told = clip_told(task.index, job.clips)
            return self.sampler.sample(task.noise, inputs, negative_text, config, tell, routing, told)

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

    def encode(self, video: Tensor) -> Tensor:
        """B 3 T H W, on the device or in main memory -> latents B C F h w, on the device."""
        frames, height, width = video.shape[2:]
        work = VaeWork(height, width, frames, decodes=False)
        latents = self.run(VAE, self.coding_plan(work), lambda vae: vae.encode(video))
        return check_numbers(latents, PART_LABELS[VAE], f"encoding {frames} frames")

    def decode(self, latents: Tensor, keep_frames: int | None = None) -> Tensor:
        """B C F h w -> the last `keep_frames` of the video, or all, B 3 T H W; in main memory where room is short."""
        frames, height, width = latents.shape[2:]
        height, width = PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width
        work = VaeWork(height, width, frames_of(frames), decodes=True, keep_frames=keep_frames)
        return self.run(VAE, self.coding_plan(work), lambda vae: vae.decode(latents, keep_frames))

    def coding_plan(self, work: VaeWork) -> Choose:
        """How the VAE can do its work."""
        return vae_plan(work, self.networks.loading.vae_way, self.networks.limits)
