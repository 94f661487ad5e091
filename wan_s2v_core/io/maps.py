"""Which tensors lie in mapped files: the system can take their pages back, so they count as no memory."""

import weakref

import numpy as np
from torch import Tensor

MAPS: dict[int, int] = {}
"""Address of each map that is in use -> the address behind it."""


def note_map(values: np.ndarray) -> None:
    """Keep in mind where a map lies, until nothing uses it any more."""
    start = values.ctypes.data
    MAPS[start] = start + values.nbytes
    weakref.finalize(values._mmap, MAPS.pop, start, None).atexit = False


def is_mapped(tensor: Tensor) -> bool:
    """Whether a host tensor lies in a file that is mapped here, and so takes no memory of its own."""
    address = tensor.data_ptr()
    return any(start <= address < stop for start, stop in list(MAPS.items()))
