"""Damage to `.pth` files: the zip around them, the pickle inside, and what tensors can be made to mean."""

import io
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .kinds import Kinds
from .outcome import ANY, BAD, SAME, SAME_OR_REFUSED
from .weight_headers import PICKLED

KINDS = Kinds()
HUGE_BYTES = 3_000_000_000


def any_pickle(chance: random.Random, folder: Path) -> Path:
    return folder / f"{chance.choice(PICKLED)}.pth"


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def replace_pickle(path: Path, content: bytes) -> None:
    parts = members(path)
    write_zip(path, {name: content if name.endswith("data.pkl") else old for name, old in parts.items()})


def resave(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], **how: Any) -> None:
    """Write what `edit` makes of the weights, or the weights that it has changed."""
    weights = torch.load(path, weights_only=True)
    made = edit(weights)
    torch.save(weights if made is None else made, path, **how)


# --- the zip -------------------------------------------------------------------------------------------------------


@KINDS.add(SAME_OR_REFUSED)
def a_zip_that_is_compressed(chance, folder):
    path = any_pickle(chance, folder)
    write_zip(path, members(path), chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


@KINDS.add(SAME_OR_REFUSED)
def one_member_compressed(chance, folder):
    path = any_pickle(chance, folder)
    parts = members(path)
    chosen = chance.choice(sorted(parts))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == chosen else zipfile.ZIP_STORED)


