"""The stages of a video: one network each, under the fastest plan that fits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .conditioning.bundle import Voice
from .conditioning.hearing import hear
from .geometry import PIXELS_PER_LATENT, frames_of
from .io.audio import Recording, check_recording
from .io.outside import check_text
from .memory.attempts import Attempts
from .memory.budget import TEXT_BYTES, WHOLE, Choose, Planned, vae_plan, voice_bytes, whole
from .memory.stage import placed
from .memory.vae_room import VaeWork
from .model.checkpoint import PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .model.long_speech import WINDOWS, Windows
from .model.vae_parts import VaeParts
from .networks import RunNetworks
from .sampling.sound_results import check_embeddings, check_numbers
from .seams import replaced

T = TypeVar("T")


class Stages:
    """What each network of a run does, but for the DiT's.

    Args:
        networks: where they come from.
        check: called before every layer of every network; may raise to stop.
    """

    def __init__(self, networks: RunNetworks, check: Callable[[], None] | None = None):
        self.networks, self.check = networks, check or (lambda: None)

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
