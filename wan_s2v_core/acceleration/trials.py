"""Kernels are tried before they are used, once in a process. Whoever must not use the GPU, such as a forecast while a
prompt is sampled, asks for what is known or expected instead."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import TypeVar

T = TypeVar("T")

ALLOWED: ContextVar[bool] = ContextVar("trials_allowed", default=True)


@contextlib.contextmanager
def without_trials() -> Iterator[None]:
    """Within, nothing is compiled and nothing runs on a GPU."""
    before = ALLOWED.set(False)
    try:
        yield
    finally:
        ALLOWED.reset(before)


def tried_once(expected: Callable[..., T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep what a function found for its arguments, which must be hashable; what it raises is not kept.

    Args:
        expected: what to answer, from the same arguments, where trials are not allowed and none has been made.
    """

    def keeping(function: Callable[..., T]) -> Callable[..., T]:
        found: dict[tuple, T] = {}
        lock = threading.RLock()

        @wraps(function)
        def answer(*arguments) -> T:
            if arguments in found:
                return found[arguments]
            if not ALLOWED.get():
                return expected(*arguments)
            with lock:  # who comes while it is tried waits for the result
                if arguments not in found:
                    found[arguments] = function(*arguments)
                return found[arguments]

        answer.cache_clear = found.clear
        return answer

    return keeping
