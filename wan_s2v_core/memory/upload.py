"""Host memory to a GPU at the speed of the bus, also from pages that are not pinned, such as those of a mapped file.

CUDA copies such pages through one thread (5.3 GB/s on an H200 from the page cache). Here all CPU threads fill small
pinned buffers while others travel: 26 GB/s on the same machine.
"""

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

BUFFER_BYTES = 32 << 20
BUFFERS = 3


class Upload:
    """Copies tensors to a device while the next ones are read. A context: behind it all of them have arrived.

    Args:
        device: a GPU; any other one is copied to directly.
        check: called before each buffer; may raise to stop.
    """

    def __init__(self, device: torch.device, check: Callable[[], None] | None = None):
        self.device, self.check = device, check or (lambda: None)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []
        self.travelling: list[torch.cuda.Event | None] = []
        self.turn = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a host tensor to one of the same type and shape on the device."""
        if self.stream is None or not (source.is_contiguous() and target.is_contiguous()) or source.is_cuda:
            self.check()
            target.copy_(source)
            return
        source, target = as_bytes(source), as_bytes(target)
        if source.is_pinned():
            self.check()
            with torch.cuda.stream(self.stream):
                target.copy_(source, non_blocking=True)
            return
        for start in range(0, source.numel(), BUFFER_BYTES):
            self.check()
            self._send(source[start : start + BUFFER_BYTES], target[start : start + BUFFER_BYTES])

    def _send(self, source: Tensor, target: Tensor) -> None:
        if len(self.buffers) < BUFFERS:
            self.buffers.append(torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True))
            self.travelling.append(None)
        self.turn = (self.turn + 1) % len(self.buffers)
        buffer = self.buffers[self.turn][: source.numel()]
        if (event := self.travelling[self.turn]) is not None:
            event.synchronize()
        buffer.copy_(source)
        with torch.cuda.stream(self.stream):
            target.copy_(buffer, non_blocking=True)
            self.travelling[self.turn] = self.stream.record_event()

    def __enter__(self) -> "Upload":
        if self.stream is not None:  # what was freed for the targets may still be in use
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        self.buffers.clear()


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
