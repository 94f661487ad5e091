"""Block swap: layers whose weights are on the card only while they compute, the next ones on their way meanwhile.

While a block of the 14B model computes (280 ms at 1280x704 on an H200), the next one's 0.7 GB crosses the bus (13 ms
from locked memory at 55 GB/s), so weights in main memory cost next to no time. Results are the same bit for bit.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..config import OffloadPlan
from .home import PackedLayer

log = logging.getLogger(__name__)

STAGING_BUFFERS = 2


@dataclass
class Slot:
    """A place on the device for one layer at a time."""

    memory: Tensor
    """Bytes, as many as the largest layer that comes here."""
    left: torch.cuda.Event | None = None
    """When the layer that was here last had computed."""


class Transfer:
    """Copies layers from main memory to a device, one after the other, while it computes.

    Straight from locked memory, or through two locked buffers that a thread of its own fills, where the layer lies in a
    mapped file or its memory cannot be locked. On a CPU "device" the copies are the same, but nothing runs beside them.
    """

    def __init__(self, device: torch.device, largest_bytes: int):
        self.device, self.largest_bytes = device, largest_bytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread: ThreadPoolExecutor | None = None
        self.staging: list[Slot] = []

    def now(self) -> "torch.cuda.Event | None":
        """The end of all that the device has been told to compute."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def send(self, layer: PackedLayer, slot: Slot) -> "Future[torch.cuda.Event | None]":
        """Begin to copy a layer to its slot, once what computes there has ended -> when it has arrived."""
        if self.is_direct(layer):
            arrived: Future = Future()
            arrived.set_result(self._copy(layer.memory, slot, layer.bytes))
            return arrived
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, "block_swap")
            self.staging = [Slot(new_memory(self.largest_bytes, pinned=True)) for _ in range(STAGING_BUFFERS)]
        return self.thread.submit(self._through_staging, layer, slot)

    def is_direct(self, layer: PackedLayer) -> bool:
        """Whether the device can copy a layer from where it lies."""
        if layer.memory is None:
            return False
        return self.stream is None or layer.lock()

    @torch.inference_mode()  # a thread begins without
    def _through_staging(self, layer: PackedLayer, slot: Slot) -> "torch.cuda.Event | None":
        self.staging.append(buffer := self.staging.pop(0))
        if buffer.left is not None:
            buffer.left.synchronize()
        layer.gather(buffer.memory)
        buffer.left = self._copy(buffer.memory, slot, layer.bytes)
        return buffer.left

    def _copy(self, source: Tensor, slot: Slot, size: int) -> "torch.cuda.Event | None":
        if self.stream is None:
            slot.memory[:size].copy_(source[:size])
            return None
        with torch.cuda.stream(self.stream):
            if slot.left is not None:
                self.stream.wait_event(slot.left)
            slot.memory[:size].copy_(source[:size], non_blocking=True)
            return self.stream.record_event()

    def finish(self) -> None:
        """Wait for all copies; buffers and thread go."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
            self.thread, self.staging = None, []
        if self.stream is not None:
            self.stream.synchronize()


@torch.inference_mode(False)  # weights that lie here must serve outside of it as well
def new_memory(size: int, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned and torch.cuda.is_available())


class Lane:
    """Layers of about one size that take turns in a few slots.

    Args:
        layers: in the order in which they compute, over and over again.
        slots: how many are on the device at once: the one that computes, and those that come next. 1 fetches each layer
            when the one before has ended.
        looks_ahead: whether the next layer is sent for as soon as a slot is free; if not, each is fetched when it is
            needed and stays until the slot is wanted.
    """

    def __init__(self, layers: Sequence[PackedLayer], slots: int, looks_ahead: bool = True):
        self.layers, self.count, self.looks_ahead = list(layers), min(slots, len(layers)), looks_ahead
        self.slots: list[Slot] = []
        self.holding: dict[PackedLayer, tuple[Slot, Future]] = {}
        """What is in a slot or on its way there."""
        self.next = 0

    @property
    def slot_bytes(self) -> int:
        return max(layer.bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """On the device."""
        return self.count * self.slot_bytes

    def begin(self, transfer: Transfer) -> list[RemovableHandle]:
        """Take the room on the device, send for the first layers, and watch all of them -> what ends the watching."""
        self.transfer = transfer
        # What was freed for the slots may still be in use by what has been told to compute until now.
        self.slots = [Slot(new_memory(self.slot_bytes, transfer.device), transfer.now()) for _ in range(self.count)]
        if self.looks_ahead:
            self._restart(0)
        handles = []
        for layer in self.layers:
            handles.append(layer.module.register_forward_pre_hook(self._arriving(layer)))
            handles.append(layer.module.register_forward_hook(self._leaving(layer), always_call=True))
        return handles

    def end(self) -> None:
        """Every layer is at home again, and the room is free. Nothing may compute or travel any more."""
        for layer in self.holding:
            layer.bind(None)
        self.holding.clear()
        self.slots.clear()

    def _restart(self, index: int) -> None:
        """Forget what is in the slots and begin at a layer."""
        for layer in self.holding:
            layer.bind(None)
        self.holding.clear()
        self.next = index
        for slot in self.slots if self.looks_ahead else self.slots[:1]:
            self._send_next(slot)

    def _send_next(self, slot: Slot) -> None:
        layer = self.layers[self.next % len(self.layers)]
        self.holding[layer] = slot, self.transfer.send(layer, slot)
        self.next += 1

    def _arriving(self, layer: PackedLayer):
        @torch.compiler.disable
        def arrive(*_) -> None:
            if layer not in self.holding:  # not in order: the first, or behind one that was left out
                self._restart(self.layers.index(layer))
            slot, arrived = self.holding[layer]
            if (event := arrived.result()) is not None:
                torch.cuda.current_stream(self.transfer.device).wait_event(event)
            layer.bind(slot.memory)

        return arrive

    def _leaving(self, layer: PackedLayer):
        @torch.compiler.disable
        def leave(*_) -> None:
            layer.bind(None)
            if layer not in self.holding:
                return
            slot, _arrived = self.holding[layer]
            slot.left = self.transfer.now()
            if self.looks_ahead and self.count < len(self.layers):
                del self.holding[layer]
                self._send_next(slot)

        return leave


class BlockSwap:
    """Lanes of layers that come to a device and leave it while their network computes.

    Used as a context: within it the layers compute on the device, behind it all of them are at home.
    """

    def __init__(self, lanes: Iterable[Lane], device: torch.device):
        self.lanes, self.device = [lane for lane in lanes if lane.layers], device
        self.handles: list[RemovableHandle] = []

    @property
    def layers(self) -> list[PackedLayer]:
        return [layer for lane in self.lanes for layer in lane.layers]

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(lane.bytes for lane in self.lanes)

    def __enter__(self) -> "BlockSwap":
        self.transfer = Transfer(self.device, max((lane.slot_bytes for lane in self.lanes), default=0))
        try:
            for lane in self.lanes:
                self.handles += lane.begin(self.transfer)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.transfer.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what computes may still read the slots
        for lane in self.lanes:
            lane.end()


def residents(count: int, plan: OffloadPlan) -> list[int]:
    """Which of `count` blocks stay on the device under a plan, by index: as evenly spread as can be."""
    stay = min(plan.resident_layers, count) if plan.swaps else count
    return [(2 * i + 1) * count // (2 * stay) for i in range(stay)]
