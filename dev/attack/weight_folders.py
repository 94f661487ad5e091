"""Damage around the weights: configs, indexes, tokenizers, files of other kinds, and what is no file at all."""

import gzip
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from .kinds import Kinds
from .outcome import ANY, BAD, SAME, SAME_OR_REFUSED
from .weight_headers import SPEECH, STEM

KINDS = Kinds()
TOKENIZER = "google/umt5-xxl/spiece.model"
JSONS = ("config.json", f"{SPEECH}/config.json", f"{STEM}.safetensors.index.json")
WEIGHTS = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", f"{SPEECH}/model.safetensors")
WEIGHTS += tuple(f"{STEM}-0000{shard}-of-00002.safetensors" for shard in (1, 2))
FILES = (*JSONS, *WEIGHTS, TOKENIZER)
NUMBERS = (-1, 0, 1, 2, 3, 7, 97, 65_535, 65_536, 10**6, 2**31 - 1, 2**31, 2**53, 10**300, 0.5, 1e308, 1e-320, -0.0)
ODD_VALUES = (
    *NUMBERS,
    True,
    False,
    None,
    "",
    "4",
    "silu",
    "x" * 300_000,
    [],
    [1],
    [0] * 9,
    {},
    {"a": 1},
    [[]],
    "\ud800",
)
SPARSE_BYTES = 80_000_000_000


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


# --- configs and indexes -------------------------------------------------------------------------------------------


@KINDS.add(ANY)
def a_setting_of_the_dit(chance, folder):
    content = read(folder / "config.json")
    content[chance.choice(sorted(content))] = chance.choice(ODD_VALUES)
    write(folder / "config.json", content)


@KINDS.add(ANY)
def a_setting_of_the_speech_model(chance, folder):
    path = folder / SPEECH / "config.json"
    content = read(path)
    more = ("hidden_act", "feat_extract_activation", "layer_norm_eps", "conv_stride", "conv_kernel", "layerdrop")
    more += ("hidden_dropout", "mask_time_prob", "add_adapter", "vocab_size", "attn_implementation", "torch_dtype")
    more += ("apply_spec_augment", "position_embeddings_type", "initializer_range", "output_attentions", "return_dict")
    content[chance.choice((*sorted(content), *more))] = chance.choice((*ODD_VALUES, "eval", "__class__", [5, 2, 2]))
    write(path, content)


@KINDS.add(ANY)
def settings_less(chance, folder):
    path = folder / chance.choice(JSONS[:2])
    content = read(path)
    for name in chance.sample(sorted(content), chance.randint(1, len(content))):
        del content[name]
    write(path, content)


@KINDS.add(SAME_OR_REFUSED)
def json_that_is_none(chance, folder):
    path = folder / chance.choice(JSONS)
    text = path.read_text(encoding="utf-8")
    name = chance.choice(sorted(read(path)))
    texts = (
        "",
        " ",
        "[]",
        "null",
        "5",
        '"x"',
        "{" * 200_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"dim": ' + "9" * 6000 + "}",
        '{"dim": -' + "9" * 4000 + "}",
        '{"dim": 1' + "0" * 999_999 + "}",
        text[:-3],
        text + text,
        text.replace("}", ",}"),
        text.replace(f'"{name}"', "'a'"),
        text.replace(":", "="),
        text + "\0",
        "// comment\n" + text,
        "<html>sign in</html>",
        "NaN",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    )
    path.write_text(chance.choice(texts), encoding="utf-8")


@KINDS.add(SAME_OR_REFUSED)
def json_in_another_encoding(chance, folder):
    path = folder / chance.choice(JSONS)
    text = path.read_text(encoding="utf-8")
    encodings = (
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"),
        text.encode("utf-32"),
        b"\xff\xfe" + text.encode(),
    )
    path.write_bytes(
        chance.choice((*encodings, text.replace("dim", "d\xedm").encode("latin-1"), gzip.compress(text.encode())))
    )


