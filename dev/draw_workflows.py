"""Draw prompts of workflows/api as graphs for the canvas, laid out from left to right, with a note at the left.

Run it after a prompt has changed: python3 dev/draw_workflows.py NAME ... (needs .venv as dev/run.py makes it).
tests/pack/test_page.py opens every graph in a browser and compares it with its prompt.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
COMFYUI = ROOT / ".venv" / "comfyui"
NOTES = {
    "one_node": "The whole way in one node.\n\nChange: picture and voice (choose a file, or the buttons at its "
    "end to upload one), prompt. For real videos put the folder Wan2.2-S2V-14B into models/diffusion_models, "
    "press R and choose it as checkpoint; preset and size on auto then take the reference's settings for "
    "480p.\n\nLink an image or a sound to use it instead of the files.",
    "long_song": "A stretch of a long recording, clip after clip.\n\nChange: the recording and the picture. "
    "start_seconds and seconds choose the stretch (seconds 0: to its end). normalize levels the sound of the "
    "video. keep_clips leaves the lossless clips in output/wan_s2v_clips. colour_match holds the colours over "
    "many clips; 0 where the light is meant to change.\n\nCancel when you like: the next run goes on after the "
    "last finished clip.",
    "pose_driven": "A driving video leads the movement.\n\nChange: recording, picture, and the driving video: "
    "poses drawn on black, for the same seconds as the sound. Where it ends before the sound does, the poses are "
    "black. The embedded demo knows no poses but the stick faces it was trained with.",
    "experts": "The knobs of a checkpoint that has experts, as the embedded demo: 8, of which a token sees 4.\n\n"
    "Change in Wan S2V Experts: moe_top_k (0: as the checkpoint says; fewer is an approximation), moe_gate_dropout "
    "(lowers fidelity), moe_overflow; in the sampler moe_expert_capacity (bounds memory; spill is exact, drop is not). "
    "The sampler shows what each expert had to do.\n\nWan2.2-S2V-14B is dense: there they do nothing.",
    "speed": "What makes it faster, in one node before the sampler. As that node comes, it is the fastest exact way "
    "that works here; this graph leaves out a quarter of the attention, which is lossy.\n\n"
    "Change: sparse_keep (1: all of it; 0.5 is faster, look at the video), attention (auto8: 8 bits), and "
    "precision of the sampler: float8 (RTX 40, H100 and later) or int8 (RTX 30, A100).\n\n"
    "On a CPU leaving out attention takes longer; it shows what becomes of the pictures.",
    "small_card": "A card with 8 GB, in one node before the sampler: weights come and go while others compute, and "
    "what does not fit is done in parts. The results are the same up to rounding. Wan S2V Memory shows what each stage "
    "will take, before the run.\n\n"
    "Change: profile. auto measures what is free; others leave the rest of a larger card to other programs. The "
    "embedded model is so small that it fits whole: with Wan2.2-S2V-14B take 832x480 and 40 steps, and precision "
    "float8-weights of sampler and text where main memory is short.",
    "all_options": "Every input linked or set, to copy from. It is no recipe: most videos need none of this.\n\n"
    "Change: the single loaders (ComfyUI's files; the second model of the pair is the first one once more), recording, "
    "picture, driving video. The preset gives steps, guidance, shift and solver.",
}
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
WIDTH_PX, WIDE_PX, GAP_PX, ROW_PX, TEXT_PX = 300, 400, 80, 24, 110
NOTE_PX = (320, 400)
PREVIEWS_PX = {
    "LoadImage": 280,
    "LoadVideo": 280,
    "LoadAudio": 90,
    "WanS2VSaveVideo": 280,
    "WanS2VTalkingVideo": 60,
    "WanS2VMemory": 170,
    "WanS2VConditioning": 140,
}
"""Room for what the page adds to a node: a picture or a player, buttons, a timeline."""


def inputs_of(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of what a node takes, in the order of its widgets."""
    for group in ("required", "optional"):
        for name in schema["input_order"].get(group, ()):
            kind, *options = schema["input"][group][name]
            yield name, "COMBO" if isinstance(kind, list) else kind, options[0] if options else {}


