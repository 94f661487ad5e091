"""PyTorch files (.pth), looked through before PyTorch opens them: nothing in them is called, and what they make is no
larger than they are.

PyTorch maps records where the list of the zip says they lie, compressed ones too, and makes whatever the pickle names.
So list and pickle are read here first, and what came out is compared with the records afterwards.
"""

import io
import pickletools
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, shown, shown_path
from .outside import file_size, foreign_parser

ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
LARGEST_PICKLE_BYTES = 2_000_000
"""Of names, shapes and places. A tensor takes 100 to 200 bytes of it, the 14B model has 1,260 tensors."""
LARGEST_LIST_BYTES = 8_000_000
"""Of a zip's list of records, about 80 bytes each."""
DEEPEST = 50
"""Values within values; Python cannot hash tuples that are nested a hundred thousand times."""
LARGEST_SHARE = 2
"""Tensors together take at most so many times the file: two of them may share their values, as tied embeddings do."""
OLD_MAGIC = 0x1950A86A20F9469CFC6C
OLD_PICKLES = 5
"""At the start of files from before PyTorch 1.6: magic number, version, system, tensors, order of their values."""
TORN = "The download may have been cut short: download it again."
PLAIN_NAMES = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor(_v[23])?|parameter)|torch \w+Storage|"
    r"torch.storage (Untyped|Typed)Storage|torch b?float\d\w*|torch u?int\d+|torch bool"
)
"""All that a pickle of plain tensors names."""
CALLS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
"""Other ways of a pickle to name or make something. PyTorch writes none of them."""
ADDS = ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD", "ADDITEMS")
"""What fills a value that is there, at no other depth."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
LIST_END = struct.Struct("<4s8xLLH")
BIG_LIST_END, BIG_LIST_POINTER = struct.Struct("<4s36xQQ"), struct.Struct("<4s4xQL")
ENCRYPTED_FLAG, UTF8_FLAG = 0x1, 0x800


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The named tensors of a PyTorch file, mapped where it is a zip.

    Raises:
        CheckpointError: if it is cut short or damaged, holds anything else, or wants to run code.
    """
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(
            f"{shown_path(path)} is called .safetensors but is a PyTorch file, which can hold more than tensors. "
            "Download the safetensors file, or call it .pth if you know where it comes from."
        )
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) == ZIP_START:
            records = check_zip(path, file)
            content = _load(path, path, mmap=True)
            tensors = _named_tensors(path, content)
            _check_storages(path, tensors, records, is_all=tensors is content)
        else:
            file.seek(0)
            first_value = check_old(path, file)
            file.seek(0)
            content = _load(path, file, mmap=False)
            tensors = _named_tensors(path, content)
            _check_old_size(path, tensors, first_value, is_all=tensors is content)
    for name, value in tensors.items():
        _check_plain(path, name, value)
    if sum(value.nbytes for value in tensors.values()) > LARGEST_SHARE * path.stat().st_size:
        raise CheckpointError(
            f"{shown_path(path)} has tensors that are larger than the file: they share their values. "
            "Use the official file or a safetensors one."
        )
    return tensors


def _load(path: Path, source: Path | BinaryIO, mmap: bool) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever the parts raise that PyTorch calls
        if "unable to mmap" in str(error):
            raise CheckpointError(
                f"{shown_path(path)} ({file_size(path) / 1e9:.1f} GB) cannot be mapped into memory: {shown(error)}. "
                "Use a safetensors file, which is mapped in pieces, or give the system more swap space."
            ) from error
        raise CheckpointError(f"{shown_path(path)} is not a complete PyTorch file. {TORN}") from error


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{shown_path(path)} is not a plain set of named tensors. Use the official file or a safetensors one."
        )
    return content


# --- before it is loaded -----------------------------------------------------------------------------------------


