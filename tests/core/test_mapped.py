"""safetensors files as maps: equal to what safetensors itself reads, also where a file is larger than all memory."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_s2v_core.errors import CheckpointError
from wan_s2v_core.io import weights
from wan_s2v_core.io.weights import open_weights

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("piece_bytes", [1, 300, 10**9])
def test_tensors_are_those_of_the_file(tmp_path, monkeypatch, piece_bytes, fresh_seed):
    """Odd sizes of all types, so that some lie where their type would not; none, one and several in a piece."""
    monkeypatch.setattr(weights, "PIECE_BYTES", piece_bytes)
    chance = random.Random(fresh_seed)
    made = {
        f"{number}.{dtype}": (100 * torch.randn([chance.randrange(1, 9) for _ in range(chance.randrange(4))])).to(dtype)
        for number in range(4)
        for dtype in TYPES
    } | {"nothing": torch.empty(3, 0, 2)}
    save_file(made, tmp_path / "file.safetensors", {"made": "here"})
    opened, expected = open_weights(tmp_path / "file.safetensors"), load_file(tmp_path / "file.safetensors")
    assert opened.metadata == {"made": "here"} and opened.entries.keys() == expected.keys()
    for name, entry in opened.entries.items():
        read = entry.read()
        assert (entry.shape, entry.dtype) == (tuple(read.shape), read.dtype) == (made[name].shape, made[name].dtype)
        assert torch.equal(read.float(), expected[name].float()), name


def test_what_is_written_to_a_tensor_stays_in_memory(tmp_path):
    save_file({"a": torch.zeros(5)}, tmp_path / "file.safetensors")
    entry = open_weights(tmp_path / "file.safetensors").entries["a"]
    entry.read().add_(1)
    assert load_file(tmp_path / "file.safetensors")["a"].sum() == 0


def test_maps_that_were_let_go_are_made_again(tmp_path):
    save_file({"a": torch.arange(5), "b": torch.ones(3)}, tmp_path / "file.safetensors")
    opened = open_weights(tmp_path / "file.safetensors")
    first = opened.entries["a"].read()
    opened.let_go()
    assert torch.equal(first, torch.arange(5)), "it holds its map"
    assert torch.equal(opened.entries["a"].read(), first) and opened.entries["b"].read().sum() == 3


def test_a_file_may_be_larger_than_memory(tmp_path):
    """Of holes, on disk nearly nothing; a system refuses to map this at once."""
    count, side = 64, 2**15
    size = 4 * side * side
    header = json.dumps(
        {
            str(i): {"dtype": "F32", "shape": [side, side], "data_offsets": [i * size, (i + 1) * size]}
            for i in range(count)
        }
    ).encode()
    path = tmp_path / "file.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        end = file.tell() + count * size
        try:
            file.truncate(end)
        except OSError as error:
            pytest.skip(f"no file of {end} bytes here: {error}")
    with path.open("r+b") as file:
        file.seek(end - 4)
        file.write(np.float32(3).tobytes())
    opened = open_weights(path)
    last, first = opened.entries[str(count - 1)].read(), opened.entries["0"].read()
    assert last[-1, -1] == 3 and last[0, 0] == first[5, 5] == 0


def test_no_room_for_a_map_is_told(tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    save_file({"a": torch.arange(5)}, tmp_path / "file.safetensors")
    opened = open_weights(tmp_path / "file.safetensors")
    monkeypatch.setattr(np, "memmap", refuses)
    with pytest.raises(CheckpointError, match=r"cannot be mapped.*Cannot allocate memory.*swap space"):
        opened.entries["a"].read()
