"""What stages ask of those who have the networks, and what room there is on a card."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from ..config import MemoryLimits
from ..io.host_memory import free_ram_bytes
from .budget import CONTEXT_BYTES, MOST_CONTEXT_BYTES, WHOLE, Planned, Room, Sizes


class Networks(Protocol):
    """Where the networks of stages come from."""

    device: torch.device
    """Where stages compute, and where their tensors are."""

    def use(self, name: str, planned: Planned = WHOLE) -> AbstractContextManager[nn.Module]:
        """A network on its device for one stage, as planned. `name`: its kind, or LOW_NOISE_DIT."""

    def room(self, name: str) -> Room:
        """What a stage with that network may use now, its weights included."""

    def recover(self) -> None:
        """Give back all memory that no stage needs now, because one ran out of it."""

    def sizes(self, name: str) -> Sizes:
        """Of a network, whether it is loaded or not."""


def room_on(device: torch.device, limits: MemoryLimits, returnable_bytes: int = 0, reserved_bytes: int = 0) -> Room:
    """What may be used of a device now.

    Args:
        returnable_bytes: what lies there and would leave for others.
        reserved_bytes: what is to be left to other programs.
    """
    if device.type != "cuda":
        return Room(None, free_ram_bytes(), limits.weights)
    allocated = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - allocated - reserved_bytes
    free = min(free, round(process_share(device) * total) - allocated)
    if limits.vram_limit_gb is not None:
        free = min(free, allocator_limit(device, limits.vram_limit_gb) - allocated)
    return Room(free + returnable_bytes, free_ram_bytes(), limits.weights)


def allocator_limit(device: torch.device, vram_limit_gb: float) -> int:
    """Bytes that torch may allocate where this process is to take no more of a GPU than a limit.

    What CUDA, its libraries and kernels take besides is measured. Other programs are in that figure too, hence a bound.
    """
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return round(vram_limit_gb * 1e9 - max(CONTEXT_BYTES, min(beside, MOST_CONTEXT_BYTES)))


@contextmanager
def within_limit(device: torch.device, limits: MemoryLimits, needed_bytes: int) -> Iterator[None]:
    """Let torch's allocator keep to the limit of a stage: what it holds without using it counts as well.

    Where the limit does not hold anyhow, it is only planned with.

    Args:
        needed_bytes: that the stage is going to allocate.
    """
    if device.type != "cuda" or limits.vram_limit_gb is None:
        yield
        return
    most, total = allocator_limit(device, limits.vram_limit_gb), torch.cuda.mem_get_info(device)[1]
    before = process_share(device)
    if not torch.cuda.memory_allocated(device) + needed_bytes <= most < before * total:
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(most / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def process_share(device: torch.device) -> float:
    """The share of a GPU that torch may allocate in this process (`torch.cuda.set_per_process_memory_fraction`)."""
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # the oldest torch lacks it
    return share(device) if share else 1.0


def free_unused(device: torch.device) -> None:
    """Give memory back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
