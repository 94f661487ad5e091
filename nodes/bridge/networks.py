"""The loaded networks, under ComfyUI's memory manager."""

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management as manager
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...wan_s2v_core.config import (
    ALWAYS,
    NOISE_BOUNDARY,
    AccelerationPlan,
    ExpertRouting,
    MemoryLimits,
    ModelRecipe,
    S2VModelConfig,
    SamplingConfig,
)
from ...wan_s2v_core.errors import ConfigError
from ...wan_s2v_core.memory.budget import WHOLE, Planned, Room, Sizes
from ...wan_s2v_core.memory.networks import room_on, within_limit
from ...wan_s2v_core.memory.placement import Placement
from ...wan_s2v_core.model.checkpoint import DIT, LOW_NOISE_DIT, PART_LABELS
from ...wan_s2v_core.model.parts import Checkpoint
from ...wan_s2v_core.networks import load_placed, sizes_of
from ...wan_s2v_core.prepare import AUTO, plan_loading
from ..limits import SMALL_STATES, limits_in_prompt, reserved_bytes, started_limits
from .folders import stamp_of
from .warm_up import wait_until_warm

log = logging.getLogger(__name__)

check_interrupt = manager.throw_exception_if_processing_interrupted
"""Raises ComfyUI's own exception when the user has pressed cancel."""


def is_host(device: torch.device) -> bool:
    """Whether networks compute where they lie anyway."""
    return device == torch.device("cpu")


def free_ram_bytes() -> int:
    return manager.get_free_memory(torch.device("cpu"))


class WanS2VNetwork(nn.Module):
    """What ComfyUI's memory manager sees of a network of ours. Its weights move with their placement alone."""

    def __init__(self, placement: Placement):
        super().__init__()
        self.network, self.placement, self.device = placement.network, placement, torch.device("cpu")


class NetworkPatcher(comfy.model_patcher.ModelPatcher):
    """Lets ComfyUI take a network of ours off the GPU when it needs the room. A network is there as a whole or not at
    all; where only layers of one are to be there, they move by themselves (`memory.block_swap`)."""

    def __init__(self, placement: Placement, device: torch.device):
        super().__init__(WanS2VNetwork(placement), device, torch.device("cpu"), size=placement.bytes)
        self.placement = placement

    def loaded_size(self) -> int:
        return self.placement.device_bytes

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.placement.device_bytes else self.offload_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        try:
            self.placement.send(device_to, check=check_interrupt)
        except BaseException:
            self.placement.take_back()
            raise
        return self.loaded_size()

    def partially_unload(self, device_to, memory_to_free=0, *args, **options) -> int:
        freed = self.loaded_size()
        self.placement.take_back()
        return freed

    def detach(self, unpatch_all=True) -> WanS2VNetwork:
        self.placement.take_back()
        return self.model

    def get_ram_usage(self) -> int:
        return self.placement.host_bytes


class Place:
    """Where the network of one file is kept."""

    def __init__(self):
        self.made_from: tuple | None = None
        self.patcher: NetworkPatcher | None = None
        self.sizes: tuple[tuple, Sizes] | None = None
        """What they were measured for, and they."""


PLACES: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
"""(kind, path) -> Place. A network lives as long as ComfyUI keeps the output of a loader that names it."""
PLACES_LOCK = threading.Lock()
"""A forecast asks for places in a thread of its own."""


