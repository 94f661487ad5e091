"""Which network is where: one at a time on the card, the others in main memory."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..config import AccelerationPlan, MemoryLimits, S2VModelConfig
from ..io.weights import Weights
from ..model.checkpoint import DIT, TEXT_ENCODER, kind_of
from ..model.loading import OnTensor, find_part, load, set_types
from .activations import ForwardWay
from .budget import CONTEXT_BYTES, WHOLE, Planned, Room, Sizes, free_ram_bytes
from .placement import Placement
from .vae_room import VaeWay


class Loading(Protocol):
    """How networks are loaded; see `prepare.LoadPlan`."""

    device: torch.device
    acceleration: AccelerationPlan
    vae_way: VaeWay | None

    def forward_way(self, config: S2VModelConfig) -> ForwardWay: ...

    def dtype(self, kind: str) -> torch.dtype: ...

    def prepare(self, kind: str) -> Callable[[nn.Module], None]: ...

    def finish(self, kind: str, network: nn.Module, path: str | Path) -> None: ...


class Networks(Protocol):
    """Where the networks come from."""

    device: torch.device
    """Where stages compute, and where their tensors are."""
    acceleration: AccelerationPlan | None
    """How the DiT is made faster for sampling; None uses it as it is."""
    limits: MemoryLimits
    """What stages may use."""
    loading: Loading
    """How they are loaded and compute."""
    names: tuple[str, ...]
    """Which there are."""

    def dit_config(self) -> S2VModelConfig:
        """Of the DiT; a second one has the same."""

    def use(self, name: str, planned: Planned = WHOLE) -> AbstractContextManager[nn.Module]:
        """A network on its device for one stage, as planned. `name`: its kind, or LOW_NOISE_DIT."""

    def room(self, name: str) -> Room:
        """What a stage with that network may use now, its weights included."""

    def recover(self) -> None:
        """Give back all memory that no stage needs now, because one ran out of it."""

    def sizes(self, name: str) -> Sizes:
        """Of a network, whether it is loaded or not."""


def sizes_of(path: str | Path, kind: str, loading: Loading) -> Sizes:
    """Sizes of a network that may not be loaded yet."""
    network = find_part(path, kind).build()
    loading.prepare(kind)(network)
    return Sizes.of(Placement(set_types(network, loading.dtype(kind))))


def load_placed(path: str | Path, kind: str, loading: Loading, packs: bool) -> Placement:
    """A network in main memory, ready to be placed.

    Args:
        packs: put each layer into a piece of memory of its own as soon as it is read, so that a mapped file and these
            pieces are never in memory together.
    """
    placements: list[Placement] = []

    def watch(network: nn.Module, weights: Weights) -> OnTensor:
        placements.append(Placement(network))
        return placements[0].packer(weights.let_go)

    network = load(path, kind, loading.dtype(kind), "cpu", loading.prepare(kind), watch if packs else None)
    loading.finish(kind, network, path)
    placement = placements[0] if packs else Placement(network)
    placement.settle()
    return placement


class CheckpointNetworks:
    """Networks from files, each loaded when it is first needed.

    Args:
        paths: kind, or LOW_NOISE_DIT -> file or folder.
        loading: types, device and preparation.
        offload: bring each network to the device for its stage only; it waits in main memory otherwise.
        text_device: elsewhere for the text encoder, such as "cpu".
        limits: of memory.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        loading: Loading,
        offload: bool = True,
        text_device: str | None = None,
        limits: MemoryLimits = MemoryLimits(),  # noqa: B008  (frozen)
    ):
        self.paths, self.loading, self.offload, self.limits = paths, loading, offload, limits
        self.device, self.acceleration = loading.device, loading.acceleration
        self.devices = {TEXT_ENCODER: torch.device(text_device or loading.device)}
        self.placements: dict[str, Placement] = {}
        self.staying: dict[str, nn.Module] = {}
        """Networks that do not leave the device behind their stage."""
        self._sizes: dict[str, Sizes] = {}
        self._dit_config: S2VModelConfig | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple({**self.paths, **self.loaded})

    def dit_config(self) -> S2VModelConfig:
        if self._dit_config is None:
            dit = self.loaded.get(DIT)
            self._dit_config = find_part(self.paths[DIT], DIT).config if dit is None else dit.config
        return self._dit_config

    def put(self, name: str, network: nn.Module) -> None:
        """Use this network instead of the one in the file. It lies where it is to be between stages."""
        if self.offload:
            self.placements[name] = Placement(network)
        else:
            self.staying[name] = network

    def forget(self) -> None:
        """Let all networks go; those that are needed again are loaded again."""
        self.placements.clear()
        self.staying.clear()

    @property
    def loaded(self) -> dict[str, nn.Module]:
        """Those that are in memory."""
        return self.staying | {name: placement.network for name, placement in self.placements.items()}

    def device_of(self, name: str) -> torch.device:
        return self.devices.get(name, self.device)

    def sizes(self, name: str) -> Sizes:
        if name not in self._sizes:
            network = self.loaded.get(name)
            known = sizes_of(self.paths[name], kind_of(name), self.loading) if network is None else None
            self._sizes[name] = known or Sizes.of(Placement(network))
        return self._sizes[name]

    def room(self, name: str) -> Room:
        staying = sum(self.sizes(other).whole for other in self.staying)
        return room_on(self.device_of(name), self.limits, staying)

    @contextmanager
    def use(self, name: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        device, plan = self.device_of(name), planned.plan
        free = room_on(device, self.limits).device_bytes
        if plan.swaps or (free is not None and planned.bytes > free):
            self._send_others_away(name)
        if not self.offload and not plan.swaps:
            yield self._on_device(name, device)
            return
        try:
            with self._placement(name, plan.locks and plan.swaps).on(device, plan) as network:
                yield network
        finally:
            free_unused(device)

    def recover(self) -> None:
        self.staying.clear()
        free_unused(self.device)

    def _send_others_away(self, name: str) -> None:
        """They were to stay, but their room is needed."""
        for other in [other for other in self.staying if other != name]:
            del self.staying[other]
        free_unused(self.device)

    def _on_device(self, name: str, device: torch.device) -> nn.Module:
        """A network that stays there."""
        if name not in self.staying:
            self.placements.pop(name, None)
            kind, loading = kind_of(name), self.loading
            network = load(self.paths[name], kind, loading.dtype(kind), device, loading.prepare(kind))
            loading.finish(kind, network, self.paths[name])
            self.staying[name] = network
        return self.staying[name]

    def _placement(self, name: str, packs: bool) -> Placement:
        if name not in self.placements:
            self.placements[name] = load_placed(self.paths[name], kind_of(name), self.loading, packs)
        return self.placements[name]


def room_on(device: torch.device, limits: MemoryLimits, returnable_bytes: int = 0) -> Room:
    """What may be used of a device now.

    Args:
        returnable_bytes: what lies there and would leave for others.
    """
    if device.type != "cuda":
        return Room(None, free_ram_bytes(), limits.weights)
    allocated = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    if limits.vram_limit_gb is not None:
        free = min(free, round(limits.vram_limit_gb * 1e9) - CONTEXT_BYTES - allocated)
    return Room(free + returnable_bytes, free_ram_bytes(), limits.weights)


def free_unused(device: torch.device) -> None:
    """Give memory back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