@KINDS.add(SAME_OR_REFUSED)
def numbers_that_json_has_not(chance, folder):
    path = folder / chance.choice(JSONS[:2])
    text = path.read_text(encoding="utf-8")
    content = read(path)
    name = chance.choice(
        [name for name, value in content.items() if isinstance(value, (int, float)) and value is not True]
    )
    wrong = chance.choice(("NaN", "Infinity", "-Infinity", "1e999", "-1e-999", "0x10", "1_000", "٣"))
    path.write_text(text.replace(f'"{name}": {json.dumps(content[name])}', f'"{name}": {wrong}'), encoding="utf-8")
    return ANY


@KINDS.add(SAME_OR_REFUSED)
def configs_swapped(chance, folder):
    one, other = chance.sample(JSONS, 2)
    shutil.copy(folder / one, folder / other)
    return ANY


@KINDS.add(SAME_OR_REFUSED)
def an_index_that_points_elsewhere(chance, folder):
    path = folder / JSONS[2]
    content = read(path)
    places = content["weight_map"]
    name = chance.choice(sorted(places))
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / WEIGHTS[-1], outside)
    wrong = (
        "../outside.safetensors",
        str(outside),
        ".",
        "..",
        "",
        "config.json",
        JSONS[2],
        "/etc/passwd",
        "google",
        "a\0b",
        "x" * 5000,
        "\ud800",
        "\x1b[2J\n",
        None,
        5,
        [],
        {"a": 1},
        "C:\\weights.safetensors",
        "https://example.com/x.safetensors",
        WEIGHTS[2],
    )
    value = chance.choice(wrong)
    content["weight_map"] = dict.fromkeys(places, value) if chance.random() < 0.3 else places | {name: value}
    write(path, content)


@KINDS.add(SAME_OR_REFUSED)
def an_index_of_another_form(chance, folder):
    path = folder / JSONS[2]
    content = read(path)
    places = content["weight_map"]
    maps = (None, [], {}, list(places.items()), "x", 5, {"a": {"b": 1}}, {name: WEIGHTS[-1] for name in places})
    many = places | {f"lost.{i}": f"{STEM}-{i:05d}-of-90000.safetensors" for i in range(90_000)}
    swapped = {name: WEIGHTS[-1] if WEIGHTS[-2] == place else WEIGHTS[-2] for name, place in places.items()}
    content["weight_map"] = chance.choice((*maps, many, swapped, places | {"lost": WEIGHTS[-1]}))
    write(path, content)


@KINDS.add(SAME_OR_REFUSED)
def shards_of_other_numbers(chance, folder):
    first, second = (folder / name for name in WEIGHTS[-2:])
    ways = (
        lambda: second.rename(folder / f"{STEM}-00003-of-00003.safetensors"),
        lambda: shutil.copy(first, second),
        lambda: shutil.copy(first, folder / f"{STEM}-00003-of-00003.safetensors"),
        lambda: shutil.copy(first, folder / f"{STEM}.safetensors"),
        lambda: (folder / JSONS[2]).unlink(),
        lambda: second.rename(second.with_suffix(".SAFETENSORS")),
        lambda: second.rename(folder / (second.name + ".part")),
        lambda: (folder / f"{STEM}-99999-of-99999.safetensors").touch(),
    )
    chance.choice(ways)()
    if chance.random() < 0.5:
        (folder / JSONS[2]).unlink(missing_ok=True)


# --- the tokenizer -------------------------------------------------------------------------------------------------


