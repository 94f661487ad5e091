"""Puts the parts together: a picture, a voice and a prompt become clips. What command line, nodes and tests call."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .conditioning.audio import FEATURE_HZ, clip_count, resample_features, voice_per_frame
from .conditioning.image import fit_picture
from .conditioning.pose import pose_pixels
from .config import SamplingConfig, VideoConfig
from .errors import BackendUnavailable, CheckpointError
from .geometry import (
    FIRST_CLIP_SKIP,
    FRAMES_PER_LATENT,
    LATENT_CHANNELS,
    PIXELS_PER_LATENT,
    ClipGeometry,
    ClipPlan,
    output_size,
    plan_clips,
)
from .model.audio_encoder import SPEECH_FEATURE_HZ
from .model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .model.dit import ClipInputs, S2VTransformer
from .model.loading import find_part, load
from .sampling.clips import Clip, ClipTask, clip_noise, generate_clips
from .sampling.denoise import OnStep, denoise
from .sampling.guidance import classifier_free_guidance, map_needed
from .seams import Denoiser

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Job:
    """Everything that a video is made from, encoded but for the VAE's part."""

    plan: ClipPlan
    geometry: ClipGeometry
    video: VideoConfig
    reference: Tensor
    """1 3 1 H W in [-1, 1]."""
    voice: Tensor
    """1 A E T, one embedding for every frame that the clips make."""
    text: Tensor
    negative_text: Tensor
    pose: Callable[[int, int], Tensor] | None = None
    """(first frame, frames) -> T H W 3 uint8 of the driving video, fewer when it has ended."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.reference.shape[-2:])


def make_plan(seconds: float, feature_frames: int, video: VideoConfig, geometry: ClipGeometry) -> ClipPlan:
    """The clips for a recording of `seconds` whose features have `feature_frames` frames at 30 Hz."""
    skip = 0 if video.starts_from_reference else FIRST_CLIP_SKIP
    lead = skip if video.timing == "aligned" else 0
    if video.clip_plan == "audio":
        plan = plan_clips(round(video.fps * seconds), geometry, skip, lead)
    else:
        whole = clip_count(feature_frames, geometry.clip_frames, video.fps) * geometry.clip_frames
        plan = ClipPlan((geometry.clip_frames,) * (whole // geometry.clip_frames), whole - skip, skip, lead)
    lengths = plan.clip_frames[: video.clips]
    return replace(plan, clip_frames=lengths, frames=min(plan.frames, sum(lengths) - skip))


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


def check_parts(checkpoint: Path) -> None:
    """Whether the four networks of a checkpoint fit each other, before any of them is loaded.

    Raises:
        CheckpointError: if one is missing, or voice or text are of another width than the DiT reads.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no folder. Give the folder of Wan2.2-S2V-14B, or one in its layout.")
    dit, text, speech, _ = (find_part(checkpoint, kind).config for kind in (DIT, TEXT_ENCODER, SPEECH_ENCODER, VAE))
    for what, given, wanted in (
        ("the text encoder gives embeddings of width", text["d_model"], dit.text_width),
        ("the audio encoder gives features of width", speech["hidden_size"], dit.audio_width),
        ("the audio encoder gives layers", speech["num_hidden_layers"] + 1, dit.audio_layers),
    ):
        if given != wanted:
            raise CheckpointError(
                f"{checkpoint}: {what} {given}, the DiT reads {wanted}. Use the parts that came with the DiT."
            )


