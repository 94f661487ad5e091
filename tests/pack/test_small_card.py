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
def small_card(comfy, dense_checkpoint):
    """A second server, as the first one but with the nodes of small_card.py."""
    packs = {**comfy.packs, "small_card.py": Path(__file__).with_name("small_card.py")}
    with ComfyServer(comfy.comfyui, packs, arguments=comfy.arguments, environment=comfy.environment) as server:
        assert server.import_problems() == []
        folder = Path("models", "diffusion_models", "Dense")
        shutil.copytree(comfy.base / folder, server.base / folder)
        yield server


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

    events = [json.loads(line) for line in (small_card.output / "small_card.jsonl").read_text().splitlines()]
    moves = [Move(event["network"], event["size"], event["after"] > event["before"]) for event in events]
    print(*moves, sep="\n")
    ours = [(move.size, move.comes) for move in moves if move.network == OURS]
    large, small = ours[0][0], ours[2][0]
    assert small < large
    assert ours == [(large, True), (large, False), (small, True), (small, False), (large, True)]
    turns = [move for move in moves if move.network in (OURS, OTHER)]
    assert sum(move.comes for move in turns if move.network == OTHER) == 2
    assert not any(one.comes and two.comes for one, two in pairwise(turns)), "one leaves before the other comes"