@dataclass(frozen=True)
class Details:
    """What few people change about a run: nodes before the sampler say it, each its part."""

    noise: str = SamplingConfig.noise
    spacing: str = SamplingConfig.spacing
    noise_boundary: float = NOISE_BOUNDARY
    """For two models alone."""
    top_k: int | None = ExpertRouting.top_k
    overflow: str = ExpertRouting.overflow
    gate_dropout: float = ExpertRouting.gate_dropout


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """What a loader gives: a recipe, and the place of its network, which all that name that file share.

    What follows the recipe is for the DiT of a run.
    """

    recipe: ModelRecipe
    acceleration: AccelerationPlan = AccelerationPlan()  # noqa: RUF009  (frozen)
    """How the networks of a run are made faster."""
    accelerated_in: str | None = None
    """The node that says so; it shows what came of it."""
    limits: MemoryLimits = MemoryLimits()  # noqa: RUF009  (frozen)
    """What memory a run may use."""
    details: Details = Details()
    low_noise: "Model | None" = None
    """A second DiT, for steps of low noise."""
    place: Place = field(init=False)

    def __post_init__(self):
        with PLACES_LOCK:
            place = PLACES.setdefault((self.recipe.kind, self.recipe.path), Place())
        object.__setattr__(self, "place", place)

    @property
    def patcher(self) -> NetworkPatcher | None:
        """The network as ComfyUI manages it, once it has been loaded. ComfyUI's caches look for it by this name."""
        return self.place.patcher

    def get_ram_usage(self) -> int:
        """Bytes of host memory; asked for by ComfyUI 0.3.75."""
        return self.patcher.get_ram_usage() if self.patcher else 0

    def _comfy_cache_tensors(self) -> list[Tensor]:
        """What takes host memory; asked for by ComfyUI 0.38 and later."""
        return self.patcher.placement.host_tensors() if self.patcher else []

    def with_acceleration(self, plan: AccelerationPlan, node_id: str) -> "Model":
        """The same network, in the same place, under another plan."""
        return replace(self, acceleration=plan, accelerated_in=node_id)

    def with_limits(self, limits: MemoryLimits) -> "Model":
        """The same network, in the same place, with other limits."""
        return replace(self, limits=limits)

    def with_details(self, **changed: Any) -> "Model":
        """The same network, in the same place, with other values of some `Details`."""
        return replace(self, details=replace(self.details, **changed))

    def with_low_noise(self, second: "Model", noise_boundary: float) -> "Model":
        """The same network, in the same place, and a second one for steps whose sigma is below the boundary.

        Raises:
            ConfigError: if one of them is a pair already.
        """
        for name, one in (("model", self), ("low_noise_model", second)):
            if one.low_noise is not None:
                raise ConfigError(
                    f"{name} is a pair of models already, and a run has two at most. Connect a loader's model."
                )
        return replace(self.with_details(noise_boundary=noise_boundary), low_noise=second)


