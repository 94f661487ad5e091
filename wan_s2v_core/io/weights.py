"""Weights files opened without reading them: names, shapes and types at once, each tensor when it is asked for.

What a file is, is told from its first bytes. safetensors are mapped into memory; for `.pth` files see `pickles`.
"""

import bisect
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, shown, shown_path
from .maps import note_map
from .outside import file_size, foreign_parser, read_json
from .pickles import PICKLE_START, TORN, ZIP_START, read_pickle

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 8_000_000
"""Of a safetensors file. A tensor takes about 120 bytes of it, the 14B model has 1,260 tensors."""
LONGEST_FILE_NAME = 255
PIECE_BYTES = 4_000_000_000
"""Of a file, mapped at once; more for a tensor that is larger."""
FOREIGN_STARTS = (
    (b"GGUF", "a GGUF file, which this version does not read", "Use the bf16, fp16 or fp8_scaled safetensors file."),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Run 'git lfs pull' or download the file."),
    (b"<", "a web page, not weights", "Download the file itself; the site may ask for a login or a licence first."),
)
"""Looked for in files that are not safetensors: those begin with a length, which may look like any of them."""


@dataclass(frozen=True)
class WeightEntry:
    """One tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True)
class Weights:
    """A weights file, or the shards of one: name -> entry."""

    path: Path
    entries: dict[str, WeightEntry]
    metadata: dict[str, str]
    layout: str
    files: tuple[Path, ...]
    mapped: tuple["MappedFile", ...] = ()
    """Those of the files that are mapped into memory."""

    def let_go(self) -> None:
        """Unmap the files as soon as no tensor read from them is left; the next one that is read maps its file again.

        What was read of a mapped file counts as this process's memory until then.
        """
        for file in self.mapped:
            file.let_go()

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def dtypes(self) -> dict[str, int]:
        """How many tensors have which type."""
        return dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in self.entries.values()))


@dataclass(frozen=True)
class Span:
    """Where bytes lie in a file."""

    start: int
    stop: int


class MappedFile:
    """A safetensors file, mapped while tensors are read from it. They are views of the map, not copies; what is written
    to them stays in memory.

    It is mapped piece by piece: systems refuse to map at once what is larger than their memory.
    """

    def __init__(self, path: Path):
        self.path = path
        self.dtypes: dict[str, str] = {}
        """As the file names them."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.spans: dict[str, Span] = {}
        self.metadata: dict[str, str] = {}
        self._pieces: list[Span] = []
        self._maps: dict[Span, np.ndarray] = {}
        self._read_header()

    def _read_header(self) -> None:
        """Raises SafetensorError, OSError or ValueError unless the file is whole."""
        with self.path.open("rb") as file:
            length = header_length(file.read(HEADER_LENGTH_BYTES))
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes, at most {LARGEST_HEADER_BYTES:,} are read")
            with safe_open(self.path, framework="np") as handle:  # checks it; maps nothing that could be refused
                self.metadata = handle.metadata() or {}
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        first, size = HEADER_LENGTH_BYTES + length, file_size(self.path, error=CheckpointError)
        for name, facts in header.items():
            if max(facts["shape"], default=0) > size:  # with another side of 0 it passes as a tensor without values
                raise ValueError(f"{shown(name)} has a side of {max(facts['shape'])}")
            start, stop = facts["data_offsets"]
            self.dtypes[name], self.shapes[name] = facts["dtype"], tuple(facts["shape"])
            self.spans[name] = Span(first + start, first + stop)
        for span in sorted(self.spans.values(), key=lambda span: span.start):
            if self._pieces and span.stop - self._pieces[-1].start <= PIECE_BYTES:
                self._pieces[-1] = Span(self._pieces[-1].start, span.stop)
            else:
                self._pieces.append(span)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: if the system has no room for a map.
        """
        span, dtype, shape = self.spans[name], SAFETENSORS_DTYPES[self.dtypes[name]], self.shapes[name]
        if span.start == span.stop:
            return torch.empty(shape, dtype=dtype)
        piece = self._pieces[bisect.bisect_right(self._pieces, span.start, key=lambda piece: piece.start) - 1]
        values = self._mapped(piece)[span.start - piece.start : span.stop - piece.start]
        return torch.from_numpy(values).view(dtype).view(shape)

    def _mapped(self, piece: Span) -> np.ndarray:
        if piece not in self._maps:
            size = piece.stop - piece.start
            try:
                self._maps[piece] = np.memmap(self.path, np.uint8, "c", offset=piece.start, shape=(size,))
                note_map(self._maps[piece])
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{size / 1e9:.1f} GB of {shown_path(self.path)} cannot be mapped into memory: {error}. Close "
                    "other programs, or give the system more swap space; if the file has changed, load it again."
                ) from error
        return self._maps[piece]

    def let_go(self) -> None:
        self._maps.clear()


def open_weights(path: str | Path) -> Weights:
    """Open one weights file.

    Raises:
        CheckpointError: if it is missing, cut short, unsafe or of a kind that is not read here.
    """
    path = Path(path)
    size = file_size(path, error=CheckpointError)
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise CheckpointError(f"{shown_path(path)} cannot be read: {error.strerror}. Check its permissions.") from error
    if start[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + 1] == b"{" and header_length(start) < size:
        return _open_safetensors(path)
    for magic, what, cure in FOREIGN_STARTS:
        if start.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(magic):
            raise CheckpointError(f"{shown_path(path)} is {what}. {cure}")
    if start.startswith((ZIP_START, PICKLE_START)):
        return _open_pickle(path)
    raise CheckpointError(f"{shown_path(path)} ({size:,} bytes) is not a complete safetensors or PyTorch file. {TORN}")


def header_length(start: bytes) -> int:
    """What a safetensors file begins with."""
    return int.from_bytes(start[:HEADER_LENGTH_BYTES], "little")


def open_shards(folder: Path, stem: str) -> Weights:
    """Open `stem`.safetensors or its shards in `folder`; the index file decides if there is one.

    Raises:
        CheckpointError: if nothing is there, or shards are missing or do not hold what the index says.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        wanted = _read_index(index)
        names = sorted(set(wanted.values()))
    else:
        names, wanted = _shards_without_index(folder, stem), {}
    if not names:
        raise CheckpointError(
            f"{shown_path(folder)} holds no {stem}*.safetensors. Point to the folder that holds the shards."
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing in {shown_path(folder)}: {some_of(missing)}. "
            "Download them there."
        )
    parts = [open_weights(folder / name) for name in names]
    entries: dict[str, WeightEntry] = {}
    for part in parts:
        if twice := part.entries.keys() & entries.keys():
            raise CheckpointError(
                f"{shown(min(twice))} is in {shown(part.path.name)} and in another shard. "
                "The shards are of different downloads: fetch all of them again."
            )
        entries.update(part.entries)
    if lost := sorted(set(wanted) - set(entries)):
        raise CheckpointError(
            f"{index.name} promises {len(lost)} tensors that no shard holds, such as {shown(lost[0])}. "
            "Index and shards are of different downloads: fetch all of them again."
        )
    layout = "safetensors" if len(names) == 1 else f"safetensors in {len(names)} shards"
    mapped = tuple(file for part in parts for file in part.mapped)
    return Weights(folder, entries, parts[0].metadata, layout, tuple(folder / name for name in names), mapped)


