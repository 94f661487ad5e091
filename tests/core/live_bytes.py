"""Counts the bytes of tensors that are alive, op by op, and can let a simulated card run out of memory."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Every storage that ops inside create, until it is freed. Views and in-place ops add nothing, a resize does.

        with LiveBytes() as live:
            network(x)
        live.peak  # bytes at once, besides what was there before

    What an op allocates for its own use and frees before it returns is not seen: no tensor of it leaves the op.

    Args:
        cap: more bytes than this at once raise torch.OutOfMemoryError; the op's result is freed.
        counts: which tensors lie on the card that is simulated; None for all.
    """

    def __init__(self, cap: int | None = None, counts: Callable[[Tensor], bool] | None = None):
        super().__init__()
        self.cap, self.counts = cap, counts or (lambda tensor: True)
        self.now = self.peak = 0
        self.allocated_bytes = self.freed_bytes = self.allocations = self.frees = 0
        self.largest_op = ""
        """The op after which the most was alive."""
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is created meanwhile lies elsewhere, and is never counted."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = self._storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        known = {id(storage) for storage in given}
        for storage in given:
            if id(storage) in self._sizes:
                self._resize(storage)
        if not self._is_paused:
            for storage in self._storages(result):
                if id(storage) not in known and id(storage) not in self._sizes:
                    self._add(storage)
        if self.now > self.peak:
            self.peak, self.largest_op = self.now, str(func)
        if self.cap is not None and self.now > self.cap and not self._is_paused:
            wanted = self.now
            del result, given
            raise torch.OutOfMemoryError(f"simulated card: {wanted} bytes are wanted at {func}, it has {self.cap}")
        return result

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and self.counts(leaf)]
        return list({id(s): s for s in (tensor.untyped_storage() for tensor in tensors)}.values())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._sizes[key] = size
        self._references[key] = weakref.ref(storage, lambda _: self._drop(key))
        self.now += size
        self.allocated_bytes += size
        self.allocations += 1

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        del self._references[key]
        self.now -= size
        self.freed_bytes += size
        self.frees += 1

    def _resize(self, storage: torch.UntypedStorage) -> None:
        size, before = storage.nbytes(), self._sizes[id(storage)]
        self._sizes[id(storage)] = size
        self.now += size - before
        self.allocated_bytes += max(0, size - before)
        self.freed_bytes += max(0, before - size)