class ComfyNetworks:
    """Networks of loaders, each placed on the card by ComfyUI's memory manager when its stage begins.

    All of them are made faster as the DiT among them says, which brings the second of a pair with it.

    Args:
        precision: of the DiT and the text encoder; the audio encoder stays float32.
        offload: when networks leave the GPU, one of `config.OFFLOADS`.
        on_cpu: leave all of them in main memory.
        text_precision: of the text encoder, see `prepare.TEXT_PRECISIONS`.
        limits: what memory a run may use. None: what the DiT among the models says, or else the running prompt.
    """

    def __init__(
        self,
        *models: Model,
        precision: str = AUTO,
        offload: str = AUTO,
        on_cpu: bool = False,
        text_precision: str = AUTO,
        limits: MemoryLimits | None = None,
    ):
        self.models = {model.recipe.kind: model for model in models}
        if DIT in self.models and self.models[DIT].low_noise is not None:
            self.models[LOW_NOISE_DIT] = self.models[DIT].low_noise
        self.checkpoint = Checkpoint({name: model.recipe.path for name, model in self.models.items()})
        card = manager.get_torch_device()
        self.device = torch.device("cpu") if on_cpu else card
        acceleration = self.models[DIT].acceleration if DIT in self.models else AccelerationPlan()
        planned = plan_loading(precision, card, acceleration, text_precision)
        self.loading = replace(planned, device=str(self.device))
        if limits is None:
            limits = self.models[DIT].limits if DIT in self.models else limits_in_prompt()
        self.limits = started_limits(limits)
        self.offload = ALWAYS if manager.vram_state in SMALL_STATES or manager.DISABLE_SMART_MEMORY else offload

    @contextlib.contextmanager
    def use(self, name: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        swaps = planned.plan.swaps
        patcher = self._patcher(name, planned.plan.locks and swaps)
        placement, entry = patcher.placement, manager.LoadedModel(patcher)
        if swaps:
            patcher.detach()
        missing = planned.weight_bytes if swaps else patcher.model_size() - patcher.loaded_size()
        self._make_room(missing, planned.working_bytes, entry)
        with within_limit(self.device, self.limits, missing + planned.working_bytes):
            if swaps:
                try:
                    with placement.on(self.device, planned.plan, check_interrupt) as network:
                        yield network
                finally:
                    manager.soft_empty_cache()
                return
            self._bring(entry)
            try:
                yield placement.network
            finally:
                if self.offload != AUTO and placement.device_bytes:
                    patcher.detach()
                    manager.soft_empty_cache()

    def _bring(self, entry: manager.LoadedModel) -> None:
        """All of a network comes to the device, listed there with ComfyUI, which may take it off later on.

        `load_models_gpu` would also ask for pinned memory of the network's size, and take that from others.
        """
        if is_host(self.device):
            return
        listed = manager.current_loaded_models
        if entry in listed:
            entry = listed.pop(listed.index(entry))
        if entry.model.loaded_size() < entry.model.model_size():
            entry.model_load()
        listed.insert(0, entry)

    def _make_room(self, weight_bytes: int, working_bytes: int, keep: manager.LoadedModel) -> None:
        """Let ComfyUI take other networks off the device until so much is free, of what this run may use."""
        if is_host(self.device):
            return
        free = room_on(self.device, self.limits, 0, reserved_bytes()).device_bytes
        if free is None:  # a device whose memory ComfyUI alone can tell
            working_bytes = max(working_bytes + reserved_bytes(), manager.minimum_inference_memory())
        else:  # what ComfyUI counts as free, but is not for us
            working_bytes += manager.get_free_memory(self.device) - free
        manager.free_memory(weight_bytes + working_bytes, self.device, [keep])

    def room(self, name: str) -> Room:
        """What is free, and what ComfyUI can make free by taking other networks off the card."""
        loaded = [entry.model for entry in manager.current_loaded_models if entry.device == self.device]
        returnable = sum(patcher.loaded_size() for patcher in loaded if patcher is not None)
        return room_on(self.device, self.limits, returnable, reserved_bytes())

    def dit_config(self) -> S2VModelConfig:
        return self.checkpoint.config(DIT)

    def sizes(self, name: str) -> Sizes:
        model = self.models[name]
        wait_until_warm(model.recipe.kind)
        made_from = self._made_from(model.recipe)
        if model.place.sizes is None or model.place.sizes[0] != made_from:
            model.place.sizes = made_from, sizes_of(self.checkpoint.part(name), self.loading)
        return model.place.sizes[1]

    def recover(self) -> None:
        manager.unload_all_models()
        manager.soft_empty_cache()

    def _patcher(self, name: str, packs: bool) -> NetworkPatcher:
        """The network under ComfyUI's management, loaded unless it is there as it is wanted. `packs`: see
        `load_placed`."""
        recipe, place = self.models[name].recipe, self.models[name].place
        wait_until_warm(recipe.kind)
        if place.made_from != (wanted := self._made_from(recipe)):
            place.made_from = place.patcher = None  # two of one network would take twice the memory
            log.info("loading the %s of %s", PART_LABELS[recipe.kind], Path(recipe.path).name)
            placement = load_placed(self.checkpoint, name, self.loading, packs, check_interrupt)
            place.patcher = NetworkPatcher(placement, self.device)
            place.made_from = wanted  # of before: a file that was replaced meanwhile is loaded again
        return place.patcher

    def _made_from(self, recipe: ModelRecipe) -> tuple:
        """Changes when a network has to be loaded again."""
        return stamp_of(recipe), self.loading.concerning(recipe.kind)
