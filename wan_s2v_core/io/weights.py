"""Weights files opened without reading them: names, shapes and types at once, each tensor when it is asked for.

What a file is, is told from its first bytes. safetensors are mapped into memory; `.pth` files are loaded with
`weights_only=True` alone, so that they cannot run code.
"""

import bisect
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .maps import note_map

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
PIECE_BYTES = 4_000_000_000
"""Of a file, mapped at once; more for a tensor that is larger."""
FOREIGN_STARTS = (
    (b"GGUF", "a GGUF file, which this version does not read", "Use the bf16, fp16 or fp8_scaled safetensors file."),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Run 'git lfs pull' or download the file."),
    (b"<", "a web page, not weights", "Download the file itself; the site may ask for a login or a licence first."),
)


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
        """Raises SafetensorError or OSError unless the file is whole."""
        with safe_open(self.path, framework="np") as handle:  # checks it; maps nothing that could be refused
            self.metadata = handle.metadata() or {}
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        first = HEADER_LENGTH_BYTES + length
        for name, facts in header.items():
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
                    f"{size / 1e9:.1f} GB of {self.path} cannot be mapped into memory: {error}. Close other programs, "
                    "or give the system more swap space; if the file has changed, load it again."
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
    if not path.is_file():
        what = "no regular file" if path.exists() else "not there"
        raise CheckpointError(f"{path} is {what}. A weights file was expected; check the name and the folder.")
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    for magic, what, cure in FOREIGN_STARTS:
        if start.startswith(magic):
            raise CheckpointError(f"{path} is {what}. {cure}")
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        return _open_pickle(path)
    raise CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is not a complete safetensors or PyTorch file. "
        "The download may have been cut short: download it again."
    )


def open_shards(folder: Path, stem: str) -> Weights:
    """Open `stem`.safetensors or its shards in `folder`; the index file decides if there is one.

    Raises:
        CheckpointError: if nothing is there, or shards are missing or do not hold what the index says.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        wanted = _read_index(index)
        names = sorted(set(wanted.values()))
    else:
        names, wanted = _shards_without_index(folder, stem), {}
    if not names:
        raise CheckpointError(f"{folder} holds no {stem}*.safetensors. Point to the folder that holds the shards.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing in {folder}: {', '.join(missing)}. Download them there."
        )
    parts = [open_weights(folder / name) for name in names]
    entries: dict[str, WeightEntry] = {}
    for part in parts:
        entries.update(part.entries)
    if lost := sorted(set(wanted) - set(entries)):
        raise CheckpointError(
            f"{index.name} promises {len(lost)} tensors that no shard holds, such as {lost[0]}. "
            "Index and shards are of different downloads: fetch all of them again."
        )
    layout = "safetensors" if len(names) == 1 else f"safetensors in {len(names)} shards"
    mapped = tuple(file for part in parts for file in part.mapped)
    return Weights(folder, entries, parts[0].metadata, layout, tuple(folder / name for name in names), mapped)


def _shards_without_index(folder: Path, stem: str) -> list[str]:
    """`stem`.safetensors, or all shards of which one is there; other files that begin alike do not count."""
    if (folder / f"{stem}.safetensors").is_file():
        return [f"{stem}.safetensors"]
    numbered = (re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.safetensors", file.name) for file in folder.iterdir())
    count = max((int(match[1]) for match in numbered if match), default=0)
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _read_index(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{index} has no weight_map. Download the index file again.")
    if outside := [name for name in content.values() if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}. Do not use this download.")
    return content


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download it again.") from error
    return parse_json(text, str(path))


def parse_json(text: str, origin: str) -> dict:
    """Parse a JSON object that came from `origin`.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{origin} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds a {type(content).__name__}, not a JSON object. Download it again.")
    return content


def _open_safetensors(path: Path) -> Weights:
    try:
        file = MappedFile(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}. "
            "The download may have been cut short: download it again."
        ) from error
    entries = {}
    for name, stored in file.dtypes.items():
        if (dtype := SAFETENSORS_DTYPES.get(stored)) is None:
            raise CheckpointError(
                f"{path}: {name} is stored as {stored}, which is not read here. "
                f"Use a file in one of: {', '.join(SAFETENSORS_DTYPES)}."
            )
        entries[name] = WeightEntry(file.shapes[name], dtype, lambda name=name: file.read(name))
    return Weights(path, entries, file.metadata, "safetensors", (path,), (file,))


def _open_pickle(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):  # PyTorch's words for what it refuses to call
            raise CheckpointError(
                f"{path} holds more than tensors and wants to run code when it is loaded, which is never allowed here "
                "(a file that was cut short can look the same). Use a safetensors file or the official .pth."
            ) from error
        raise CheckpointError(f"{path} is not a complete PyTorch file. Download it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        if "unable to mmap" in str(error):
            raise CheckpointError(
                f"{path} ({path.stat().st_size / 1e9:.1f} GB) cannot be mapped into memory: {error}. Use a safetensors "
                "file, which is mapped in pieces, or give the system more swap space."
            ) from error
        raise CheckpointError(f"{path} is not a complete PyTorch file. Download it again.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{path} is not a plain set of named tensors. Use the official file or a safetensors one."
        )
    entries = {
        name: WeightEntry(tuple(value.shape), value.dtype, lambda value=value: value) for name, value in content.items()
    }
    return Weights(path, entries, {}, "pickle", (path,))
