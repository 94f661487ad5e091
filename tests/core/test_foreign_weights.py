"""What may come in as a weights file, a config, an index or a tokenizer: read rightly, or told in one line."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import refused, write_tokenizer_json
from weight_mutations import CONFIG, INDEX, PIECES, SHARD, SPEECH_CONFIG, VAE_FILE, Calls, nested, rewrite

from wan_s2v_core.errors import CheckpointError
from wan_s2v_core.inspection import inspect_path
from wan_s2v_core.io import pickles
from wan_s2v_core.io.weights import FOREIGN_STARTS, open_weights
from wan_s2v_core.model import checkpoint as names
from wan_s2v_core.model.loading import find_part, load_audio_encoder, load_text_encoder, load_transformer, load_vae
from wan_s2v_core.model.official import OFFICIAL_FILES, TOKENIZER_FOLDER, official_places
from wan_s2v_core.networks import open_checkpoint
from wan_s2v_core.prepare import plan_loading

SPEECH_FOLDER = OFFICIAL_FILES[names.SPEECH_ENCODER][0]


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def saved(path, weights, **options):
    torch.save(weights, path, **options)
    return path


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- PyTorch files -----------------------------------------------------------------------------------------------

FORMS = {
    "as it is": lambda weights: weights,
    "under a name of its own": lambda weights: {"state_dict": weights, "epoch": 3, "rate": 1e-4, "note": "x"},
    "beside those of training": lambda weights: {"state_dict": weights, "optimizer": {"a": torch.zeros(9)}},
    "parameters": lambda weights: {name: torch.nn.Parameter(value) for name, value in weights.items()},
    "turned": lambda weights: weights | {"a": weights["a"].t().contiguous().t()},
    "two of one memory": lambda weights: weights | {"b": weights["a"]},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_pytorch_files_as_people_have_them(form, is_zip, tmp_path):
    weights = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "nothing": torch.empty(0, 4)}
    made = FORMS[form](weights)
    path = saved(tmp_path / "模型.pth", made, _use_new_zipfile_serialization=is_zip)
    read = open_weights(path).entries
    for name, value in made.get("state_dict", made).items():
        assert read[name].shape == value.shape and torch.equal(read[name].read(), value)


def test_float8_in_a_pytorch_file(tmp_path):
    value = torch.randn(9, 3).to(torch.float8_e4m3fn)
    path = saved(tmp_path / "x.pth", {"a": value})
    assert torch.equal(open_weights(path).entries["a"].read().float(), value.float())


def test_a_compressed_pytorch_file_is_not_mapped(folder):
    rewrite(folder / VAE_FILE, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(lambda: load_vae(folder), "is compressed or encrypted", "save it again")


def test_a_pickle_that_grows_is_not_unpacked(tmp_path):
    """A few kB that would take 5 GB."""
    path = saved(tmp_path / "x.pth", {"a": torch.zeros(3)})
    rewrite(path, lambda name, data: b"N" * 10**8 if "pkl" in name else data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    refused(lambda: open_weights(path), "is compressed")


def test_a_pickle_that_is_too_long(tmp_path):
    path = saved(tmp_path / "x.pth", {"a": torch.zeros(3)})
    rewrite(path, lambda name, data: b"N" * (pickles.LARGEST_PICKLE_BYTES + 1) if "pkl" in name else data)
    refused(lambda: open_weights(path), "describes its tensors in 2,000,001 bytes")


def test_a_list_of_records_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "LARGEST_LIST_BYTES", 300)
    path = saved(tmp_path / "x.pth", {"a": torch.zeros(3), "b": torch.zeros(4)})
    refused(lambda: open_weights(path), "has a list of records of")


@pytest.mark.parametrize("values", [2, 4])
def test_records_of_other_sizes_than_the_pickle_says(values, tmp_path):
    """PyTorch maps what lies behind the record, or less than there is."""
    path = saved(tmp_path / "x.pth", {"a": torch.ones(3), "b": torch.ones(5)})
    rewrite(path, lambda name, data: bytes(4 * values) if name.endswith("data/0") else data)
    refused(lambda: open_weights(path), "other sizes than its records")


def test_a_record_that_no_tensor_names(tmp_path):
    """One key of the pickle changed: two tensors are of one record, and the other one's values are lost."""
    path = saved(tmp_path / "x.pth", {"a": torch.ones(3), "b": torch.zeros(3)})
    key = pickle.BINUNICODE + struct.pack("<I", 1)
    rewrite(path, lambda name, data: data.replace(key + b"1", key + b"0") if name.endswith("data.pkl") else data)
    refused(lambda: open_weights(path), "other sizes than its records")


