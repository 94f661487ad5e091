"""Tensors to fill whose size only the disk limits: beyond a size they lie in a file that has no name."""

import logging
import math
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .maps import note_map

log = logging.getLogger(__name__)

MOST_IN_MEMORY_BYTES = 2_000_000_000
"""A larger tensor lies in a file. All layers of wav2vec large at 30 Hz are larger from eleven minutes on."""
ZEROS = bytes(1 << 22)


def scratch(shape: tuple[int, ...], folder: Path | None = None, most_in_memory: int = MOST_IN_MEMORY_BYTES) -> Tensor:
    """A float32 tensor of any content, to be filled.

    A large one is a file mapped into memory: the system writes it out and reads it back as it needs room, and it is
    gone with the tensor, or with the process. All of its disk space is taken here, so that none is missing later.

    Args:
        folder: where a file is made; None is the system's folder for temporary files.
        most_in_memory: bytes.
    Raises:
        ConfigError: if the disk has not enough room.
    """
    size = 4 * math.prod(shape)
    if size <= most_in_memory:
        return torch.empty(shape)
    folder = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file, size)
            mapped = np.memmap(file, np.float32, "r+", shape=shape)  # it has a handle of its own
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{size / 1e9:.1f} GB of scratch space cannot be had in {folder}: {reason}. What is heard in a long "
            "recording lies there during a run: free some space, let the system's folder for temporary files (TMPDIR, "
            "or TEMP on Windows) be on a larger disk, or use a shorter part of the recording."
        ) from error
    note_map(mapped)
    log.info("%.1f GB of scratch space lie in %s during the run", size / 1e9, folder)
    return torch.from_numpy(mapped)


def reserve(file: BinaryIO, size: int) -> None:
    """Give an empty file its size and the disk space for it, at once where the system can.

    Raises:
        OSError: if the disk has not enough room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(ZEROS)):
        file.write(ZEROS[: size - start])
    file.flush()