@KINDS.add(BAD)
def a_tokenizer_that_is_none(chance, folder):
    path = folder / TOKENIZER
    content = path.read_bytes()
    wrong = (b"", b"\0", content[:100], content[: len(content) // 2], chance.randbytes(5000), b"<html>", bytes(5000))
    path.write_bytes(chance.choice((*wrong, b"\n" * 9, b"\xff" * 4000)))


@KINDS.add(ANY)
def bits_of_the_tokenizer(chance, folder):
    path = folder / TOKENIZER
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 10, 300))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@KINDS.add(ANY)
def a_tokenizer_json(chance, folder):
    """Beside the sentencepiece model, or instead of it."""
    texts = (
        "",
        "{}",
        "[]",
        '{"version": "1.0"}',
        "{" * 99_999,
        '{"model": {"type": "BPE"}}',
        '{"model": {"vocab": 5}}',
    )
    more = ('{"model": {"type": "Unigram", "vocab": []}}', '{"model": {"type": "Unigram", "vocab": [["a", "b"]]}}')
    (folder / TOKENIZER).with_name("tokenizer.json").write_text(chance.choice((*texts, *more)))
    if chance.random() < 0.7:
        (folder / TOKENIZER).unlink()


# --- what is no file -----------------------------------------------------------------------------------------------


@KINDS.add(BAD)
def a_file_that_is_none(chance, folder):
    """Pipes, devices, sockets, folders and links that lead nowhere or round."""
    path = folder / chance.choice(FILES)
    path.unlink()
    ways = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/urandom"),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to("/dev/stdin"),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: path.symlink_to("/proc/self/fd"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(".."),
        lambda: path.mkdir(),
        lambda: bind_socket(path),
        lambda: None,
    )
    chance.choice(ways)()
    return SAME_OR_REFUSED if path.name == Path(JSONS[2]).name else BAD  # shards are found without it


def bind_socket(path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/s")  # a longer name may be too long for it
        shutil.move(f"{short}/s", path) if os.stat(short).st_dev != os.stat(path.parent).st_dev else os.rename(
            f"{short}/s", path
        )


@KINDS.add(BAD)
def a_file_with_a_hole(chance, folder):
    """Sparse: it takes no room on the disk and claims 80 GB."""
    path = folder / chance.choice(FILES)
    if chance.random() < 0.5:
        path.write_bytes(b"")
    with path.open("ab") as file:
        file.truncate(SPARSE_BYTES)
    return SAME_OR_REFUSED if path.name == Path(JSONS[2]).name else BAD


@KINDS.add(BAD)
def a_file_of_another_kind(chance, folder):
    path = folder / chance.choice(FILES)
    starts = (
        b"GGUF",
        b"version https://git-lfs",
        b"<!DOCTYPE html>",
        b"\x89PNG\r\n\x1a\n",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"{",
    )
    starts += (
        b"\x80\x02",
        b"\x7fELF",
        b"\x1f\x8b\x08",
        b"BZh9",
        b"\x28\xb5\x2f\xfd",
        b"\x08\x07\x12",
        b"%PDF-1.7",
        b"\0" * 16,
    )
    path.write_bytes(chance.choice(starts) + chance.randbytes(chance.choice((0, 4, 600))))
    return SAME_OR_REFUSED if path.name == Path(JSONS[2]).name else BAD


@KINDS.add(BAD)
def files_swapped(chance, folder):
    one, other = chance.sample((*WEIGHTS, TOKENIZER), 2)
    shutil.copy(folder / one, folder / other)


@KINDS.add(SAME)
def the_same_through_links(chance, folder):
    """As download caches lay a checkpoint out: every file a link into a store of blobs."""
    store = folder.parent / "blobs"
    store.mkdir()
    for number, path in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        path.rename(store / str(number))
        path.symlink_to(os.path.relpath(store / str(number), path.parent))


@KINDS.add(SAME)
def files_that_do_not_matter(chance, folder):
    names = (
        ".gitattributes",
        "README.md",
        "assets/x.png",
        ".cache/huggingface/download/x.lock",
        "Thumbs.db",
        "x.safetensors",
    )
    for name in chance.sample(names, 3):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(chance.randbytes(9))
    (folder / "round").symlink_to(folder)


@KINDS.add(BAD)
def files_half_downloaded(chance, folder):
    """As download tools leave them."""
    path = folder / chance.choice((*WEIGHTS, TOKENIZER))
    path.rename(path.with_name(path.name + chance.choice((".part", ".incomplete", ".aria2", ".crdownload", ".1"))))
