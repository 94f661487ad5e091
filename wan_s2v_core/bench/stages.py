"""The pipeline's stages, timed from idle to idle: which network, how long, how much moved, how much memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.budget import WHOLE, Planned
from ..networks import RunNetworks
from ..pipeline import S2VPipeline
from .measure import PeakMemory, now


@dataclass
class Stage:
    """What one stage cost; bytes are the device's."""

    name: str
    seconds: float
    in_seconds: float = 0.0
    """Moving the network to the device."""
    out_seconds: float = 0.0
    held_bytes: int = 0
    """When it began: its weights and what earlier stages left."""
    peak_bytes: int | None = 0
    planned_bytes: int = 0
    """What the pipeline thought it needs besides `held_bytes`; 0 where it has no opinion."""
    reserved_bytes: int = 0
    """What torch held at most, free blocks included."""
    device_bytes: int = 0
    """Of the card in use when it ended, as the driver says: with CUDA's own and what other processes use."""

    @property
    def moving_seconds(self) -> float:
        return self.in_seconds + self.out_seconds


class MeasuredNetworks:
    """Networks as another source brings them, with every stage written down. All else is the source's."""

    def __init__(self, networks: RunNetworks, name: str = ""):
        self.networks, self.name, self.stages = networks, name, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.networks, name)

    @contextmanager
    def use(self, kind: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        began = now(self.device)
        with self.networks.use(kind, planned) as network:
            ready, most = now(self.device), PeakMemory(self.device)
            held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
            yield network
            done, peak, (reserved, in_use) = now(self.device), most.bytes(), most.held_bytes()
        out_seconds = now(self.device) - done
        name = self.name or kind
        times = done - ready, ready - began, out_seconds
        self.stages.append(Stage(name, *times, held, peak, planned.working_bytes, reserved, in_use))

    @contextmanager
    def called(self, name: str) -> Iterator[None]:
        """The stages inside are known by this name."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before

    @contextmanager
    def without_network(self, name: str) -> Iterator[None]:
        began = now(self.device)
        yield
        self.stages.append(Stage(name, now(self.device) - began))


class MeasuredPipeline(S2VPipeline):
    """The pipeline with its uses of the VAE told apart."""

    def encode(self, video: Tensor) -> Tensor:
        with self.networks.called(f"vae encode, {video.shape[2]} frames"):
            return super().encode(video)

    def decode(self, latents: Tensor, keep_frames: int | None = None) -> Tensor:
        with self.networks.called(f"vae decode, {latents.shape[2]} latent frames"):
            return super().decode(latents, keep_frames)
