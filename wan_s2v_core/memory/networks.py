"""Which network is where: one at a time on the card, the others in main memory."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..config import AccelerationPlan
from ..model.checkpoint import TEXT_ENCODER, kind_of
from ..model.loading import load
from .home import Home


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
