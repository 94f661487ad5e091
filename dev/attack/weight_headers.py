"""Damage to safetensors files: their headers, their data and what their tensors hold."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .kinds import Kinds
from .outcome import ANY, BAD, SAME_OR_REFUSED

KINDS = Kinds()
SPEECH = "wav2vec2-large-xlsr-53-english"
STEM = "diffusion_pytorch_model"
PICKLED = ("Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16")
Header = dict[str, Any]


def as_safetensors(folder: Path, stem: str) -> Path:
    """One of the `.pth` files as safetensors under the name that is read as well."""
    old = folder / f"{stem}.pth"
    if old.exists():
        save_file(torch.load(old, weights_only=True), folder / f"{stem}.safetensors", metadata={"format": "pt"})
        old.unlink()
    return folder / f"{stem}.safetensors"


def merged(folder: Path) -> Path:
    """The DiT in one file, without an index."""
    shards = sorted(folder.glob(f"{STEM}-*.safetensors"))
    weights = {name: value for shard in shards for name, value in load_file(shard).items()}
    for path in (*shards, folder / f"{STEM}.safetensors.index.json"):
        path.unlink()
    save_file(weights, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    return folder / f"{STEM}.safetensors"


def any_file(chance: random.Random, folder: Path) -> Path:
    """One of the safetensors files of a checkpoint, some of them made so."""
    shards = sorted(folder.glob(f"{STEM}-*.safetensors"))
    choices: tuple[Callable[[], Path], ...] = (
        lambda: shards[0],
        lambda: shards[-1],
        lambda: folder / SPEECH / "model.safetensors",
        lambda: as_safetensors(folder, PICKLED[0]),
        lambda: as_safetensors(folder, PICKLED[1]),
        lambda: merged(folder),
    )
    return chance.choice(choices)()


def read_parts(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(path: Path, header: Header | str | bytes, data: bytes, length: int | None = None) -> None:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edit_header(path: Path, edit: Callable[[Header, str], Any], chance: random.Random) -> None:
    """Let `edit` change the facts about one tensor by chance."""
    header, data = read_parts(path)
    edit(header, chance.choice([name for name in header if name != "__metadata__"]))
    write_parts(path, header, data)


# --- bytes ---------------------------------------------------------------------------------------------------------


@KINDS.add(ANY)
def bits_of_a_header_flipped(chance, folder):
    path = any_file(chance, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(chance.choice((1, 1, 3))):
        content[chance.randrange(8, 8 + length)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@KINDS.add(ANY)
def bits_of_values_flipped(chance, folder):
    path = any_file(chance, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(chance.choice((1, 20, 400))):
        content[chance.randrange(8 + length, len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@KINDS.add(BAD)
def cut_short(chance, folder):
    path = any_file(chance, folder)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: chance.choice((0, 1, 7, 8, 9, size // 2, size - 1, chance.randrange(size)))])


@KINDS.add(SAME_OR_REFUSED)
def more_behind_its_end(chance, folder):
    with any_file(chance, folder).open("ab") as file:
        file.write(chance.randbytes(chance.choice((1, 8, 5000))))


@KINDS.add(BAD)
def a_stretch_of_a_page_in_it(chance, folder):
    """As a proxy puts into a download that it goes on with: the rest is moved."""
    path = any_file(chance, folder)
    content, place = path.read_bytes(), chance.randrange(path.stat().st_size)
    path.write_bytes(content[:place] + b"<html>503 Service Unavailable</html>" + content[place:])


@KINDS.add(BAD)
def length_of_its_header(chance, folder):
    path = any_file(chance, folder)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    wrong = (0, 1, 2, length - 1, length + 1, length + 8, 99_999_999, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1)
    path.write_bytes(struct.pack("<Q", chance.choice(wrong)) + content[8:])


@KINDS.add(SAME_OR_REFUSED)
def header_padded_to_an_odd_length(chance, folder):
    """The first byte of the file may then be that of a web page, a pickle, a zip or another file."""
    path = any_file(chance, folder)
    header, data = read_parts(path)
    text = json.dumps(header)
    wanted = chance.choice((0x3C, 0x80, 0x50, 0x47, 0x1F, 0x7B, 0x0A))
    write_parts(path, text + " " * ((wanted - len(text)) % 256), data)


# --- headers -------------------------------------------------------------------------------------------------------

WRONG_OFFSETS = (
    [0, -1],
    [-8, 8],
    [8, 0],
    [0, 2**63],
    [2**64, 2**64 + 4],
    [0, 1e300],
    [0.0, 64.0],
    ["0", "64"],
    [0],
    [0, 64, 128],
    [],
    None,
    {"0": 64},
    "0,64",
    [True, False],
)
WRONG_SHAPES = (
    [-1],
    [2**62, 8],
    [2**40, 2**40],
    [1e3],
    ["3"],
    None,
    "",
    {},
    [[2]],
    [0] * 1000,
    [1] * 70,
    [10**30],
    [True],
)
WRONG_TYPES = (
    "f32",
    "F99",
    "",
    None,
    16,
    ["BF16"],
    "BF16 ",
    "F4",
    "U64",
    "C64",
    "F8_E8M0",
    "é",
    "BF\u0000",
    "x" * 70_000,
)


@KINDS.add(SAME_OR_REFUSED)
def offsets_of_a_tensor(chance, folder):
    wrong = chance.choice(WRONG_OFFSETS)
    edit_header(any_file(chance, folder), lambda header, name: header[name].update(data_offsets=wrong), chance)


@KINDS.add(SAME_OR_REFUSED)
def shape_of_a_tensor(chance, folder):
    wrong = chance.choice(WRONG_SHAPES)
    edit_header(any_file(chance, folder), lambda header, name: header[name].update(shape=wrong), chance)


@KINDS.add(SAME_OR_REFUSED)
def type_of_a_tensor(chance, folder):
    wrong = chance.choice(WRONG_TYPES)
    edit_header(any_file(chance, folder), lambda header, name: header[name].update(dtype=wrong), chance)


@KINDS.add(ANY)
def another_type_of_the_same_size(chance, folder):
    """As a converter that has mislabelled its output; integers are no weights of these networks."""
    other = chance.choice(("F16", "I16", "U16"))
    edit_header(any_file(chance, folder), lambda header, name: header[name].update(dtype=other), chance)


@KINDS.add(ANY)
def all_types_changed(chance, folder):
    path = any_file(chance, folder)
    header, data = read_parts(path)
    other = chance.choice(("F16", "I16"))
    for name in header:
        if name != "__metadata__" and header[name]["dtype"] == "BF16":
            header[name]["dtype"] = other
    write_parts(path, header, data)


@KINDS.add(SAME_OR_REFUSED)
def facts_of_a_tensor(chance, folder):
    def edit(header: Header, name: str) -> None:
        field = chance.choice(("dtype", "shape", "data_offsets"))
        change = chance.choice(("drop", "more", "none", "list"))
        if change == "drop":
            del header[name][field]
        elif change == "more":
            header[name]["strides"] = [1, 10**12]
        else:
            header[name] = None if change == "none" else list(header[name].values())

    edit_header(any_file(chance, folder), edit, chance)


@KINDS.add(ANY)
def two_tensors_in_one_place(chance, folder):
    path = any_file(chance, folder)
    header, data = read_parts(path)
    names = [name for name in header if name != "__metadata__"]
    first, second = chance.sample(names, 2)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    write_parts(path, header, data)


@KINDS.add(SAME_OR_REFUSED)
def a_name_twice(chance, folder):
    """JSON does not forbid it, and readers take the first, the last or neither."""
    path = any_file(chance, folder)
    header, data = read_parts(path)
    first, second = chance.sample([name for name in header if name != "__metadata__"], 2)
    text = json.dumps(header)
    write_parts(path, text[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}}}", data)


@KINDS.add(SAME_OR_REFUSED)
def a_header_of_another_shape(chance, folder):
    path = any_file(chance, folder)
    header, data = read_parts(path)
    text = json.dumps(header)
    deep = '{"__metadata__":' + "[" * 50_000 + "]" * 50_000 + "}"
    spellings = ("[]", "null", "{}", f"[{text}]", " " + text, "\ufeff" + text, text + "}", text + "\0\0", deep, '{"a":')
    write_parts(path, chance.choice(spellings), data)


@KINDS.add(SAME_OR_REFUSED)
def a_header_in_another_encoding(chance, folder):
    path = any_file(chance, folder)
    header, data = read_parts(path)
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    spellings = (
        text.encode("utf-16"),
        text.encode("utf-32"),
        text.replace(name, "\ud800").encode("utf-8", "surrogatepass"),
    )
    write_parts(path, chance.choice(spellings), data)


@KINDS.add(SAME_OR_REFUSED)
def odd_metadata(chance, folder):
    path = any_file(chance, folder)
    header, data = read_parts(path)
    deep = json.loads("[" * 500 + "]" * 500)
    odd = (None, [], "pt", {"format": 5}, {"format": None}, {"a": {"b": "c"}}, {"deep": deep}, {"x" * 10**6: "y"})
    texts = (
        {"config": "{" * 90_000},
        {"config": "9" * 5000},
        {"config": "[1]"},
        {"config": '{"dim": NaN}'},
        {"config": ""},
    )
    header["__metadata__"] = chance.choice((*odd, *texts))
    write_parts(path, header, data)


@KINDS.add(SAME_OR_REFUSED)
def very_many_empty_tensors(chance, folder):
    path = any_file(chance, folder)
    header, data = read_parts(path)
    end = len(data)
    extra = {f"more.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(200_000)}
    write_parts(path, header | extra, data)


@KINDS.add(SAME_OR_REFUSED)
def names_of_tensors(chance, folder):
    """Odd ones among the right ones: they are shown in messages."""
    path = any_file(chance, folder)
    odd = (
        "",
        "\n",
        "a\x1b[31mred",
        "\u202egnp",
        "x" * 100_000,
        "../../x",
        "%s%n{0}",
        "blocks.-1.x",
        "a\0b",
        ".",
        "blocks.99999999999999999999.norm3.weight",
        "stack.blocks.0",
        "blocks." * 2000,
    )
    header, data = read_parts(path)
    name = chance.choice(odd)
    if chance.random() < 0.5:
        victim = chance.choice([key for key in header if key != "__metadata__"])
        header[name] = header.pop(victim)
    else:
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    write_parts(path, header, data)


# --- tensors -------------------------------------------------------------------------------------------------------


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path)
    edit(weights)
    path.unlink()
    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})


def any_floats(chance: random.Random, weights: dict[str, torch.Tensor]) -> str:
    return chance.choice(sorted(name for name, value in weights.items() if value.is_floating_point() and value.numel()))


@KINDS.add(SAME_OR_REFUSED)
def values_that_are_no_numbers(chance, folder):
    """One or all of a tensor; a film made with it would be black, one that does not need it is the same."""
    bad = chance.choice((float("nan"), float("inf"), float("-inf")))

    def edit(weights):
        name = any_floats(chance, weights)
        if chance.random() < 0.5:
            weights[name].flatten()[chance.randrange(weights[name].numel())] = bad
        else:
            weights[name].fill_(bad)

    rewrite(any_file(chance, folder), edit)


@KINDS.add(ANY)
def huge_values(chance, folder):
    size = chance.choice((3e38, -3e38, 1e30, 1e20, 1e10))

    def edit(weights):
        name = any_floats(chance, weights)
        if chance.random() < 0.5:
            weights[name].flatten()[chance.randrange(weights[name].numel())] = size
        else:
            weights[name].fill_(size)

    rewrite(any_file(chance, folder), edit)


@KINDS.add(ANY)
def a_network_of_zeros(chance, folder):
    """A file that was allocated and never filled."""

    def edit(weights):
        for name in weights if chance.random() < 0.5 else [any_floats(chance, weights)]:
            if weights[name].is_floating_point():
                weights[name].zero_()

    rewrite(any_file(chance, folder), edit)


@KINDS.add(SAME_OR_REFUSED)
def a_tensor_less(chance, folder):
    rewrite(any_file(chance, folder), lambda weights: weights.pop(chance.choice(sorted(weights))))


@KINDS.add(SAME_OR_REFUSED)
def a_tensor_of_another_shape(chance, folder):
    def edit(weights):
        name = any_floats(chance, weights)
        value = weights[name]
        ways = (lambda: value[None], lambda: value.flatten(), lambda: value[:0], lambda: torch.cat([value, value]))
        other = chance.choice((*ways, lambda: value.movedim(0, -1), lambda: value.sum()))()
        # a square matrix turned over has its own shape: other values, which nobody can tell
        weights[name] = value[:0].clone() if other.shape == value.shape else other.clone()

    rewrite(any_file(chance, folder), edit)


@KINDS.add(ANY)
def tensors_of_another_type(chance, folder):
    kinds = (torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool)
    kind = chance.choice((*kinds, torch.uint8))

    def edit(weights):
        names = sorted(weights) if chance.random() < 0.5 else [any_floats(chance, weights)]
        weights.update({name: weights[name].to(kind) for name in names})

    rewrite(any_file(chance, folder), edit)


@KINDS.add(SAME_OR_REFUSED)
def other_names(chance, folder):
    """Prefixes, cases and separators as other tools write them."""
    ways = (
        lambda name: f"model.diffusion_model.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.upper(),
        lambda name: name.replace(".", "/"),
        lambda name: name + ".weight",
        lambda name: name.replace("blocks.0.", "blocks.00."),
        lambda name: name.replace("1", "\u0661"),
        lambda name: f"first_stage_model.{name}",
    )
    way = chance.choice(ways)

    def edit(weights):
        for name in list(weights):
            weights[way(name)] = weights.pop(name)

    rewrite(any_file(chance, folder), edit)


@KINDS.add(SAME_OR_REFUSED)
def tensors_of_other_tools(chance, folder):
    """What optimizers, EMA, LoRA and quantizers leave in a file, beside the weights."""

    def edit(weights):
        name = any_floats(chance, weights)
        suffixes = (
            ".scale_weight",
            ".weight_scale",
            ".lora_A.weight",
            "_ema",
            ".absmax",
            ".quant_map",
            ".qweight",
            ".zeros",
        )
        base = name.removesuffix(".weight")
        shape = chance.choice(((), (1,), (3, 5), (0,)))
        weights[base + chance.choice(suffixes)] = torch.ones(shape) * chance.choice((1.0, float("nan"), 0.0))

    rewrite(any_file(chance, folder), edit)
    return ANY
