"""Which network is where: one at a time on the card, and how much room its stage needs besides its weights."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .config import AccelerationPlan
from .model.checkpoint import TEXT_ENCODER, kind_of
from .model.loading import load

FORWARD_BYTES_PER_TOKEN = 175_000
"""Of sampling with the 14B DiT: one forward, and what two guidance branches keep of a driving video and the past.
6.0 GB at 832x480 on an H200, 4.3 GB without either, see benchmarks/README.md."""
VAE_BYTES_PER_PIXEL = 23_000
"""Of the VAE in float32, for one latent frame at a time: 22,630 to decode and 17,190 to encode on an H200, the same at
832x480 and 1280x704 and for any number of frames, see benchmarks/README.md."""


def forward_bytes(tokens: int) -> int:
    """Peak memory of one forward of the DiT besides its weights."""
    return FORWARD_BYTES_PER_TOKEN * tokens


def vae_bytes(height_px: int, width_px: int) -> int:
    """Peak memory of encoding or decoding besides the VAE's weights and the video itself."""
    return VAE_BYTES_PER_PIXEL * height_px * width_px


VOICE_BYTES_PER_SECOND = 34_000_000
"""Of wav2vec large in float32: 23 MB in its first convolutions and 10 MB for all hidden states and a copy of them."""


def voice_bytes(seconds: float) -> int:
    """Peak memory of hearing a recording besides the audio encoder's weights."""
    return round(VOICE_BYTES_PER_SECOND * seconds)


class Home:
    """The tensors of a network as they lie in main memory, to return to without copying them back from a card."""

    def __init__(self, network: nn.Module):
        owners = [held for module in network.modules() for held in (module._parameters, module._buffers)]
        self.places = [
            (held, name, tensor, tensor.data) for held in owners for name, tensor in held.items() if tensor is not None
        ]

    def take_back(self) -> None:
        """Let the network use them again; its copies elsewhere are freed."""
        for held, name, tensor, data in self.places:
            tensor.data = data
            held[name] = tensor


class Networks(Protocol):
    """Where the networks come from."""

    device: torch.device
    """Where stages compute, and where their tensors are."""
    acceleration: AccelerationPlan | None
    """How the DiT is made faster for sampling; None uses it as it is."""

    def use(self, name: str, working_bytes: int = 0) -> AbstractContextManager[nn.Module]:
        """A network on its device, for one stage that needs `working_bytes` besides the weights. `name`: its kind, or
        LOW_NOISE_DIT."""


class Loading(Protocol):
    """How networks are loaded; see `prepare.LoadPlan`."""

    device: torch.device
    acceleration: AccelerationPlan

    def dtype(self, kind: str) -> torch.dtype: ...

    def prepare(self, kind: str) -> Callable[[nn.Module], None]: ...

    def finish(self, kind: str, network: nn.Module, path: str | Path) -> None: ...


class CheckpointNetworks:
    """Networks from files, each loaded when it is first needed.

    Args:
        paths: kind, or LOW_NOISE_DIT -> file or folder.
        loading: types, device and preparation.
        offload: bring each network to the device for its stage only; it waits in main memory otherwise.
        text_device: elsewhere for the text encoder, such as "cpu".
    """

    def __init__(
        self, paths: Mapping[str, Path], loading: Loading, offload: bool = True, text_device: str | None = None
    ):
        self.paths, self.loading, self.offload = paths, loading, offload
        self.device, self.acceleration = loading.device, loading.acceleration
        self.devices = {TEXT_ENCODER: torch.device(text_device or loading.device)}
        self.loaded: dict[str, nn.Module] = {}
        self.homes: dict[str, Home] = {}

    @contextmanager
    def use(self, name: str, working_bytes: int = 0) -> Iterator[nn.Module]:
        device, kind = self.devices.get(name, self.device), kind_of(name)
        home = torch.device("cpu") if self.offload else device
        if name not in self.loaded:
            loading = self.loading
            network = load(self.paths[name], kind, loading.dtype(kind), home, loading.prepare(kind))
            loading.finish(kind, network, self.paths[name])
            self.loaded[name] = network
        if self.offload and name not in self.homes:
            self.homes[name] = Home(self.loaded[name])
        try:
            yield self.loaded[name].to(device)
        finally:
            if self.offload and device.type != "cpu":
                self.homes[name].take_back()
                gc.collect()
                torch.cuda.empty_cache()
