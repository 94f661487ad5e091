"""Ways to damage a checkpoint folder, by chance and by intent. Each is called with a copy of the folder and a source of
random numbers; what they make is to be refused in one line, or to be read."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from wan_s2v_core.model.loading import DIT_STEM, OFFICIAL_FILES, TOKENIZER_FOLDER

Mutation = Callable[[Path, random.Random], None]
VAE_FILE, TEXT_FILE, SPEECH_FOLDER = (names[0] for names in OFFICIAL_FILES.values())
SHARD = f"{DIT_STEM}-00001-of-00002.safetensors"
SAFETENSORS = (SHARD, f"{DIT_STEM}-00002-of-00002.safetensors", f"{SPEECH_FOLDER}/model.safetensors")
PICKLES = (VAE_FILE, TEXT_FILE)
INDEX, CONFIG, SPEECH_CONFIG = f"{DIT_STEM}.safetensors.index.json", "config.json", f"{SPEECH_FOLDER}/config.json"
PIECES = f"{TOKENIZER_FOLDER}/spiece.model"
EVERY_FILE = (*SAFETENSORS, *PICKLES, INDEX, CONFIG, SPEECH_CONFIG, PIECES)
ODD = (
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**63,
    10**30,
    1e308,
    None,
    True,
    "",
    "x" * 3000,
    [],
    [0] * 70_000,
    {},
    [[1]],
    "\ud800",
)
"""Values for settings of any kind."""


# --- any file ----------------------------------------------------------------------------------------------------


def flip(content: bytes, chance: random.Random, stop: int | None = None) -> bytes:
    """A few bytes changed, within the first `stop`."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(min(len(changed), stop or len(changed)))] = chance.randrange(256)
    return bytes(changed)


