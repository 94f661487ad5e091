"""Edits by hand in what runs keep: folders of clips, and encodings. The same command must make the same film again.

Nobody can tell an edit whose digests were made anew and whose content makes sense; such are not tried.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .kinds import Kinds
from .lab import Lab, chance_for, chosen_kinds, size_of
from .outcome import (
    DIFFERS,
    FINE,
    GIGABYTE,
    LEFT,
    REFUSED,
    SAME,
    SAME_OR_REFUSED,
    TURNED_AWAY,
    Outcome,
    refusal,
    wrong_ending,
)

KINDS = Kinds()
"""Of edits in a folder with v.mkv, v.mkv.clips and encodings. REFUSED is right only where something of somebody else's
would be overwritten; else everything is made again."""
LONG = {"audio_seconds": 2.2, "keep_clips": True}
"""Two clips and the beginning of a third."""
CLIPS = 2
LEFTOVERS = ("*.part", "*.tmp", ".v*")


def clips(folder: Path) -> Path:
    return folder / "v.mkv.clips"


def any_record(chance, folder: Path) -> Path:
    return chance.choice(sorted(clips(folder).glob("*.safetensors")))


def any_film(chance, folder: Path) -> Path:
    return chance.choice(sorted(clips(folder).glob("clip_*.mkv")))


def any_encoding(chance, folder: Path) -> Path:
    return chance.choice(sorted((folder / "kept").glob("*.safetensors")))


def read_record(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
    return load_file(path), facts


def replace(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str] | None) -> None:
    path.unlink()  # other names of the same file stay as they are
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, facts)


def replace_bytes(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# --- facts and tensors of clips ------------------------------------------------------------------------------------

ODD_FACTS = (
    "",
    "0",
    "-1",
    "1",
    "16",
    "65536",
    "9" * 30,
    "9" * 5000,
    "1e3",
    "NaN",
    "x",
    "\0",
    "\ud7ff" * 9,
    "[]",
    "\uff13",
    " 17 ",
    "None",
)


@KINDS.add(SAME)
def a_fact_of_a_clip(chance, folder):
    path = any_record(chance, folder)
    tensors, facts = read_record(path)
    facts[chance.choice((*sorted(facts), "frames", "height", "width"))] = chance.choice(ODD_FACTS)
    replace(path, tensors, facts)


@KINDS.add(SAME)
def facts_less_or_all_gone(chance, folder):
    path = any_record(chance, folder)
    tensors, facts = read_record(path)
    for name in chance.sample(sorted(facts), chance.randint(1, len(facts))):
        del facts[name]
    replace(path, tensors, facts or None)


@KINDS.add(SAME)
def facts_of_another_clip(chance, folder):
    one, other = (clips(folder) / f"clip_000{number}.safetensors" for number in chance.sample(range(CLIPS), 2))
    tensors, facts = read_record(one)
    _, others = read_record(other)
    chosen = chance.sample(sorted(facts), chance.randint(1, len(facts)))
    replace(one, tensors, facts | {name: others.get(name, "") for name in chosen})


@KINDS.add(SAME)
def tensors_of_a_clip(chance, folder):
    """Other values, shapes and types under the old facts."""
    path = any_record(chance, folder)
    tensors, facts = read_record(path)
    name, value = chance.choice(sorted(tensors.items()))
    ways = (
        lambda: value + 1e-3,
        lambda: value * float("nan"),
        lambda: value.half(),
        lambda: value.double(),
        lambda: value.flatten(),
        lambda: value[..., :-1],
        lambda: value.movedim(-1, -2),
        lambda: torch.zeros(0),
        lambda: torch.zeros(()),
        lambda: value.to(torch.int32),
        lambda: -value,
    )
    replace(path, {name: chance.choice(ways)().clone()}, facts)


@KINDS.add(SAME)
def tensors_less_or_more(chance, folder):
    path = any_record(chance, folder)
    tensors, facts = read_record(path)
    name, value = next(iter(tensors.items()))
    ways = ({}, {"other": value}, tensors | {"more": torch.zeros(3)}, {name.upper(): value}, {"": value})
    replace(path, chance.choice(ways), facts)


@KINDS.add(SAME)
def bytes_of_a_record(chance, folder):
    path = any_record(chance, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    ways = ("flip", "header", "cut", "empty", "noise", "length", "more")
    way = chance.choice(ways)
    if way == "flip":
        content[chance.randrange(8 + length, len(content))] ^= 1 << chance.randrange(8)
    elif way == "header":
        content[chance.randrange(8, 8 + length)] ^= 1 << chance.randrange(8)
    elif way == "length":
        content[:8] = struct.pack("<Q", chance.choice((0, 2**40, 2**64 - 1)))
    content = {"cut": content[: len(content) // 2], "empty": b"", "noise": chance.randbytes(999)}.get(way, content)
    replace_bytes(path, bytes(content) + (b"\0" if way == "more" else b""))


@KINDS.add(SAME)
def the_record_of_a_clip_gone(chance, folder):
    chance.choice((any_record, any_film))(chance, folder).unlink()


@KINDS.add(SAME)
def the_frames_behind_gone_or_older(chance, folder):
    """Those that the next clip starts from."""
    path = clips(folder) / "motion.safetensors"
    tensors, facts = read_record(path)
    facts["key"] = read_record(clips(folder) / "clip_0000.safetensors")[1].get("key", "")
    chance.choice(
        (path.unlink, lambda: replace(path, tensors, facts), lambda: replace(path, {"x": torch.zeros(1)}, facts))
    )()
    if chance.random() < 0.5:
        (clips(folder) / f"clip_000{CLIPS}.safetensors").unlink(missing_ok=True)


# --- films of clips ------------------------------------------------------------------------------------------------


@KINDS.add(SAME)
def films_exchanged(chance, folder):
    one, other = (clips(folder) / f"clip_000{number}.mkv" for number in (0, 1))
    content = (one.read_bytes(), other.read_bytes())
    replace_bytes(one, content[1])
    if chance.random() < 0.5:
        replace_bytes(other, content[0])


@KINDS.add(SAME)
def bytes_of_a_film(chance, folder):
    path = any_film(chance, folder)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    replace_bytes(
        path, bytes(chance.choice((content, content[:-9], content[: len(content) // 3], content + b"\0", b"")))
    )


@KINDS.add(SAME)
def another_film(chance, folder):
    """Black, longer, shorter or of another size, without sound."""
    path, side, frames = any_film(chance, folder), chance.choice((64, 48, 128)), chance.choice((1, 17, 20, 40))
    path.unlink()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width = stream.height = side
        stream.pix_fmt = "bgr0"
        for _ in range(frames):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24"))
            )
        container.mux(stream.encode(None))


# --- folders -------------------------------------------------------------------------------------------------------


@KINDS.add(SAME)
def a_record_that_is_no_file(chance, folder):
    path = chance.choice((any_record, any_film))(chance, folder)
    path.unlink()
    ways = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/urandom"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.open("wb").truncate(80_000_000_000),
    )
    chance.choice(ways)()


@KINDS.add(SAME_OR_REFUSED)
def a_folder_in_place_of_a_record(chance, folder):
    """It may hold somebody's work."""
    path = chance.choice((any_record, any_film))(chance, folder)
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@KINDS.add(SAME_OR_REFUSED)
def more_in_the_folder(chance, folder):
    """Files of ours with odd numbers, and of others."""
    record = any_record(chance, folder)
    names = (
        "clip_9999.safetensors",
        "clip_0007.safetensors",
        "clip_00000.safetensors",
        "clip_-001.safetensors",
        "clip_٣٣٣٣.safetensors",
    )
    names += (
        ".clip_0000.abc.part",
        "notes.txt",
        "sub/clip_0000.mkv",
        "clip_0002.mkv",
        "CLIP_0000.mkv",
        "lock",
        ".lock",
    )
    path = clips(folder) / chance.choice(names)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        shutil.copy(record, path)