def check_pickle(origin: Path, file: BinaryIO) -> Any:
    """Read one pickle without making anything of it; the first value in it, where that is a number.

    Raises:
        CheckpointError: if it is damaged, too deep, or names anything but plain tensors.
    """
    stack: list[int | None] = []  # how deep each value is; None is a mark
    depths: dict[int, int] = {}
    first = None
    try:
        for op, value, _ in pickletools.genops(file):
            if op.name in CALLS or (op.name == "GLOBAL" and not PLAIN_NAMES.fullmatch(str(value))):
                _refuse_call(origin, value if op.name == "GLOBAL" else op.name)
            first = value if first is None and isinstance(value, int) and op.name != "PROTO" else first
            if op.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                depths[len(depths) if op.name == "MEMOIZE" else value] = stack[-1] or 0
            elif op.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(depths[value])
            else:
                _apply(op, stack)
            if stack and (stack[-1] or 0) > DEEPEST:
                raise ValueError("too deep")
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{shown_path(origin)} is not a complete PyTorch file. {TORN}") from error
    return first


def _apply(op: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """What an operation takes from a stack of depths and puts there."""
    taken: list[int] = []
    before = op.stack_before
    if pickletools.markobject in before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() or 0 for _ in before]
    inner = max(taken, default=0)
    depth = inner if op.name in ADDS else inner + 1
    stack += [None if made is pickletools.markobject else depth for made in op.stack_after]


def _refuse_call(path: Path, name: str) -> None:
    raise CheckpointError(
        f"{shown_path(path)} holds more than plain tensors: it wants to run code when it is loaded ({shown(name)}), "
        "which is never allowed here. Use a safetensors file or the official .pth."
    )


def check_zip(path: Path, file: BinaryIO) -> Counter[int]:
    """Look at the list of a zip's records and at its pickle; the sizes of the records that hold values.

    Raises:
        CheckpointError: unless all of it is there, stored as it is, once each, and small where it is read at once.
    """
    _check_list_size(path, file)
    with foreign_parser(path, TORN, CheckpointError), zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        name = next((r.filename for r in records if r.filename.endswith("/data.pkl")), None)
        if name is None:
            raise CheckpointError(
                f"{shown_path(path)} is a zip without tensors, no PyTorch file. Unpack it or use another file."
            )
        folder = name.removesuffix("data.pkl")
        if any(record.filename == f"{folder}constants.pkl" for record in records):
            raise CheckpointError(f"{shown_path(path)} is a TorchScript program, not weights. Use a safetensors file.")
        _check_records(path, file, records, folder)
        sizes = {record.filename.removeprefix(folder): record.file_size for record in records}
        if max(sizes["data.pkl"], sizes.get("byteorder", 0)) > LARGEST_PICKLE_BYTES:
            raise CheckpointError(
                f"{shown_path(path)} describes its tensors in {sizes['data.pkl']:,} bytes; at most "
                f"{LARGEST_PICKLE_BYTES:,} are read. Use the official file or a safetensors one."
            )
        if "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
            raise CheckpointError(
                f"{shown_path(path)} was made on a computer with the other order of bytes. Use a safetensors file."
            )
        check_pickle(path, io.BytesIO(archive.read(name)))
    return Counter(size for name, size in sizes.items() if name.startswith("data/"))


