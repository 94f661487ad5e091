"""Short names for contents: two of them are equal where the contents are, bit by bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 22
FileStamp = tuple[str, int, int]
"""Path, bytes and time of the last change."""


def digest_of(facts: Any, *tensors: Tensor | None) -> str:
    """Of anything JSON, whatever the order of its keys, and of tensors with their types and shapes."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def file_digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def file_stamp(path: Path) -> FileStamp:
    """Changes when a file is replaced."""
    facts = path.stat()
    return str(path.resolve()), facts.st_size, facts.st_mtime_ns