def some_of(names: list[str], most: int = 6) -> str:
    """Names as messages show them: the first ones."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _shards_without_index(folder: Path, stem: str) -> list[str]:
    """`stem`.safetensors, or all shards of which one is there; other files that begin alike do not count."""
    if (folder / f"{stem}.safetensors").is_file():
        return [f"{stem}.safetensors"]
    numbered = (re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.safetensors", file.name) for file in folder.iterdir())
    count = max((int(match[1]) for match in numbered if match), default=0)
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _read_index(index: Path) -> dict[str, str]:
    content = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{shown_path(index)} has no weight_map. Download the index file again.")
    for name in content.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > LONGEST_FILE_NAME or "\0" in name:
            raise CheckpointError(
                f"{shown_path(index)} names a file outside its folder: {shown(name)}. Do not use this download."
            )
    return content


def _open_safetensors(path: Path) -> Weights:
    with foreign_parser(path, TORN, CheckpointError, "is not a complete safetensors file"):
        file = MappedFile(path)
    entries = {}
    for name, stored in file.dtypes.items():
        if (dtype := SAFETENSORS_DTYPES.get(stored)) is None:
            raise CheckpointError(
                f"{shown_path(path)}: {shown(name)} is stored as {shown(stored)}, which is not read here. "
                f"Use a file in one of: {', '.join(SAFETENSORS_DTYPES)}."
            )
        entries[name] = WeightEntry(file.shapes[name], dtype, lambda name=name: file.read(name))
    return Weights(path, entries, file.metadata, "safetensors", (path,), (file,))


def _open_pickle(path: Path) -> Weights:
    entries = {
        name: WeightEntry(tuple(value.shape), value.dtype, lambda value=value: value)
        for name, value in read_pickle(path).items()
    }
    return Weights(path, entries, {}, "pickle", (path,))