@KINDS.add(SAME_OR_REFUSED)
def the_folder_itself(chance, folder):
    """A file, a link to nowhere or to itself, read-only, or empty."""
    path = clips(folder)
    ways = ("file", "nowhere", "round", "read-only", "empty", "elsewhere", "settings")
    way = chance.choice(ways)
    if way == "read-only":
        path.chmod(0o500)
        return
    if way == "elsewhere":
        path.rename(folder / "moved")
        path.symlink_to("moved")
        return
    if way == "settings":
        for file in path.iterdir():
            if file.name != "settings.json":
                file.unlink()
        return
    shutil.rmtree(path)
    {
        "file": path.touch,
        "nowhere": lambda: path.symlink_to("x"),
        "round": lambda: path.symlink_to(path.name),
        "empty": path.mkdir,
    }[way]()


@KINDS.add(SAME)
def settings_that_are_none(chance, folder):
    path = clips(folder) / "settings.json"
    text = path.read_text()
    texts = (
        "",
        "{}",
        "[]",
        "null",
        "5",
        "[" * 100_000,
        '{"a":' * 60_000,
        text[:-9],
        text + "}",
        "\ud7ff",
        "NaN",
        '{"x": ' + "9" * 9000 + "}",
    )
    replace_bytes(
        path,
        chance.choice(
            (*(text.encode("utf-8", "surrogatepass") for text in texts), b"\xff\xfe\0", text.encode("utf-16"))
        ),
    )


@KINDS.add(SAME_OR_REFUSED)
def a_setting_of_another_kind(chance, folder):
    """In settings.json alone: which clips are whose is told by their keys."""
    path = clips(folder) / "settings.json"
    content = json.loads(path.read_text())
    odd = (None, 5, "x", [], {}, -1, 2**70, 1e308, True, [[]], "9" * 999)
    part = chance.choice(sorted(content))
    if chance.random() < 0.4 or not isinstance(content[part], dict) or not content[part]:
        content[part] = chance.choice(odd)
    else:
        content[part][chance.choice(sorted(content[part]))] = chance.choice(odd)
    replace_bytes(path, json.dumps(content).encode())


