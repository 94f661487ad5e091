"""Where the weights of a network lie in main memory while some or all of it is on a card."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..private_torch import tensor_dicts
from .upload import Upload

log = logging.getLogger(__name__)

Copy = Callable[[Tensor, Tensor], Any]
"""Source, target."""
ALIGNMENT = 256
"""Bytes by which tensors are aligned in a layer's memory: what the kernels that read them ask for at most."""


@dataclass(frozen=True)
class Place:
    """Where a module holds one of its tensors."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor
    """The object itself, which may be moved by others (`Module.to`)."""
    data: Tensor
    """What it held when this was taken down."""

    def put(self, values: Tensor) -> None:
        """Let the module use other values, in a tensor object of their own: what kind of tensor one is (of inference
        mode or not) stays with the object."""
        is_parameter = isinstance(self.tensor, nn.Parameter)
        self.holder[self.name] = nn.Parameter(values, requires_grad=False) if is_parameter else values

    def put_back(self) -> None:
        """Let the module use the tensor that it had, as it was."""
        if self.tensor.data_ptr() != self.data.data_ptr():
            self.tensor.data = self.data
        self.holder[self.name] = self.tensor


def places_in(module: nn.Module) -> Iterator[Place]:
    """All parameters and buffers of a module; one that is held twice comes twice."""
    for part in module.modules():
        for holder in tensor_dicts(part):
            yield from (Place(holder, name, held, held.data) for name, held in holder.items() if held is not None)


class Home:
    """The tensors of a network as they lie in main memory, to return to without copying them back from a card.

    Args:
        apart: modules within the network that move by themselves.
    """

    def __init__(self, network: nn.Module, apart: Iterable[nn.Module] = ()):
        others = {id(place.tensor) for module in apart for place in places_in(module)}
        self.places = [place for place in places_in(network) if id(place.tensor) not in others]

    @property
    def bytes(self) -> int:
        return sum({id(place.tensor): place.data.nbytes for place in self.places}.values())

    @torch.inference_mode(False)  # weights must serve outside of it as well
    def send(self, upload: Upload) -> None:
        """Copy those to a device that are not there, where the network then uses them."""
        copies: dict[int, Tensor] = {}
        for place in self.places:
            if place.data.device == upload.device:
                continue
            if id(place.tensor) not in copies:
                copies[id(place.tensor)] = target = torch.empty_like(place.data, device=upload.device)
                upload.copy(place.data, target)
            place.put(copies[id(place.tensor)])

    def take_back(self) -> None:
        """Let the network use them again, also where others have moved them; copies elsewhere are freed."""
        for place in self.places:
            place.put_back()


class PackedLayer:
    """The tensors of one layer in one piece of main memory, so that they cross to a card as one copy.

    Until `pack` is called they lie where loading left them, such as in a mapped file.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.memory: Tensor | None = None
        """Bytes in main memory that hold all tensors; None while they lie apart."""
        self.unlock: weakref.finalize | None = None
        """Lets the memory go that `lock` keeps in its place."""
        self._measure()

    def _measure(self) -> None:
        self.places, self.offsets, end = list(places_in(self.module)), {}, 0
        for place in self.places:
            if id(place.tensor) not in self.offsets:
                self.offsets[id(place.tensor)] = end
                end += -(-place.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.bytes = end

    @property
    def is_packed(self) -> bool:
        """Whether all that the layer holds now lies in its memory."""
        held = [id(place.tensor) for place in places_in(self.module)]
        if self.memory is None or held != [id(place.tensor) for place in self.places]:
            return False
        first, end = self.memory.data_ptr(), self.memory.data_ptr() + self.bytes
        return all(first <= place.data.data_ptr() < end for place in self.places)

    def take_down(self) -> None:
        """Take down anew what the layer holds at home. Where that has changed, it lies apart until packed again."""
        if not self.is_packed:
            self._let_memory_go()
        self._measure()

    def _let_memory_go(self) -> None:
        if self.unlock is not None:
            self.unlock()
        self.memory = None

    @torch.inference_mode(False)  # what is kept must serve outside of it as well
    def pack(self) -> None:
        """Move the tensors into one piece of memory, unless they are; where they lay before becomes free."""
        if self.is_packed:
            return
        self._measure()
        memory = torch.empty(self.bytes, dtype=torch.uint8)
        for view, place in zip(self.views(memory), self.places, strict=True):
            place.put(view.copy_(place.data))
        self._let_memory_go()
        self.memory = memory
        self._measure()

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors as they lie in a piece of memory of `bytes`, one for each place."""
        return [
            memory[start : start + place.tensor.nbytes].view(place.tensor.dtype).view(place.tensor.shape)
            for place, start in zip(self.places, (self.offsets[id(p.tensor)] for p in self.places), strict=True)
        ]

    def bind(self, memory: Tensor | None) -> None:
        """Let the layer use what lies in `memory`; None: what lies at home."""
        if memory is None:
            for place in self.places:
                place.put_back()
            return
        for place, view in zip(self.places, self.views(memory), strict=True):
            place.put(view)

    def gather(self, memory: Tensor, copy: Copy | None = None) -> None:
        """Copy all tensors into a piece of memory, on any device.

        Args:
            copy: copies a tensor from here to there.
        """
        copy = copy or (lambda source, target: target.copy_(source))
        if self.memory is not None:
            copy(self.memory, memory[: self.bytes])
            return
        for view, place in zip(self.views(memory), self.places, strict=True):
            copy(place.data, view)

    def lock(self) -> bool:
        """Keep the packed memory where it is, so that a card copies from it by itself; whether that could be done.

        torch's own pinned memory comes in powers of two, of which a quarter would be wasted here.
        """
        if self.unlock is not None and self.unlock.alive:
            return True
        assert self.memory is not None, "pack it first"
        if Locking.fails:
            return False
        runtime, address = torch.cuda.cudart(), self.memory.data_ptr()
        if error := int(runtime.cudaHostRegister(address, self.memory.nbytes, 0)):
            Locking.give_up(error)
            return False
        self.unlock = weakref.finalize(self, runtime.cudaHostUnregister, address)  # before the memory is freed
        return True


class Locking:
    """Whether memory can be locked in this process."""

    fails = False

    @classmethod
    def give_up(cls, error: int) -> None:
        """The system allows no more: say so once, and let nobody else stumble over the error that CUDA remembers."""
        cls.fails = True
        log.warning(
            "main memory cannot be locked for the card (CUDA error %d): weights travel through buffers, slower. "
            "Raise the limit for locked memory (ulimit -l), or free main memory, and start again.",
            error,
        )
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
