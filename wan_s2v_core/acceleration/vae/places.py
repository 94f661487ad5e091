"""Tensors that are filled and read in parts, on the device that computes or in main memory."""

import torch
from torch import Tensor

MAIN_MEMORY = torch.device("cpu")


class Canvas:
    """A tensor that is filled part by part where it is to lie. Parts are copied while the next ones are computed."""

    def __init__(self, device: torch.device):
        self.device = device
        self.filled: Tensor | None = None
        self._waiting: list[tuple[tuple, Tensor, torch.cuda.Event]] = []

    @property
    def is_new(self) -> bool:
        return self.filled is None

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Zeros to be filled."""
        self.filled = torch.zeros(shape, dtype=dtype, device=self.device)

    def put(self, place: tuple, part: Tensor) -> None:
        """Fill `place`, an index, with `part`, wherever that lies."""
        if part.is_cuda and self.device.type == "cpu":
            staged = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            staged.copy_(part.contiguous(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting.append((place, staged, event))
            self._settle(1)
        else:
            self.filled[place] = part

    def _settle(self, waiting: int) -> None:
        """Write what has arrived in main memory, until so many parts are on their way."""
        while len(self._waiting) > waiting:
            place, staged, event = self._waiting.pop(0)
            event.synchronize()
            self.filled[place] = staged

    def finished(self) -> Tensor:
        """All of it."""
        self._settle(0)
        return self.filled


def bring(part: Tensor, device: torch.device) -> Tensor:
    """A part of a tensor on the device that computes, through pinned memory where it comes from main memory."""
    if part.device == device:
        return part
    if device.type == "cuda" and part.device.type == "cpu":
        staged = torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
        return staged.to(device, non_blocking=True)  # the allocator keeps pinned memory until it is copied
    return part.to(device)
