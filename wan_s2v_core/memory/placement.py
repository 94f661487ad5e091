"""A network on a device for the time of a stage: whole, or with most of its layers in main memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import OffloadPlan
from ..io.maps import is_mapped
from ..model.dit import S2VTransformer
from ..model.text_encoder import TextEncoder
from .block_swap import BlockSwap, Lane, new_memory, residents
from .home import Home, PackedLayer, places_in
from .upload import Upload

Check = Callable[[], None]
EVERYTHING = OffloadPlan()


@dataclass(frozen=True)
class LayerLists:
    """What of a network can be away while other parts compute."""

    blocks: Sequence[nn.Module] = ()
    """In the order in which they compute."""
    injectors: Sequence[nn.Module] = ()
    """Of one size, in order, three or four blocks apart: time enough to fetch the next into the place of the last."""
    seldom: Sequence[nn.Module] = ()
    """Used once for a clip or a step."""
    tables: Sequence[nn.Module] = ()
    """Looked up in main memory, so that they need not leave it."""

    @property
    def all(self) -> list[nn.Module]:
        return [*self.blocks, *self.injectors, *self.seldom]


def layer_lists(network: nn.Module) -> LayerLists:
    """The lists for our networks; empty for those that are small."""
    if isinstance(network, S2VTransformer):
        seldom = (network.text_embedding, network.time_embedding, network.time_projection, network.audio_encoder)
        used = [network.stack.injectors[index] for _, index in sorted(network.stack.injector_after.items())]
        return LayerLists(tuple(network.stack.blocks), tuple(used), seldom)
    if isinstance(network, TextEncoder):
        return LayerLists(tuple(network.layers), tables=(network.table,))
    return LayerLists()


class Placement:
    """Where a network is. Its home is main memory, on a device it is for a stage.

    What others put into the network or take out of it travels with it from the next `send` on.

    Args:
        network: in main memory, with weights by the time it is placed.
    """

    def __init__(self, network: nn.Module):
        self.network, self.lists = network, layer_lists(network)
        self.layers = {module: PackedLayer(module) for module in self.lists.all}
        self.device_bytes = 0
        """Of the weights that are on a device now, slots of those that come and go not counted."""
        self.sent: list[Tensor] | None = None
        """What the network held when it had been sent; None at home."""
        self._take_down_others()

    def _take_down_others(self) -> None:
        self.home = Home(self.network, apart=[*self.layers, *self.lists.tables])
        """All that is in no layer."""
        self.tables = Home(nn.ModuleList(self.lists.tables))

    def take_down(self) -> None:
        """Take down anew what the network holds and where, if it is at home."""
        if self.sent is None:
            for layer in self.layers.values():
                layer.take_down()
            self._take_down_others()

    def packer(self, let_go: Callable[[], None]) -> Callable[[str], None]:
        """What packs each layer as soon as the last of its parameters has come; called with their names.

        Args:
            let_go: called then, since nothing of the layer is left where it came from.
        """
        names = {id(module): name for name, module in self.network.named_modules()}
        missing = {
            layer: {f"{names[id(module)]}.{name}" for name in module.state_dict()}
            for module, layer in self.layers.items()
        }

        def arrived(name: str) -> None:
            for layer, names in missing.items():
                if name in names:
                    names.discard(name)
                    if not names:
                        layer.pack()
                        let_go()

        return arrived

    def pack(self) -> None:
        """Put each layer into one piece of memory, from which it crosses to a card fastest."""
        for layer in self.layers.values():
            layer.pack()

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(layer.bytes for layer in self.layers.values()) + self.home.bytes + self.tables.bytes

    def bytes_on(self, device: torch.device) -> int:
        """Of the weights that are on a device now."""
        return self.bytes if same_device(device, self.home_device) else self.device_bytes

    @property
    def home_device(self) -> torch.device:
        """Where the network was loaded to."""
        places = [*self.home.places, *(place for layer in self.layers.values() for place in layer.places)]
        return places[0].data.device if places else torch.device("cpu")

    def host_tensors(self) -> list[Tensor]:
        """Host memory that the weights take by themselves: what is mapped from a file takes none."""
        packed = [layer.memory for layer in self.layers.values() if layer.memory is not None]
        apart = [layer for layer in self.layers.values() if layer.memory is None]
        places = [*self.home.places, *self.tables.places, *(place for layer in apart for place in layer.places)]
        held = {id(place.tensor): place.data for place in places}
        return packed + [data for data in held.values() if data.device.type == "cpu" and not is_mapped(data)]

    @property
    def host_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host_tensors())

    @contextmanager
    def on(self, device: torch.device, plan: OffloadPlan, check: Check | None = None) -> Iterator[nn.Module]:
        """The network, computing on a device; at home again behind it.

        Args:
            check: called while weights travel there; may raise to stop.
        """
        streamed, _ = self.lanes(plan)
        try:
            self.send(device, plan, check)
            with BlockSwap(streamed, device):
                yield self.network
        finally:
            self.take_back()

    def send(self, device: torch.device, plan: OffloadPlan = EVERYTHING, check: Check | None = None) -> None:
        """Bring what stays on a device under a plan there: all of it, or what does not come and go."""
        if not plan.swaps and self.bytes_on(device) and not self._has_changed():
            return
        self.take_back()
        self.take_down()
        _, resident = self.lanes(plan)
        if plan.swaps and plan.locks:
            self.pack()
        self.sent = []
        with Upload(device, check) as upload:
            self.home.send(upload)
            if not plan.swaps:
                self.tables.send(upload)
            for layer in resident:
                memory = new_memory(layer.bytes, device)
                layer.gather(memory, upload.copy)
                layer.bind(memory)
        self.device_bytes = sum(layer.bytes for layer in resident) + self.home.bytes
        self.device_bytes += 0 if plan.swaps else self.tables.bytes
        self.sent = held_by(self.network)

    def _has_changed(self) -> bool:
        """Whether others have put something into a network that is on a device, or taken something out of it."""
        return self.sent is not None and [*map(id, self.sent)] != [*map(id, held_by(self.network))]

    def take_back(self) -> None:
        """All of it is at home again; copies elsewhere are freed."""
        if self.sent is None:
            return
        for layer in self.layers.values():
            layer.bind(None)
        self.home.take_back()
        self.tables.take_back()
        self.device_bytes, self.sent = 0, None

    def lanes(self, plan: OffloadPlan) -> tuple[list[Lane], list[PackedLayer]]:
        """What moves while the network computes, and what stays on the device."""
        if plan.resident_layers is None:
            return [], list(self.layers.values())
        blocks, injectors, seldom = (
            [self.layers[module] for module in modules]
            for modules in (self.lists.blocks, self.lists.injectors, self.lists.seldom)
        )
        stays = residents(len(blocks), plan)
        resident = [blocks[i] for i in stays]
        moving = [[block for i, block in enumerate(blocks) if i not in stays]]
        for keeps, layers in ((plan.keeps_injectors, injectors), (plan.keeps_seldom, seldom)):
            resident += layers if keeps else []
            moving.append([] if keeps else layers)
        if plan.slots == 1:
            return lanes_with([Lane([layer for layers in moving for layer in layers], 1, looks_ahead=False)]), resident
        ahead, between, seldom = moving
        return lanes_with([Lane(ahead, plan.slots), Lane(between, 1), Lane(seldom, 1, looks_ahead=False)]), resident


def held_by(network: nn.Module) -> list[Tensor]:
    """All tensors of a network, in order."""
    return [place.tensor for place in places_in(network)]


def lanes_with(lanes: list[Lane]) -> list[Lane]:
    """Those that have layers."""
    return [lane for lane in lanes if lane.layers]


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device. "cuda" is the only GPU that is used here; "cpu:0" is not "cpu" to ComfyUI."""
    return one.type == other.type and (one.index == other.index or one.type != "cpu")