def columns(prompt: dict[str, Any]) -> dict[str, int]:
    """The column of each node: right of all that it reads."""
    found: dict[str, int] = {}

    def column(number: str) -> int:
        if number not in found:
            sources = [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
            found[number] = 1 + max(map(column, sources), default=-1)
        return found[number]

    for number in prompt:
        column(number)
    return found


def draw(prompt: dict[str, Any], schemas: dict[str, Any], note: str) -> dict[str, Any]:
    """A graph as ComfyUI saves it."""
    links, place = [], columns(prompt)
    nodes = [draw_node(int(number), entry, schemas[entry["class_type"]]) for number, entry in prompt.items()]
    by_id = {node["id"]: node for node in nodes}
    for number, entry in prompt.items():
        for slot, socket in enumerate(by_id[int(number)]["inputs"]):
            value = entry["inputs"].get(socket["name"])
            if isinstance(value, list):
                source, output = by_id[int(value[0])]["outputs"], value[1]
                links.append([len(links) + 1, int(value[0]), output, int(number), slot, source[output]["type"]])
                socket["link"] = len(links)
                source[output]["links"].append(len(links))
    lay_out(nodes, [place[number] for number in prompt])
    last = max(by_id)
    nodes.append(draw_note(last + 1, len(nodes), note))
    return {
        "revision": 0,
        "last_node_id": last + 1,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [120, 180]}},
        "version": 0.4,
    }


def lay_out(nodes: list[dict[str, Any]], places: list[int]) -> None:
    """Give each node its place: columns side by side, right of the note, nodes of a column one below the other."""
    left = NOTE_PX[0] + GAP_PX
    for column in sorted(set(places)):
        below, own = 0, [node for node, place in zip(nodes, places, strict=True) if place == column]
        for node in own:
            node["pos"] = [left, below]
            below += node["size"][1] + GAP_PX
        left += max(node["size"][0] for node in own) + GAP_PX
    for order, node in enumerate(nodes):
        node["order"] = order


def draw_note(number: int, order: int, text: str) -> dict[str, Any]:
    place = {"id": number, "type": "Note", "pos": [0, 0], "size": list(NOTE_PX), "order": order, "flags": {}, "mode": 0}
    look = {"properties": {}, "color": "#432", "bgcolor": "#653"}
    return {**place, **look, "inputs": [], "outputs": [], "widgets_values": [text]}


def draw_node(number: int, entry: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    sockets, fields, values, texts = [], [], [], 0
    for name, kind, options in inputs_of(schema):
        value = entry["inputs"].get(name, options.get("default"))
        if kind not in WIDGETS:
            sockets.append({"name": name, "type": kind, "link": None})
            continue
        fields.append({"name": name, "type": kind, "widget": {"name": name}, "link": None})
        values.append(options.get("default") if isinstance(value, list) else value)
        if options.get("control_after_generate"):
            values.append("fixed")
        texts += bool(options.get("multiline"))
    outputs = [
        {"name": name, "type": kind, "links": []}
        for name, kind in zip(schema["output_name"], schema["output"], strict=True)
    ]
    rows = max(len(sockets), len(outputs)) + len(values) + 1
    height = rows * ROW_PX + texts * TEXT_PX + PREVIEWS_PX.get(entry["class_type"], 0)
    return {
        "id": number,
        "type": entry["class_type"],
        "size": [WIDE_PX if texts else WIDTH_PX, height],
        "flags": {},
        "mode": 0,
        "inputs": [*sockets, *fields],
        "outputs": outputs,
        "properties": {"Node name for S&R": entry["class_type"]},
        "widgets_values": values,
    }


def main(names: list[str]) -> None:
    with ComfyServer(COMFYUI, {"wan_s2v": ROOT}) as server:
        schemas = server.client.object_info()
    for name in names or list(NOTES):
        prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
        graph = draw(prompt, schemas, NOTES[name])
        (WORKFLOWS / f"{name}.json").write_text(json.dumps(graph, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