class S2VPipeline:
    """A checkpoint folder, whose networks are loaded when they are first needed.

    Args:
        checkpoint: the official layout.
        device, dtype: where and in which precision the DiT and the text encoder run; VAE and wav2vec stay float32.
        offload: bring each network to the device for its stage only; it waits in main memory otherwise.
        text_device: elsewhere for the text encoder, such as "cpu".
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = True,
        text_device: str | None = None,
    ):
        self.checkpoint, self.device, self.dtype, self.offload = Path(checkpoint), torch.device(device), dtype, offload
        self.devices = {TEXT_ENCODER: torch.device(text_device or device)}
        self.networks: dict[str, nn.Module] = {}

    @contextmanager
    def network(self, kind: str) -> Iterator[nn.Module]:
        """One network on its device, for one stage."""
        home = torch.device("cpu") if self.offload else self.devices.get(kind, self.device)
        if kind not in self.networks:
            dtype = self.dtype if kind in (DIT, TEXT_ENCODER) else torch.float32
            self.networks[kind] = load(self.checkpoint, kind, dtype, home)
        try:
            yield self.networks[kind].to(self.devices.get(kind, self.device))
        finally:
            if self.offload and self.device.type != "cpu":
                self.networks[kind].to(home)
                gc.collect()
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def encode_prompts(self, *prompts: str) -> tuple[Tensor, ...]:
        """Each 1 L E on the device."""
        with self.network(TEXT_ENCODER) as encoder:
            return tuple(encoder.encode(prompt).to(self.device) for prompt in prompts)

    @torch.inference_mode()
    def encode_voice(self, samples: Tensor) -> Tensor:
        """Mono samples at 16 kHz -> features A T E at 30 Hz on the device."""
        with self.network(SPEECH_ENCODER) as encoder:
            return resample_features(encoder.hidden_states(samples), SPEECH_FEATURE_HZ, FEATURE_HZ).to(self.device)

    def prepare(
        self,
        picture: Tensor,
        samples: Tensor,
        seconds: float,
        prompts: tuple[str, str],
        video: VideoConfig,
        pose: Callable[[int, int], Tensor] | None = None,
    ) -> Job:
        """Encode the inputs of a video.

        Args:
            picture: H W 3, uint8.
            samples: mono at 16 kHz, of `seconds` seconds.
            prompts: prompt and negative prompt.
        """
        check_parts(self.checkpoint)
        geometry = ClipGeometry(video.clip_frames, video.motion_frames)
        size = output_size(*picture.shape[:2], video.max_area)
        features = self.encode_voice(samples)
        plan = make_plan(seconds, features.shape[1], video, geometry)
        text, negative_text = self.encode_prompts(*prompts)
        log.info("%d frames of %dx%d px in %d clips", plan.frames, size[1], size[0], len(plan.clip_frames))
        return Job(
            plan=plan,
            geometry=geometry,
            video=video,
            reference=fit_picture(picture, *size, video.fit).to(self.device),
            voice=voice_per_frame(features, plan.total, video.fps, plan.lead),
            text=text,
            negative_text=negative_text,
            pose=pose,
        )

    @torch.inference_mode()
    def generate(
        self, job: Job, config: SamplingConfig, on_step: Callable[[int, int], None] | None = None
    ) -> Iterator[Clip]:
        """Yield clip after clip, each as soon as it is decoded; frames past the end of the plan are cut.

        Args:
            on_step: called with clip and step (from 1) after each; may raise to stop.
        """
        height, width = (side // PIXELS_PER_LATENT for side in job.size_px)

        def sample(task: ClipTask) -> Tensor:
            inputs = self.clip_inputs(job, task)

            def tell(step: int, _: Tensor) -> None:
                if on_step:
                    on_step(task.index, step)

            with self.network(DIT) as model:
                return sample_clip(model, inputs, job.negative_text, task.noise, config, tell)

        shapes = ((1, LATENT_CHANNELS, frames // FRAMES_PER_LATENT, height, width) for frames in job.plan.clip_frames)
        noises = (clip_noise(shape, config.seed, index, self.device) for index, shape in enumerate(shapes))
        left = job.plan.frames
        starts = job.video.starts_from_reference
        for clip in generate_clips(
            sample, self.encode, self.decode, job.reference, job.video.motion_frames, noises, starts
        ):
            kept = clip.video[:, :, :left]
            left -= kept.shape[2]
            yield replace(clip, video=kept)

    def clip_inputs(self, job: Job, task: ClipTask) -> ClipInputs:
        """The voice, the pose and the past of one clip."""
        first, frames = sum(job.plan.clip_frames[: task.index]), job.plan.clip_frames[task.index]
        return ClipInputs(
            reference_latents=task.reference_latents,
            motion_latents=task.motion_latents,
            pose_latents=self.encode_pose(job, task.index),
            audio=job.voice[..., first : first + frames],
            text=job.text,
            motion_frames=job.geometry.motion_frames,
        )

    def encode_pose(self, job: Job, clip: int) -> Tensor | None:
        """Pose latents of one clip, 1 C F h w; the driving video goes on from clip to clip."""
        if job.pose is None:
            return None
        start, frames = job.plan.start(clip), job.plan.clip_frames[clip]
        seen = job.pose(max(0, start), frames + min(0, start))
        if start < 0 and len(seen):  # before time 0 the first pose is held
            seen = torch.cat([seen[:1].expand(-start, -1, -1, -1), seen])
        return self.encode(pose_pixels(seen, frames, *job.size_px).to(self.device))[:, :, 1:]

    def encode(self, video: Tensor) -> Tensor:
        with self.network(VAE) as vae:
            return vae.encode(video)

    def decode(self, latents: Tensor) -> Tensor:
        with self.network(VAE) as vae:
            return vae.decode(latents)
