"""The networks of a run: which network is where, one at a time on the card, the others in main memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .config import AUTO, MemoryLimits, S2VModelConfig
from .io.weights import Weights
from .memory.budget import WHOLE, Planned, Room, Sizes
from .memory.networks import Networks, free_unused, room_on, within_limit
from .memory.placement import Check, Placement
from .model.checkpoint import DIT, LOW_NOISE_DIT, PART_LABELS, TEXT_ENCODER, kind_of
from .model.loading import OnTensor, Part, load_part, set_types
from .model.official import check_official
from .model.parts import Checkpoint
from .prepare import LoadPlan, warn_of_cpu

NO_LIMITS = MemoryLimits()


class RunNetworks(Networks, Protocol):
    """Networks for the stages of a run, which compute as one plan says."""

    checkpoint: Checkpoint
    """Where they are read from."""
    loading: LoadPlan
    """How they are loaded and compute."""
    limits: MemoryLimits
    """What stages may use."""

    def dit_config(self) -> S2VModelConfig:
        """Of the DiT; a second one has the same."""


def sizes_of(part: Part, loading: LoadPlan) -> Sizes:
    """Sizes of a network that may not be loaded yet."""
    network = part.build()
    loading.prepare(part.kind)(network)
    return Sizes.of(Placement(set_types(network, loading.dtype(part.kind))))


def load_placed(
    checkpoint: Checkpoint, name: str, loading: LoadPlan, packs: bool, check: Check | None = None
) -> Placement:
    """A network in host memory, ready to be placed; the checkpoint lets go of what it was read from.

    Args:
        name: its kind, or LOW_NOISE_DIT.
        packs: put each layer into a piece of memory of its own as soon as it is read, so that a mapped file and these
            pieces are never in memory together.
        check: called before each tensor; may raise to stop.
    """
    placements: list[Placement] = []

    def watch(network: nn.Module, weights: Weights) -> OnTensor:
        placements.append(Placement(network))
        pack = placements[0].packer(weights.let_go) if packs else lambda name: None

        def arrived(name: str) -> None:
            pack(name)
            if check:
                check()

        return arrived

    kind = kind_of(name)
    try:
        network = load_part(checkpoint.part(name), loading.dtype(kind), "cpu", loading.prepare(kind), watch)
    finally:
        checkpoint.release(name)
    loading.finish(kind, network)
    placement = placements[0] if packs else Placement(network)  # finishing may have changed its layers
    placement.take_down()
    return placement


class CheckpointNetworks:
    """Networks from files, each loaded when it is first needed.

    Args:
        checkpoint: where they are read from.
        loading: types, device and preparation.
        offload: when networks leave the device, one of `config.OFFLOADS`.
        text_device: elsewhere for the text encoder, such as "cpu".
        limits: of memory.
        check: called while networks are loaded; may raise to stop.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        loading: LoadPlan,
        offload: str = AUTO,
        text_device: str | None = None,
        limits: MemoryLimits = NO_LIMITS,
        check: Check | None = None,
    ):
        self.checkpoint, self.loading = checkpoint, loading
        self.offload, self.limits, self.check = offload, limits, check
        self.device = loading.torch_device
        self.devices = {TEXT_ENCODER: torch.device(text_device or loading.torch_device)}
        self.placements: dict[str, Placement] = {}
        """Those that are in memory; the one that was used last comes last."""
        self._sizes: dict[str, Sizes] = {}

    def dit_config(self) -> S2VModelConfig:
        dit = self.placements.get(DIT)
        return self.checkpoint.config(DIT) if dit is None else dit.network.config

    def put(self, name: str, network: nn.Module) -> None:
        """Use this network instead of the one in the file. It lies where it is to be between stages."""
        self.placements[name] = Placement(network)

    def forget(self) -> None:
        """Let all networks go; those that are needed again are loaded again."""
        self.placements.clear()

    @property
    def loaded(self) -> dict[str, nn.Module]:
        """Those that are in memory."""
        return {name: placement.network for name, placement in self.placements.items()}

    def device_of(self, name: str) -> torch.device:
        return self.devices.get(name, self.device)

    def sizes(self, name: str) -> Sizes:
        if name not in self._sizes:
            placement = self.placements.get(name)
            known = sizes_of(self.checkpoint.part(name), self.loading) if placement is None else None
            self._sizes[name] = known or Sizes.of(placement)
        return self._sizes[name]

    def room(self, name: str) -> Room:
        device, own = self.device_of(name), self.placements.get(name)
        others = sum(other.device_bytes for other in self.placements.values() if other is not own)
        return room_on(device, self.limits, others + (own.bytes_on(device) if own else 0))

    @contextmanager
    def use(self, name: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        device, plan = self.device_of(name), planned.plan
        self.placements[name] = placement = self._placement(name, plan.locks and plan.swaps)
        if plan.swaps:
            placement.take_back()
        needed = planned.bytes - (0 if plan.swaps else placement.bytes_on(device))
        self._make_room(needed, device, placement)
        with within_limit(device, self.limits, needed):
            if plan.swaps:
                try:
                    with placement.on(device, plan, self.check) as network:
                        yield network
                finally:
                    free_unused(device)
                return
            self._send(placement, device)
            try:
                yield placement.network
            finally:
                if self.offload != AUTO:
                    placement.take_back()
                    free_unused(device)

    def recover(self) -> None:
        for placement in self.placements.values():
            placement.take_back()
        free_unused(self.device)

    def _send(self, placement: Placement, device: torch.device) -> None:
        try:
            placement.send(device, check=self.check)
        except BaseException:
            placement.take_back()
            raise

    def _make_room(self, needed_bytes: int, device: torch.device, keep: Placement) -> None:
        """Networks that stay leave for one that needs their room, the one that was used longest ago first."""
        for other in list(self.placements.values()):
            free = room_on(device, self.limits).device_bytes
            if free is None or free >= needed_bytes:
                return
            if other is not keep and other.device_bytes:
                other.take_back()
                free_unused(device)

    def _placement(self, name: str, packs: bool) -> Placement:
        known = self.placements.pop(name, None)
        return known or load_placed(self.checkpoint, name, self.loading, packs, self.check)


def open_checkpoint(
    checkpoint: str,
    loading: LoadPlan,
    offload: str = AUTO,
    text_device: str | None = None,
    noise_expert: str | None = None,
    limits: MemoryLimits = NO_LIMITS,
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