@KINDS.add(SAME_OR_REFUSED)
def settings_that_are_no_file(chance, folder):
    path = clips(folder) / "settings.json"
    path.unlink()
    ways = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        path.mkdir,
        lambda: path.symlink_to(path.name),
    )
    chance.choice((*ways, lambda: path.open("wb").truncate(80_000_000_000)))()


@KINDS.add(SAME)
def the_video_itself(chance, folder):
    """What was made before is gone, or something else has its name."""
    path = folder / "v.mkv"
    path.unlink()
    chance.choice((lambda: None, path.touch, lambda: path.symlink_to("nowhere"), lambda: path.write_bytes(b"mine")))()


# --- encodings -----------------------------------------------------------------------------------------------------


@KINDS.add(SAME)
def values_of_an_encoding(chance, folder):
    path = any_encoding(chance, folder)
    tensors, facts = read_record(path)
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    ways = (
        lambda: value + 0.01,
        lambda: value * float("nan"),
        lambda: value[..., :-1],
        lambda: value[:0],
        lambda: torch.zeros_like(value),
        lambda: value.half(),
        lambda: value.double(),
        lambda: value.to(torch.int32),
        lambda: value.flatten(),
        lambda: torch.cat([value, value]),
    )
    replace(path, tensors | {name: chance.choice(ways)().clone()}, chance.choice((facts or None, None)))


@KINDS.add(SAME)
def names_in_an_encoding(chance, folder):
    path = any_encoding(chance, folder)
    tensors, facts = read_record(path)
    name = chance.choice(sorted(tensors))
    chance.choice(
        (
            lambda: tensors.pop(name),
            lambda: tensors.update({"x": tensors.pop(name)}),
            lambda: tensors.update(x=torch.zeros(2)),
        )
    )()
    replace(path, tensors, facts or None)


@KINDS.add(SAME)
def bytes_of_an_encoding(chance, folder):
    path = any_encoding(chance, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    place = chance.choice((chance.randrange(8, 8 + length), chance.randrange(8 + length, len(content))))
    content[place] ^= 1 << chance.randrange(8)
    replace_bytes(
        path, bytes(chance.choice((content, content, content, content[:-1], b"", content + b"\0", b"PK\x03\x04")))
    )


@KINDS.add(SAME)
def encodings_exchanged(chance, folder):
    voice, text = (next((folder / "kept").glob(f"{what}-*")) for what in ("voice", "text"))
    content = (voice.read_bytes(), text.read_bytes())
    replace_bytes(voice, content[1])
    replace_bytes(text, content[0])


@KINDS.add(SAME_OR_REFUSED)
def an_encoding_that_is_no_file(chance, folder):
    path = any_encoding(chance, folder)
    path.unlink()
    ways = (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
    )
    chance.choice((*ways, lambda: path.open("wb").truncate(80_000_000_000)))()


# --- the attack ----------------------------------------------------------------------------------------------------


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    numbers = list(numbers)
    kinds = chosen_kinds(sorted(KINDS), seed, max(numbers, default=-1) + 1)
    with lab.box() as whole:
        arguments = kept_run(lab, whole)
        answer = lab.worker.ask(do="command", arguments=arguments)
        plain = lab.film(whole / "v.mkv")
        assert plain and clips(whole).is_dir(), answer
        for number in numbers:
            with lab.box(keep) as box:
                yield try_record(lab, kinds[number], seed, number, box, whole, plain)


def kept_run(lab: Lab, folder: Path) -> list[str]:
    return lab.generate(folder / "v.mkv", cache_dir=folder / "kept", **LONG)


def try_record(lab: Lab, name: str, seed: int, number: int, box: Path, whole: Path, plain: dict[str, Any]) -> Outcome:
    folder, kind, chance = box / "run", KINDS[name], chance_for(seed, number)
    shutil.copytree(whole, folder)
    kind.make(chance, folder)
    if "encoding" in name:  # else the clips would be taken as they are
        shutil.rmtree(clips(folder))
    extra = {"base_seed": -1} if "setting" in name and chance.random() < 0.3 else {}
    arguments = lab.generate(folder / "v.mkv", cache_dir=folder / "kept", **LONG, **extra)
    answer = lab.worker.ask(do="command", arguments=arguments)

    def outcome(verdict: str, said: str = "") -> Outcome:
        return Outcome("records", name, number, verdict, said, answer["seconds"], answer.get("peak_bytes", 0))

    if wrong := wrong_ending(answer, GIGABYTE + min(size_of(folder), GIGABYTE)):
        return outcome(*wrong)
    if answer["code"]:
        verdict, said = refusal(answer)
        return outcome(TURNED_AWAY if verdict == REFUSED and kind.expects == SAME else verdict, said)
    film = lab.film(folder / "v.mkv")
    same = all(film.get(fact) == plain[fact] for fact in ("frames", "digest", "sound_digest"))
    if not same and not extra:
        return outcome(DIFFERS, f"{film.get('frames')} frames, mean {film.get('mean', 0):.0f}, for {plain['frames']}")
    if left := [path.name for pattern in LEFTOVERS for path in folder.rglob(pattern) if ".abc." not in path.name]:
        return outcome(LEFT, ", ".join(left))
    return outcome(FINE)