def _check_list_size(path: Path, file: BinaryIO) -> None:
    """Whether a zip's list ends with the file and is small enough to be read."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    torn = CheckpointError(f"{shown_path(path)} ({size:,} bytes) is not a complete PyTorch file. {TORN}")
    if size < LIST_END.size + BIG_LIST_POINTER.size:
        raise torn
    file.seek(size - LIST_END.size)
    mark, length, start, comment = LIST_END.unpack(file.read(LIST_END.size))
    stop = size - LIST_END.size
    file.seek(stop - BIG_LIST_POINTER.size)
    pointer, big_end, _ = BIG_LIST_POINTER.unpack(file.read(BIG_LIST_POINTER.size))
    if pointer == b"PK\x06\x07":  # numbers of more than 4 bytes are in a larger end before this one
        stop = min(big_end, size - BIG_LIST_END.size)
        file.seek(stop)
        _, length, start = BIG_LIST_END.unpack(file.read(BIG_LIST_END.size))
    if mark != b"PK\x05\x06" or comment or start + length != stop:
        raise torn
    if length > LARGEST_LIST_BYTES:
        raise CheckpointError(
            f"{shown_path(path)} has a list of records of {length:,} bytes; at most {LARGEST_LIST_BYTES:,} are read. "
            "Use the official file or a safetensors one."
        )


def _check_records(path: Path, file: BinaryIO, records: list[zipfile.ZipInfo], folder: str) -> None:
    """Whether records are stored as they are, one behind the other, under one folder and different names."""
    if twice := [name for name, count in Counter(record.filename for record in records).items() if count > 1]:
        raise CheckpointError(f"{shown_path(path)} has two records {shown(twice[0])}. Use another file.")
    end = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & ENCRYPTED_FLAG:
            raise CheckpointError(
                f"{shown_path(path)} is compressed or encrypted ({shown(record.filename)}): its tensors cannot be "
                "mapped. Use the official file, or save it again with torch.save."
            )
        file.seek(record.header_offset)
        header = file.read(LOCAL_HEADER.size)
        mark, name_length, extra = LOCAL_HEADER.unpack(header.ljust(LOCAL_HEADER.size, b"\0"))
        file.seek(record.header_offset + LOCAL_HEADER.size)
        spelling = "utf-8" if record.flag_bits & UTF8_FLAG else "cp437"
        is_here = mark == ZIP_START and file.read(name_length) == record.orig_filename.encode(spelling)
        is_ours = record.filename.startswith(folder) and record.file_size == record.compress_size
        if not (is_here and is_ours and record.header_offset >= end):
            raise CheckpointError(
                f"{shown_path(path)} is not a complete PyTorch file (record {shown(record.filename)}). {TORN}"
            )
        end = record.header_offset + LOCAL_HEADER.size + name_length + extra + record.file_size
    if end > file_size(path):
        raise CheckpointError(f"{shown_path(path)} is not a complete PyTorch file. {TORN}")


def check_old(path: Path, file: BinaryIO) -> int:
    """Look through the pickles of a file from before PyTorch 1.6; where the values of its tensors begin.

    Raises:
        CheckpointError: if it is damaged or holds more than tensors.
    """
    head = io.BytesIO(file.read(LARGEST_PICKLE_BYTES))
    if check_pickle(path, head) != OLD_MAGIC:
        raise CheckpointError(f"{shown_path(path)} is not a complete PyTorch file. {TORN}")
    for _ in range(OLD_PICKLES - 1):
        check_pickle(path, head)
    return head.tell()


# --- behind it ---------------------------------------------------------------------------------------------------


def _storages(tensors: dict[str, Tensor]) -> list[int]:
    """Bytes of each piece of memory that tensors share."""
    found = {}
    for value in tensors.values():
        if value.layout == torch.strided and value.device.type == "cpu":
            storage = value.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return list(found.values())


def _check_storages(path: Path, tensors: dict[str, Tensor], records: Counter[int], is_all: bool) -> None:
    """PyTorch maps as much as the pickle asks for, into the next record where that is more than there is.

    Args:
        is_all: whether these tensors are all that the file holds, so that each record is one of them.
    """
    found, records = Counter(_storages(tensors)), Counter({size: n for size, n in records.items() if size})
    if found - records or (is_all and records - found):
        raise CheckpointError(
            f"{shown_path(path)} has tensors of other sizes than its records. It is damaged: download it again."
        )


def _check_old_size(path: Path, tensors: dict[str, Tensor], first_value: int, is_all: bool) -> None:
    """A number of 8 bytes and the values for each piece of memory, to the end of the file. `is_all`: as above."""
    storages, empty = _storages(tensors), sum(not value.numel() for value in tensors.values())
    left = file_size(path) - first_value - sum(storages) - 8 * len(storages)
    if left < 0 or (is_all and left > 8 * empty):
        raise CheckpointError(f"{shown_path(path)} is not a complete PyTorch file. {TORN}")


def _check_plain(path: Path, name: str, value: Tensor) -> None:
    """Whether a tensor is of plain numbers, each with a place of its own."""
    is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not is_plain or value.is_complex():
        what = f"{value.dtype} {value.layout} on {value.device.type}".replace("torch.", "")
        raise CheckpointError(
            f"{shown_path(path)}: {shown(name)} is no plain tensor ({what}). "
            "Use the official file or a safetensors one."
        )
    reach = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and value.numel():
            if stride < reach:
                raise CheckpointError(
                    f"{shown_path(path)}: values of {shown(name)} lie on one another. Use the official file."
                )
            reach = stride * size