def test_the_other_order_of_bytes(tmp_path):
    path = saved(tmp_path / "x.pth", {"a": torch.ones(3)})
    rewrite(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    refused(lambda: open_weights(path), "the other order of bytes")


def test_two_records_of_one_name(tmp_path):
    path = saved(tmp_path / "x.pth", {"a": torch.ones(3)})
    rewrite(path, lambda name, data: data, more=[("x/data/0", bytes(12))])
    refused(lambda: open_weights(path), "has two records x/data/0")


def test_zips_that_are_no_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "workflow.pth", "w") as archive:
        archive.writestr("model.safetensors", bytes(100))
    refused(lambda: open_weights(tmp_path / "workflow.pth"), "a zip without tensors")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pth"))
    refused(lambda: open_weights(tmp_path / "program.pth"), "is a TorchScript program")


PICKLES = {
    "a call without arguments": (b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n)R.", "not a complete PyTorch file"),
    "memory without an end": (pickle.dumps({"a": Calls(bytearray, 10**12)}, 2), "bytearray"),
    "a command": (pickle.dumps({"a": Calls(os.system, "exit 1")}, 2), "wants to run code"),
    "a key without an end": (nested(400_000), "not a complete PyTorch file"),
    "itself in itself": (b"\x80\2]q\0h\0a.", "not a plain set of named tensors"),
    "a new protocol": (pickle.dumps({"a": Calls(os.system, "exit 1")}, 4), "wants to run code"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_are_no_plain_tensors(kind, tmp_path):
    content, message = PICKLES[kind]
    path = saved(tmp_path / "x.pth", {"a": torch.ones(3)})
    rewrite(path, lambda name, data: content if name.endswith("data.pkl") else data)
    refused(lambda: open_weights(path), message)


TENSORS = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "wants to run code"),
    "without values": (lambda: torch.empty(3, device="meta"), "wants to run code"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "wants to run code"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "is no plain tensor"),
    "one value, many times": (lambda: torch.ones(1).expand(10**6), "lie on one another"),
    "larger than the file": (lambda: torch.ones(10**3, 1).expand(-1, 10**6), "lie on one another"),
    "windows": (lambda: torch.ones(30).unfold(0, 10, 1), "lie on one another"),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_ones(kind, is_zip, tmp_path):
    make, message = TENSORS[kind]
    path = saved(tmp_path / "x.pth", {"a": make()}, _use_new_zipfile_serialization=is_zip)
    refused(lambda: open_weights(path), message)


def test_many_tensors_of_one_memory(tmp_path):
    """A network of them would be far larger than the file."""
    value = torch.ones(1000, 1000)
    path = saved(tmp_path / "x.pth", {f"{number}": value for number in range(9)})
    refused(lambda: open_weights(path), "larger than the file")


def test_a_pytorch_file_called_safetensors(folder):
    shutil.copy(folder / VAE_FILE, folder / SHARD)
    refused(lambda: load_transformer(folder), SHARD, "is called .safetensors but is a PyTorch file")


# --- safetensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [magic[:1] for magic, _, _ in FOREIGN_STARTS] + [b"P", b"\x80"])
def test_a_header_whose_length_begins_like_something_else(start, tmp_path):
    """One file in 256 begins with "<", as web pages do; the official writer makes none."""
    values = torch.arange(5.0)
    save_file({"a": values}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    padded = content[8 : 8 + length].rstrip() + b" " * 600
    wanted = next(size for size in range(length, length + 300) if size % 256 == start[0])
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", wanted) + padded[:wanted] + content[8 + length :])
    assert (tmp_path / "x.safetensors").read_bytes().startswith(start)
    assert torch.equal(open_weights(tmp_path / "x.safetensors").entries["a"].read(), values)


@pytest.mark.parametrize(
    ("start", "what"),
    [(b"GGUF\3\0\0\0{" + bytes(9), "GGUF"), (b"\xef\xbb\xbf\n<html>", "web page"), (b"<?xml version=", "web page")],
)
def test_files_that_only_begin_like_safetensors(start, what, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(start + bytes(200))
    refused(lambda: open_weights(tmp_path / "x.safetensors"), what)


def test_a_side_that_no_file_could_hold(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(lambda: open_weights(tmp_path / "x.safetensors"), "has a side of 9223372036854775808")


def test_a_header_that_is_too_long(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{}")
        file.truncate(100_000_000)
    refused(lambda: open_weights(tmp_path / "x.safetensors"), "a header of 90,000,000 bytes")


def test_one_tensor_in_two_shards(folder):
    other = folder / SHARD.replace("00001-of", "00002-of")
    twice = next(iter(load_file(folder / SHARD).items()))
    save_file(load_file(other) | dict([twice]), other)
    refused(lambda: load_transformer(folder), twice[0], "and in another shard")


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.bias", "head.modulation"])
def test_whole_numbers_are_no_weights(folder, name):
    """Under names that are no `.weight` too."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            save_file(weights | {name: weights[name].to(torch.int16)}, file)
    refused(lambda: load_transformer(folder), name, "torch.int16")


def test_one_tensor_read_as_another_type_of_its_size(folder, caplog):
    """A file may be so, and a header with a wrong type looks like it."""
    load_transformer(folder)
    assert not caplog.records
    weights = load_file(folder / SHARD)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    save_file(weights | {name: weights[name].view(torch.float16)}, folder / SHARD)
    load_transformer(folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "1 tensors are float16 and" in line and name in line


# --- configs, indexes, tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [CONFIG, SPEECH_CONFIG, INDEX, PIECES, SHARD, VAE_FILE])
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "sparse"])
def test_files_that_have_no_end(file, kind, folder):
    path = folder / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as handle:
            handle.truncate(40 * 10**9)
    else:
        path.symlink_to(kind)
    refused(lambda: inspect_path(folder), path.name.partition(".")[0])


BOUNDS = {
    "num_layers": 70_000,
    "num_experts": 2**20,
    "audio_inject_layers": [0] * 70_000,
    "text_len": 2**30,
    "dim": 10**400,
    "_class_name": "x" * 900_000,
    "patch_size": [1] * 300_000,
    "gate_over": "\x1b[31m\n" * 9000,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_settings_beyond_what_a_file_can_hold(name, folder):
    change_json(folder / CONFIG, top_k=1, **{name: BOUNDS[name]})
    message = refused(lambda: load_transformer(folder), "config.json")
    assert len(message) < 1000 and message.isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feat_extract_activation": "zzz"}, "sizes of no wav2vec 2.0"),
        ({"hidden_act": "zzz"}, "sizes of no wav2vec 2.0"),
        ({"num_hidden_layers": 70_000}, "at most 512"),
        ({"conv_dim": [16] * 9000}, "at most 512"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 4]}, "one for each 320 is needed"),
        ({"conv_stride": [0] * 7}, "one for each 320 is needed"),
        ({"model_type": "whisper"}, "model_type='whisper'"),
    ],
)
def test_speech_settings_out_of_bounds(changes, message, folder):
    change_json(folder / SPEECH_CONFIG, **changes)
    refused(lambda: load_audio_encoder(folder), message)
    refused(lambda: inspect_path(folder), message)


def test_configs_in_one_anothers_place(folder):
    shutil.copy(folder / CONFIG, folder / SPEECH_CONFIG)
    refused(lambda: open_checkpoint(folder, plan_loading("auto", torch.device("cpu"))), "is of another model")


def spiece_of(words: int, tmp_path) -> bytes:
    """A sentencepiece model that knows other words."""
    from sentencepiece import SentencePieceTrainer

    made, chance = io.BytesIO(), random.Random(1)
    text = [" ".join(chance.choice("abcdefghij") * 3 for _ in range(9)) for _ in range(200)]
    SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=made, vocab_size=words, minloglevel=2)
    return made.getvalue()


def test_an_empty_tokenizer_is_seen_by_inspect(folder):
    (folder / PIECES).write_bytes(b"")
    refused(lambda: inspect_path(folder), "spiece.model", "is empty")
    refused(lambda: load_text_encoder(folder), "spiece.model", "is empty")


def test_a_tokenizer_with_more_words_than_the_text_encoder(folder, monkeypatch):
    part = find_part(folder, names.TEXT_ENCODER)
    monkeypatch.setitem(part.config, "vocab_size", 20)
    monkeypatch.setattr("wan_s2v_core.model.loading.find_part", lambda *_: part)
    refused(lambda: load_text_encoder(folder), "tokens, the text encoder 20")


def test_a_tokenizer_of_another_model(folder):
    """A fast one that ends prompts in no way, or in another."""
    write_tokenizer_json(folder / TOKENIZER_FOLDER)
    path = folder / TOKENIZER_FOLDER / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"post_processor": None}))
    refused(lambda: inspect_path(folder), "is not umT5's")
    path.write_text("{}")
    refused(lambda: inspect_path(folder), "tokenizer.json is damaged")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "circle"])
def test_names_that_no_file_can_have(name, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for work in (
        find_part,
        inspect_path,
        lambda path: open_checkpoint(path, plan_loading("auto", torch.device("cpu"))),
    ):
        assert len(refused(lambda work=work: work(tmp_path / name), "Give", name[:1])) < 1500


# --- the official folder -----------------------------------------------------------------------------------------


def test_all_that_a_folder_lacks_is_told_at_once(folder):
    shutil.rmtree(folder / SPEECH_FOLDER)
    (folder / VAE_FILE).unlink()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    message = refused(lambda: open_checkpoint(folder, plan_loading("auto", torch.device("cpu"))), "Wan2.2-S2V-14B")
    for told in (
        "diffusion_pytorch_model-*.safetensors (32.6 GB",
        f"{VAE_FILE} (0.5 GB)",
        f"{SPEECH_FOLDER} (a folder",
    ):
        assert told in message
    assert "umt5" not in message, "which is there"


@pytest.mark.parametrize("what", ["is not there", "is no folder"])
def test_a_folder_that_is_none(what, tmp_path):
    if what == "is no folder":
        (tmp_path / "S2V").write_bytes(b"")
    message = refused(lambda: open_checkpoint(tmp_path / "S2V", plan_loading("auto", torch.device("cpu"))), what)
    assert "models_t5_umt5-xxl-enc-bf16.pth (11.4 GB)" in message and "config.json" in message


def test_official_folders_are_told_by_their_files():
    files = [
        "Flux/flux.safetensors",
        "a/b/S2V/diffusion_pytorch_model-00001-of-00004.safetensors",
        "a/b/S2V/wav2vec2-large-xlsr-53-english/model.safetensors",
        "half/Wan2.1_VAE.pth",
        "diffusion_pytorch_model.safetensors",
    ]
    assert official_places(files, ["only a config"]) == ["a/b/S2V", "half", "only a config"]


def test_errors_have_an_end():
    assert len(str(CheckpointError("x" * 10**6))) < 2100