def flipped(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice(EVERY_FILE)
    file.write_bytes(flip(file.read_bytes(), chance, chance.choice((None, 8, 200, 20_000))))


def cut(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice(EVERY_FILE)
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(chance.choice((0, 1, 9, chance.randrange(min(size, 3000)), chance.randrange(size), size - 1)))


def longer(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice(EVERY_FILE)
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.choice((1, 22, 5000))))


def something_else(folder: Path, chance: random.Random) -> None:
    starts = (
        b"GGUF\3\0\0\0{",
        b"version https://git-lfs",
        b"<!DOCTYPE html>",
        b"\xef\xbb\xbf<html>",
        b"\x89PNG\r\n\x1a\n",
    )
    starts += (
        b"RIFF",
        b"PK\3\4",
        b"PK\5\6" + bytes(18),
        b"\x80\2}.",
        b"\x80",
        b"\x1f\x8b\b",
        b"{}",
        b"[1]",
        b"",
        bytes(8),
    )
    noise = chance.randbytes(chance.choice((0, 50, 9000)))
    (folder / chance.choice(EVERY_FILE)).write_bytes(chance.choice(starts) + noise)


def other_places(folder: Path, chance: random.Random) -> None:
    """Files of the folder under one another's names."""
    one, other = chance.sample(EVERY_FILE, 2)
    shutil.move(folder / one, folder / "kept")
    shutil.move(folder / other, folder / one)
    shutil.move(folder / "kept", folder / other)


def special_file(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice(EVERY_FILE)
    file.unlink()
    kind = chance.choice(("pipe", "folder", "zero", "circle", "sparse", "gone"))
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("zero", "circle"):
        file.symlink_to("/dev/zero" if kind == "zero" else file)
    elif kind == "sparse":
        with file.open("wb") as handle:
            handle.truncate(30 * 10**9)


# --- safetensors -------------------------------------------------------------------------------------------------


def parts_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def header_changed(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice(SAFETENSORS)
    header, data = parts_of(file)
    name = chance.choice([key for key in header if key != "__metadata__"])
    facts = header[name]
    shape = facts["shape"]
    changes = {
        "dtype": lambda: facts.update(
            dtype=chance.choice(("F16", "I16", "U8", "F32", "F8_E4M3", "BOOL", "F4", "C64", 7))
        ),
        "turned": lambda: facts.update(shape=shape[::-1]),
        "flat": lambda: facts.update(shape=[1] * chance.choice((1, 70)) + shape),
        "nothing": lambda: facts.update(shape=[2 ** chance.choice((31, 62, 63)), 0]),
        "huge": lambda: facts.update(shape=[2**40, 2**40]),
        "offsets": lambda: facts.update(data_offsets=[chance.randrange(-9, 10**6), chance.choice((0, 10**6, 2**64))]),
        "renamed": lambda: header.update(
            {chance.choice(("x" * 99_999, "\n\x1b[31m", "", name + ".lora_A")): header.pop(name)}
        ),
        "lost": lambda: header.pop(name),
        "config": lambda: header.update(
            __metadata__={"config": chance.choice(("{", "[]", '{"num_layers": 70000}', "[" * 9999))}
        ),
        "metadata": lambda: header.update(__metadata__=chance.choice((7, {"a": 7}, [], {"format": "pt" * 99_999}))),
    }
    changes[chance.choice(list(changes))]()
    write_header(file, json.dumps(header).encode(), data)


def header_spelled(folder: Path, chance: random.Random) -> None:
    """The same header in other words, some of which are none."""
    file = folder / chance.choice(SAFETENSORS)
    header, data = parts_of(file)
    text = json.dumps(header).encode()
    twice = text[:-1] + b", " + text[1:]
    spaces = text + b" " * ((60 - len(text)) % 256)
    write_header(file, chance.choice((spaces, twice, b"[" * 100_000, text[:-1] + b"\xff}", text + bytes(9))), data)


# --- PyTorch files -----------------------------------------------------------------------------------------------


def rewrite(
    file: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED, more=()
) -> None:
    """The zip with other records: `change` gives each one's content, None leaves it out."""
    with zipfile.ZipFile(file) as source:
        records = [(info.filename, source.read(info)) for info in source.infolist()]
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as target:
        warnings.simplefilter("ignore")  # names that are there twice
        for name, content in [*records, *more]:
            if (changed := change(name, content)) is not None:
                target.writestr(name, changed)


def pickle_flipped(folder: Path, chance: random.Random) -> None:
    rewrite(
        folder / chance.choice(PICKLES), lambda name, data: flip(data, chance) if name.endswith("data.pkl") else data
    )


def zip_changed(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice(PICKLES)
    root, one = f"{file.stem}/", f"data/{chance.randrange(9)}"
    kind = chance.choice(("deflated", "bomb", "short", "long", "lost", "twice", "byteorder", "script", "many", "moved"))
    if kind in ("deflated", "bomb"):
        bomb = b"N" * (3 * 10**8 if kind == "bomb" else 0)
        rewrite(file, lambda name, data: bomb or data if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED)
    elif kind in ("short", "long", "lost"):
        others = {
            "short": lambda data: data[: len(data) // 2],
            "long": lambda data: data * 2,
            "lost": lambda data: None,
        }
        rewrite(file, lambda name, data: others[kind](data) if name.endswith(f"/{one}") else data)
    elif kind == "moved":
        rewrite(file, lambda name, data: None, more=[("other/" + one, b"x")])
    else:
        more = {"twice": [(root + one, b"x")], "script": [(root + "constants.pkl", b"\x80\2}.")]}
        more["many"] = [(f"{root}{number}", b"") for number in range(20_000)]
        order = kind == "byteorder"
        rewrite(
            file, lambda name, data: b"big" if order and name.endswith("byteorder") else data, more=more.get(kind, ())
        )


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Callable, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def nested(depth: int) -> bytes:
    """A dict with a tuple of tuples of tuples as its key, which Python cannot hash."""
    return b"\x80\2})" + b"\x85" * depth + b"Ns."


def pickle_replaced(folder: Path, chance: random.Random) -> None:
    harmful = (
        nested(300_000),
        pickle.dumps({"a": Calls(bytearray, 10**11)}, 2),
        pickle.dumps({"a": Calls(os.system, "touch /tmp/never")}, 2),
        pickle.dumps({"a": Calls(eval, "1")}, chance.choice((0, 1, 2, 4))),
        b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\2ctorch._utils\n_rebuild_parameter\n(NNNtR.",
        b"\x80\2}q\0h\0h\0s.",
        b"\x80\2" + b"(" * 1000 + b"t" * 1000 + b".",
        b"\x80\2J\xff\xff\xff\x7f.",
        pickle.dumps([1.5, "x" * 100_000], 2),
    )
    made = chance.choice(harmful)
    rewrite(folder / chance.choice(PICKLES), lambda name, data: made if name.endswith("data.pkl") else data)


def odd_tensors(folder: Path, chance: random.Random) -> None:
    """What torch.save can write and no network takes, or only in another form."""
    file = folder / chance.choice(PICKLES)
    weights = torch.load(file, weights_only=True)
    name = chance.choice([key for key, value in weights.items() if value.ndim > 1])
    value = weights[name].float()
    odd = (
        lambda: value.to_sparse(),
        lambda: value.to("meta"),
        lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        lambda: value.to(torch.complex64),
        lambda: value.flatten()[:1].expand(value.shape),
        lambda: torch.as_strided(value.flatten(), value.shape, (1,) * value.ndim),
        lambda: value.int(),
        lambda: value.transpose(0, 1).contiguous().transpose(0, 1),
        lambda: torch.nn.Parameter(value),
        lambda: value.double(),
        lambda: value.to(torch.float8_e5m2),
        lambda: torch.zeros(10**7, 1).expand(-1, 10**4),
        lambda: 7,
    )
    weights[name] = chance.choice(odd)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = chance.choice((weights, {"state_dict": weights, "step": 3}, list(weights.values())))
        torch.save(made, file, _use_new_zipfile_serialization=chance.random() < 0.6)


def old_form(folder: Path, chance: random.Random) -> None:
    """As PyTorch saved before 1.6, whole or damaged."""
    file = folder / chance.choice(PICKLES)
    made = io.BytesIO()
    torch.save(torch.load(file, weights_only=True), made, _use_new_zipfile_serialization=False)
    content = made.getvalue()
    kinds = (content, flip(content, chance, 30_000), content[: chance.randrange(len(content))], content + b"\0" * 8)
    file.write_bytes(chance.choice(kinds))


# --- texts -------------------------------------------------------------------------------------------------------


def settings_changed(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice((CONFIG, SPEECH_CONFIG))
    settings = json.loads(file.read_text())
    known = [
        *settings,
        "_class_name",
        "patch_size",
        "feat_extract_activation",
        "hidden_act",
        "conv_stride",
        "num_experts",
    ]
    for _ in range(chance.choice((1, 1, 3))):
        settings[chance.choice(known)] = chance.choice((*ODD, chance.randrange(200), chance.randrange(10**6)))
    file.write_text(json.dumps(settings))


def index_changed(folder: Path, chance: random.Random) -> None:
    file = folder / INDEX
    content = json.loads(file.read_text())
    names = content["weight_map"]
    bad = ("../" + SHARD, "/dev/zero", "..", "", "a\0b", "x" * 5000, "\n" * 50, SAFETENSORS[1], SAFETENSORS[2], 7, None)
    names[chance.choice([*names, "y" * 50_000])] = chance.choice(bad)
    others = (names, {}, [], None, "x" * 10**6, {f"{number}": f"{number}.safetensors" for number in range(50_000)})
    content["weight_map"] = others[0] if chance.random() < 0.7 else chance.choice(others)
    file.write_text(json.dumps(content))


def text_replaced(folder: Path, chance: random.Random) -> None:
    texts = (
        "",
        "{",
        "[]",
        "null",
        "[" * 200_000,
        '{"a":' * 9000,
        '{"dim": ' + "9" * 5000 + "}",
        "\ufeff{}",
        '{"dim": NaN}',
    )
    (folder / chance.choice((INDEX, CONFIG, SPEECH_CONFIG))).write_text(chance.choice(texts), encoding="utf-8")


def tokenizer_changed(folder: Path, chance: random.Random) -> None:
    pieces = folder / PIECES
    content = pieces.read_bytes()
    fast = pieces.with_name("tokenizer.json")
    texts = ("", "{}", "[]", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "{" * 99_999)
    texts += ('{"version": "1.0", "model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}',)
    if chance.random() < 0.5:
        fast.write_text(chance.choice(texts))
    else:
        pieces.write_bytes(
            chance.choice((flip(content, chance), content[: chance.randrange(len(content))], content * 2))
        )


MUTATIONS: tuple[Mutation, ...] = (
    *(flipped, cut, longer, something_else, other_places, special_file),
    *(header_changed, header_spelled),
    *(pickle_flipped, zip_changed, pickle_replaced, odd_tensors, old_form),
    *(settings_changed, index_changed, text_replaced, tokenizer_changed),
)