@KINDS.add(BAD)
def a_zip_bomb(chance, folder):
    """Zeros or opcodes that a few megabytes become gigabytes of."""
    path = any_pickle(chance, folder)
    parts = members(path)
    victims = [name for name in parts if name.endswith(("data.pkl", "/data/0", "byteorder", "version"))]
    victim, piece = chance.choice(sorted(victims)), chance.choice((b"\0", b"N", b"0")) * 10_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            if name != victim:
                archive.writestr(name, content)
        with archive.open(victim, "w", force_zip64=True) as file:
            for _ in range(HUGE_BYTES // len(piece)):
                file.write(piece)
    return SAME_OR_REFUSED if victim.endswith(("byteorder", "version")) else BAD


@KINDS.add(SAME_OR_REFUSED)
def members_less_or_twice(chance, folder):
    path = any_pickle(chance, folder)
    parts = members(path)
    chosen = chance.choice(sorted(parts))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of zipfile, about names that are there twice
        for name, content in parts.items():
            times = chance.choice((0, 2)) if name == chosen else 1
            for time in range(times):
                archive.writestr(name, content if time == 0 else bytes(len(content)))
    return ANY


@KINDS.add(SAME_OR_REFUSED)
def names_of_members(chance, folder):
    path = any_pickle(chance, folder)
    ways = (
        lambda name: "../" * 9 + name,
        lambda name: "/" + name,
        lambda name: name.split("/", 1)[1],
        lambda name: name.replace("/", "\\"),
        lambda name: "x" * 60_000 + name,
        lambda name: name.upper(),
    )
    way = chance.choice(ways)
    write_zip(path, {way(name): content for name, content in members(path).items()})


@KINDS.add(ANY)
def bits_of_the_zips_list(chance, folder):
    path = any_pickle(chance, folder)
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02") if chance.random() < 0.5 else content.index(b"PK\x01\x02")
    for _ in range(chance.choice((1, 4))):
        content[chance.randrange(start, len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@KINDS.add(ANY)
def sizes_in_the_zips_list(chance, folder):
    """Sizes, offsets and methods that the list only claims."""
    path = any_pickle(chance, folder)
    content = bytearray(path.read_bytes())
    places = [i for i in range(len(content) - 46) if content[i : i + 4] == b"PK\x01\x02"]
    place, field = chance.choice(places), chance.choice((10, 20, 24, 28, 30, 42))
    struct.pack_into("<H", content, place + field, chance.choice((0, 8, 12, 99, 0xFFFF, chance.randrange(65536))))
    path.write_bytes(content)


@KINDS.add(SAME_OR_REFUSED)
def a_zip_that_claims_a_password(chance, folder):
    path = any_pickle(chance, folder)
    content = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(magic)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(magic, place + 4)
    path.write_bytes(content)


@KINDS.add(SAME_OR_REFUSED)
def something_around_the_zip(chance, folder):
    """Zips are read from their end: what stands before is allowed."""
    path = any_pickle(chance, folder)
    content, more = path.read_bytes(), chance.randbytes(chance.choice((1, 64, 4096)))
    ways = (
        more + content,
        content + more,
        b"#!/bin/sh\n" + content,
        content + b"PK\x05\x06" + bytes(18),
        content + content,
    )
    path.write_bytes(chance.choice(ways))
    return ANY


@KINDS.add(BAD)
def a_zip_of_something_else(chance, folder):
    path = any_pickle(chance, folder)
    others = (
        {},
        {"word/document.xml": b"<w/>"},
        {"archive/data.pkl": b""},
        {"archive/data.pkl": b"\x80\x02}."},
        {"arr_0.npy": b"\x93NUMPY\x01\x00"},
        {"archive/constants.pkl": b"\x80\x02).", "archive/data.pkl": b"\x80\x02)."},
        {"archive/data.pkl": b"\x80\x02}.", "archive/code/__torch__.py": b"import os"},
    )
    write_zip(path, chance.choice(others))


@KINDS.add(BAD)
def a_pth_cut_short(chance, folder):
    path = any_pickle(chance, folder)
    size = path.stat().st_size
    path.write_bytes(
        path.read_bytes()[: chance.choice((0, 2, 3, 4, 30, size // 3, size - 1, size - 22, chance.randrange(size)))]
    )


@KINDS.add(ANY)
def bits_of_a_pth_flipped(chance, folder):
    path = any_pickle(chance, folder)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 5, 100))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@KINDS.add(BAD)
def an_archive_of_another_kind(chance, folder):
    path = any_pickle(chance, folder)
    content, box = path.read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=box, mode="w:gz" if chance.random() < 0.5 else "w") as archive:
        info = tarfile.TarInfo(chance.choice(("pickle", "storages", path.name)))
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    path.write_bytes(
        chance.choice((box.getvalue(), zlib.compress(content), b"\x1f\x8b" + content, b"7z\xbc\xaf" + content))
    )


# --- the pickle ----------------------------------------------------------------------------------------------------


def call(name: str, arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n" + arguments + b"R"


def named(value: bytes) -> bytes:
    """A pickle of a dictionary with one entry."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


CALLS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.Size")
CALLS += ("torch.nn.parameter.Parameter", "torch.Tensor", "torch.device", "_codecs.encode", "builtins.bytearray")
CALLS += ("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor", "torch.storage.UntypedStorage")
CALLS += ("torch._utils._rebuild_meta_tensor_no_storage", "torch.FloatStorage", "torch._tensor._rebuild_from_type_v2")
FORBIDDEN = ("os.system", "builtins.eval", "posix.system", "builtins.getattr", "torch.load", "subprocess.Popen")
FORBIDDEN += ("torch.hub.load", "webbrowser.open", "pickle.loads", "torch.ops.load_library", "builtins.print")


@KINDS.add(BAD)
def calls_that_are_allowed_with_odd_arguments(chance, folder):
    arguments = (
        b")",
        b"(t",
        b"(NNNNt",
        b"(K\x01K\x02t",
        b"(X\x03\x00\x00\x00cpuX\x05\x00\x00\x00cuda9t",
        b"(J\xff\xff\xff\x7ft",
        b"(\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0ft",
        b"(](K\x01K\x02ee}t",
        b"}",
        b"N",
    )
    replace_pickle(any_pickle(chance, folder), named(call(chance.choice(CALLS), chance.choice(arguments))))


@KINDS.add(BAD)
def calls_that_are_forbidden(chance, folder):
    name = chance.choice(FORBIDDEN)
    text = b"touch /tmp/wan_s2v_attack_was_here"
    value = call(name, b"(X" + struct.pack("<I", len(text)) + text + b"t")
    replace_pickle(any_pickle(chance, folder), chance.choice((named(value), b"\x80\x02" + value + b".")))


@KINDS.add(BAD)
def pickles_that_never_end(chance, folder):
    """Small ones that take exponential time or memory: tuples of tuples, texts and lists that claim a size."""
    doubled = b")" + b"".join((b"q%c\x30h%ch%c\x86" % (i, i, i)) for i in range(60))
    ways = (
        b"\x80\x02}" + doubled + b"K\x01s.",
        b"\x80\x02" + b"(" * 500_000 + b"t" * 500_000 + b".",
        b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
        b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\x01.",
        b"\x80\x02" + b"r\xff\xff\xff\xff" + b".",
        b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
        b"\x80\x02F" + b"1" * 1_000_000 + b"\n.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    )
    replace_pickle(any_pickle(chance, folder), chance.choice(ways))


@KINDS.add(BAD)
def pickles_of_opcodes_by_chance(chance, folder):
    body = bytes(chance.choice(b"}](t.NKX)Rcqhsuae0\x85\x86\x87\x88\x80") for _ in range(chance.randrange(3, 60)))
    replace_pickle(
        any_pickle(chance, folder), b"\x80" + chance.choice((b"\x02", b"\x05", b"\x00", b"\xff")) + body + b"."
    )


@KINDS.add(ANY)
def bits_of_the_pickle_flipped(chance, folder):
    path = any_pickle(chance, folder)
    (content,) = [bytearray(part) for name, part in members(path).items() if name.endswith("data.pkl")]
    for _ in range(chance.choice((1, 2, 9))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    replace_pickle(path, bytes(content))


@KINDS.add(BAD)
def another_object(chance, folder):
    objects = (
        None,
        [],
        5,
        "weights",
        {},
        {1: torch.zeros(1)},
        {"a": 1.0},
        {"a": {"b": torch.zeros(1)}},
        {"state_dict": []},
        {"state_dict": {"a": 1}},
        {"epoch": 3, "optimizer": {}},
        torch.zeros(3),
        [torch.zeros(3)],
        OrderedDict(),
        {"x" * 100_000: torch.zeros(1)},
        {"\n\x1b[31m": torch.zeros(1)},
        {"": torch.zeros(0)},
        {"a\ud800": torch.zeros(1)},
    )
    torch.save(chance.choice(objects), any_pickle(chance, folder))


@KINDS.add(BAD)
def a_pickle_of_classes(chance, folder):
    """A whole module, as torch.save writes it: it needs code to be read."""
    torch.save(
        chance.choice((torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2)}, Path("x"))), any_pickle(chance, folder)
    )


# --- tensors -------------------------------------------------------------------------------------------------------


@KINDS.add(SAME)
def the_same_in_another_form(chance, folder):
    """Older files, parameters, views and the names that trainers put around a state dict."""
    path = any_pickle(chance, folder)
    forms = (
        lambda: resave(path, lambda weights: None, _use_new_zipfile_serialization=False),
        lambda: resave(path, lambda weights: {"state_dict": weights}),
        lambda: resave(path, OrderedDict),
        lambda: resave(path, lambda weights: {name: torch.nn.Parameter(value) for name, value in weights.items()}),
        lambda: resave(
            path,
            lambda weights: {
                name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in weights.items()
            },
        ),
        lambda: resave(
            path, lambda weights: {name: torch.cat([value[None]] * 2)[1] for name, value in weights.items()}
        ),
    )
    chance.choice(forms)()


@KINDS.add(SAME_OR_REFUSED)
def values_of_a_pth_that_are_no_numbers(chance, folder):
    bad = chance.choice((float("nan"), float("inf"), float("-inf")))

    def edit(weights):
        name = chance.choice(sorted(weights))
        weights[name].flatten()[chance.randrange(weights[name].numel())] = bad

    resave(any_pickle(chance, folder), edit)


@KINDS.add(BAD)
def tensors_that_claim_to_be_larger(chance, folder):
    """Views of one value: a file of kilobytes with tensors of terabytes."""

    def edit(weights):
        name = chance.choice(sorted(weights))
        shape = chance.choice(((10**6, 10**6), (2**20,) * 3, (10**12,)))
        weights[name] = torch.zeros(1, dtype=torch.bfloat16).expand(shape)

    resave(any_pickle(chance, folder), edit)


@KINDS.add(ANY)
def views_of_one_value(chance, folder):
    """Of the right shape, all over one value."""

    def edit(weights):
        name = chance.choice(sorted(weights))
        weights[name] = weights[name].flatten()[:1].expand(weights[name].numel()).view(weights[name].shape)

    resave(any_pickle(chance, folder), edit)


def odd_tensors() -> tuple[Callable[[torch.Tensor], Any], ...]:
    return (
        lambda value: value.float().to_sparse(),
        lambda value: value.to(torch.complex64),
        lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda value: value.to("meta"),
        lambda value: value.bool(),
        lambda value: torch.empty(0),
        lambda value: value.float()[..., None],
        lambda value: value.to(torch.int32),
        lambda value: torch.nested.nested_tensor([value.float().flatten()]),
        lambda value: None,
        lambda value: [value],
        lambda value: value.float().numpy(),
    )


@KINDS.add(ANY)
def tensors_of_odd_kinds(chance, folder):
    way = chance.choice(odd_tensors())

    def edit(weights):
        name = chance.choice(sorted(weights))
        weights[name] = way(weights[name])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about prototypes
        resave(any_pickle(chance, folder), edit)


@KINDS.add(ANY)
def storages_that_are_too_small(chance, folder):
    """The pickle and its storages are of different files."""
    path = any_pickle(chance, folder)
    parts = members(path)
    victim = chance.choice(sorted(name for name in parts if "/data/" in name))
    size = len(parts[victim])
    parts[victim] = chance.choice((b"", parts[victim][: size // 2], parts[victim] * 2, bytes(size + 1)))
    write_zip(path, parts)


@KINDS.add(BAD)
def plain_pickles(chance, folder):
    """Not of torch."""
    objects = ({"a": 1}, {"a": [1.0] * 99}, list(range(9999)), b"x" * 99_999, {("a",): 1})
    any_pickle(chance, folder).write_bytes(pickle.dumps(chance.choice(objects), protocol=chance.choice((0, 2, 5))))
