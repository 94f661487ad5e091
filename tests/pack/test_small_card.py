"""Several models in one graph on a card that holds one of them at a time: ComfyUI's memory manager moves ours too."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from comfy_server import ComfyServer

OURS, OTHER = "S2VTransformer", "OtherNetwork"
EMBEDDED, DENSE = "embedded demo", "Dense (folder)"


class Move(NamedTuple):
    """A network that comes to the card or leaves it, as a whole or in part."""

    network: str
    size: int
    comes: bool


@pytest.fixture(scope="module")
def small_card(comfy, device, dense_checkpoint):
    """A second server, as the first one but with the nodes of small_card.py and held_memory.py."""
    if device != "cpu":
        pytest.skip("the CPU stands for a small GPU here; a real one is made small by dev/run.py gpu small and beside")
    packs = comfy.packs | {name: Path(__file__).with_name(name) for name in ("small_card.py", "held_memory.py")}
    with ComfyServer(comfy.comfyui, packs, arguments=comfy.arguments, environment=comfy.environment) as server:
        assert server.import_problems() == []
        folder = Path("models", "diffusion_models", "Dense")
        shutil.copytree(comfy.base / folder, server.base / folder)
        yield server


def moves_on(server: ComfyServer) -> list[Move]:
    """Since the server was started."""
    file = server.output / "small_card.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [Move(event["network"], event["size"], event["after"] > event["before"]) for event in events]


def joined(prompts: list[dict]) -> dict:
    """Prompts as one, each made to wait for the one before: its picture passes through the other model, which needs
    the frames of that one first."""
    whole, frames = {}, None
    for name, prompt in zip("abc", prompts, strict=True):
        for number, node in prompt.items():
            inputs = {
                key: [name + value[0], value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            }
            whole[name + number] = {"class_type": node["class_type"], "inputs": inputs}
        if frames:
            picture = whole[f"{name}5"]["inputs"]["picture"]
            whole[f"{name}other"] = {"class_type": "OtherModel", "inputs": {"image": picture, "after": frames}}
            whole[f"{name}5"]["inputs"]["picture"] = [f"{name}other", 0]
        whole[f"{name}frames"] = {"class_type": "WanS2VDecode", "inputs": {"clips": [f"{name}6", 0]}}
        frames = [f"{name}frames", 0]
    return whole


def test_models_make_room_for_each_other(graph, film, new_seed, small_card, watch):
    common = {"offload": "auto", "format": "lossless-mkv"}
    prompts = [graph(checkpoint=checkpoint, seed=new_seed(), **common) for checkpoint in (EMBEDDED, DENSE, EMBEDDED)]
    expected = [film(prompt).pictures for prompt in prompts]
    ended = small_card.client.run(joined(prompts))
    assert ended.status == "success", ended.errors
    videos = {file.node[0]: file.path for file in small_card.output_files(ended)}
    for name, pictures in zip("abc", expected, strict=True):
        assert np.array_equal(watch(videos[name]).pictures, pictures)

    moves = moves_on(small_card)
    print(*moves, sep="\n")
    ours = [(move.size, move.comes) for move in moves if move.network == OURS]
    large, small = ours[0][0], ours[2][0]
    assert small < large
    assert ours == [(large, True), (large, False), (small, True), (small, False), (large, True)]
    turns = [move for move in moves if move.network in (OURS, OTHER)]
    assert sum(move.comes for move in turns if move.network == OTHER) == 2
    assert not any(one.comes and two.comes for one, two in pairwise(turns)), "one leaves before the other comes"


def test_networks_stay_while_there_is_room(graph, new_seed, small_card):
    """Neither between clips nor between runs does a network leave that another one does not push out."""
    common = {"checkpoint": EMBEDDED, "seconds": 2.0, "max_clips": 2}
    assert small_card.client.run(graph(seed=new_seed(), **common)).status == "success"
    before = len(moves_on(small_card))
    assert small_card.client.run(graph(seed=new_seed(), **common)).status == "success"
    assert moves_on(small_card)[before:] == []
    assert small_card.client.run(graph(seed=new_seed(), offload="always", **common)).status == "success"
    come = [move.network for move in moves_on(small_card)[before:] if move.comes]
    assert come.count(OURS) == 1, "it is fetched anew for the second clip"


def look(server: ComfyServer, prompt: dict, **nodes: dict) -> dict[str, dict]:
    """Run a prompt with more nodes -> what each of those wrote."""
    ended = server.client.run(prompt | nodes)
    assert ended.status == "success", (ended.errors, ended.node_errors)
    return {name: json.loads(ended.outputs[name]["text"][0]) for name in nodes if name in ended.outputs}


def held(value: list, after: list) -> dict:
    return {"class_type": "Held", "inputs": {"value": value, "after": after}}


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_caches_see_what_sockets_hold(graph, new_seed, small_card, precision):
    prompt = graph(checkpoint=EMBEDDED, seed=new_seed(), precision=precision)
    found = look(
        small_card,
        prompt,
        model=held(["1", 0], ["6", 0]),
        voice=held(["3", 0], ["6", 0]),
        job=held(["5", 0], ["6", 0]),
    )
    for name, told in found.items():
        assert told["ram"] == told["tensors"] and set(told["devices"]) <= {"cpu"}, name
    assert found["model"]["is_patcher"]
    assert found["job"]["ram"] > 64 * 64 and found["voice"]["ram"] > 16000 * 4, "features, pixels and sound"
    is_mapped = precision == "bfloat16"  # as in the file, but for a few layers that stay in float32
    assert (found["model"]["ram"] < 4e6) == is_mapped, "what is mapped from a file takes no memory"


@pytest.mark.parametrize(
    ("memory", "limit"),
    [
        (None, None),
        ({"profile": "8 GB"}, 8),
        ({"profile": "custom", "vram_limit_gb": 5.5}, 5.5),
        ({"profile": "auto"}, None),
        ({"profile": "12 GB", "vram_limit_gb": 2.0}, 12),
    ],
)
def test_encoders_keep_to_the_limit_of_the_prompt(graph, new_seed, small_card, memory, limit):
    whole = {"vram_limit_gb": 8.0, "resident_blocks": 1, "slice_tokens": -1, "vae_tile": -1, "weights": "mapped"}
    nodes = {"limits": {"class_type": "PromptLimits", "inputs": {"number": new_seed() % 2**31}}}
    prompt = graph(checkpoint=EMBEDDED)
    if memory:
        nodes["memory"] = {"class_type": "WanS2VMemory", "inputs": {"model": ["1", 0], **whole, **memory}}
        prompt["6"]["inputs"]["model"] = ["memory", 0]
    told = look(small_card, prompt, **nodes)["limits"]
    assert told["vram_limit_gb"] == limit and told["resident_blocks"] is None
    assert told["weights"] == ("mapped" if memory else "auto")
