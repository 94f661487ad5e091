"""Tensors on disk with facts about them, and a digest of both: what is read is what was written, or nothing."""

import json
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from .digest import digest_of
from .locks import written
from .outside import file_size, foreign_parser

log = logging.getLogger(__name__)

DIGEST = "digest"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
"""As safetensors calls what is kept."""
ALIGNED_BYTES = 8
LARGEST_RECORD_BYTES = 32_000_000_000
"""Features of the longest recordings are the largest that is kept."""

Shapes = Mapping[str, tuple[int, ...]]
"""By the names of tensors."""


@dataclass(frozen=True)
class Record:
    """What was written."""

    facts: dict[str, str]
    tensors: dict[str, Tensor]


def write_record(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors with facts about them; the file takes its name when it is whole.

    Raises:
        OSError: if the disk does not take it.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {**facts, DIGEST: record_digest(facts, kept)}}
    end = 0
    for name, tensor in kept.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    with written(path) as partial, partial.open("r+b") as file:
        write_safetensors(file, header, list(kept.values()))


def write_safetensors(file: BinaryIO, header: dict[str, Any], tensors: list[Tensor]) -> None:
    """The format by hand: the library writes to a name of its own first, which a killed run would leave behind."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def record_digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return digest_of([dict(facts), names], *(tensors[name] for name in names))


def read_facts(path: Path) -> dict[str, str]:
    """What stands with the tensors, not checked against the digest; nothing if there is no such file."""
    try:
        file_size(path, LARGEST_RECORD_BYTES, CheckpointError)
        with foreign_parser(path, "It is made again.", CheckpointError), safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except CheckpointError:
        return {}


def read_record(path: Path, fits: Callable[[dict[str, str], Shapes], bool] | None = None) -> Record | None:
    """What was written to `path`; None if it is missing, or no longer what was written, or not finite.

    Args:
        fits: asked with the facts and the shapes of the tensors before any of them is read.
    """
    try:
        file_size(path, LARGEST_RECORD_BYTES, CheckpointError)
        with foreign_parser(path, "It is made again.", CheckpointError), safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if fits is not None and not fits(facts, shapes):
                return None
            tensors = {name: file.get_tensor(name) for name in shapes}
    except CheckpointError:
        return None
    own = facts.pop(DIGEST, None)
    is_whole = own == record_digest(facts, tensors) and all(map(is_finite, tensors.values()))
    return Record(facts, tensors) if is_whole else None


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds numbers to compute with."""
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
