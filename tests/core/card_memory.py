"""How torch's allocator lays the tensors of a forward into a card's memory, computed without a card.

`Tensors` writes down which tensors come and go; their data need not exist (the meta device). `CardMemory` puts them
into segments as CUDACachingAllocator does: sizes in steps, the smallest free block that is large enough, split where
much would be left over, and whole free segments given back when the card is full.
"""

import bisect
import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KIB, MIB = 1 << 10, 1 << 20
STEP, SMALL, LARGE = 512, MIB, 10 * MIB
"""Sizes are multiples of the first; up to the second they come from segments for small ones, from the third on they get
a segment of their own size."""
SMALL_SEGMENT, MIDDLE_SEGMENT, SEGMENT_STEP = 2 * MIB, 20 * MIB, 2 * MIB

Event = tuple[int, int | None]
"""Number of a tensor and its bytes, or None when it is freed."""


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class Tensors(TorchDispatchMode):
    """Every storage that ops within create on a device, in order, and when it is freed."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.events = device, []
        self._known: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._numbers = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(storage) for storage in self._storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if id(storage) not in given and id(storage) not in self._known and storage.nbytes():
                self._add(storage)
        return result

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device == self.device)
        return [tensor.untyped_storage() for tensor in tensors]

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, number = id(storage), next(self._numbers)
        self._known[key] = number
        self._references[number] = weakref.ref(storage, lambda _: self._drop(key, number))
        self.events.append((number, storage.nbytes()))

    def _drop(self, key: int, number: int) -> None:
        del self._known[key]
        self.events.append((number, None))


@dataclass
class Piece:
    """Of a segment. Pieces side by side are never both free."""

    size: int
    is_small: bool
    is_free: bool = False
    before: int | None = None
    after: int | None = None


class CardMemory:
    """Segments of a card that has so many bytes."""

    def __init__(self, size: float):
        self.size, self.reserved, self.allocated = size, 0, 0
        self.most_reserved = self.most_allocated = 0
        self.pieces: dict[int, Piece] = {}
        """By address."""
        self.free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        """Sizes and addresses of free pieces in order, small and large."""
        self._next = 0

    def take(self, size: int) -> int:
        """The address of so many bytes. Raises torch.OutOfMemoryError if there are none in one piece."""
        size = round_up(size, STEP)
        is_small = size <= SMALL
        free = self.free[is_small]
        index = bisect.bisect_left(free, (size, -1))
        address = free.pop(index)[1] if index < len(free) else self._new_segment(size, is_small)
        piece = self.pieces[address]
        left = piece.size - size
        if left >= (STEP if is_small else SMALL + 1):
            self.pieces[address + size] = Piece(left, is_small, True, address, piece.after)
            if piece.after is not None:
                self.pieces[piece.after].before = address + size
            piece.size, piece.after = size, address + size
            bisect.insort(free, (left, address + size))
        piece.is_free = False
        self.allocated += piece.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return address

    def _new_segment(self, size: int, is_small: bool) -> int:
        large = round_up(size, SEGMENT_STEP) if size >= LARGE else MIDDLE_SEGMENT
        segment = SMALL_SEGMENT if is_small else large
        if self.reserved + segment > self.size:
            self.give_back()
        if self.reserved + segment > self.size:
            raise torch.OutOfMemoryError(
                f"{size} bytes are wanted; {self.allocated} of {self.size} are in use, {self.reserved} held"
            )
        address, self._next = self._next, self._next + 2 * segment  # no segment lies beside another
        self.pieces[address] = Piece(segment, is_small)
        self.reserved += segment
        self.most_reserved = max(self.most_reserved, self.reserved)
        return address

    def put_back(self, address: int) -> None:
        """Free what lies at an address; it becomes one with what is free beside it."""
        piece = self.pieces[address]
        self.allocated -= piece.size
        if piece.after is not None and self.pieces[piece.after].is_free:
            self._unlist(piece.after)
            self._join(address)
        if piece.before is not None and self.pieces[piece.before].is_free:
            address = piece.before
            self._unlist(address)
            self._join(address)
        self.pieces[address].is_free = True
        bisect.insort(self.free[piece.is_small], (self.pieces[address].size, address))

    def _unlist(self, address: int) -> None:
        piece = self.pieces[address]
        self.free[piece.is_small].remove((piece.size, address))

    def _join(self, address: int) -> None:
        """Make a piece and the next one the same."""
        piece = self.pieces[address]
        following = self.pieces.pop(piece.after)
        piece.size, piece.after = piece.size + following.size, following.after
        if piece.after is not None:
            self.pieces[piece.after].before = address

    def give_back(self) -> None:
        """Give segments back in which nothing lies."""
        for free in self.free.values():
            whole = [
                (size, at) for size, at in free if self.pieces[at].before is None and self.pieces[at].after is None
            ]
            for size, address in whole:
                del self.pieces[address]
                self.reserved -= size
            free[:] = [one for one in free if one not in whole]

    def replay(self, events: Iterable[Event]) -> None:
        """Take and put back what others have."""
        addresses: dict[int, int] = {}
        for number, size in events:
            if size is not None:
                addresses[number] = self.take(size)
            else:
                self.put_back(addresses.pop(number))
