"""Draw the main path as a blueprint: one node in ComfyUI's node library, which opens into the nodes it is made of.

Run it after workflows/api/talking_video.json or one of its nodes has changed: python3 dev/draw_blueprint.py (needs
.venv as dev/run.py makes it).
"""

import json
import uuid
from typing import Any

from comfy_server import ComfyServer
from draw_workflows import COMFYUI, GAP_PX, ROOT, ROW_PX, WIDTH_PX, WORKFLOWS, draw

PROMPT = WORKFLOWS / "api" / "talking_video.json"
BLUEPRINT = ROOT / "subgraphs" / "Speech to Video (Wan2.2-S2V).json"
DESCRIPTION = "A picture and a voice become a talking video. Open it to change how."
CATEGORY = "Video generation and editing/Audio to video"
GIVEN = {"LoadImage": "picture", "LoadAudio": "audio"}
"""Loaders whose place the inputs of the blueprint take, and the names of these."""
LAST = "WanS2VSaveVideo"
SHOWN = {
    "WanS2VLoadCheckpoint": ("checkpoint",),
    "WanS2VEncodeText": ("prompt",),
    "WanS2VConditioning": ("width", "height"),
    "WanS2VSample": ("steps", "seed"),
    LAST: ("filename_prefix",),
}
"""Widgets that the node shows before it is opened."""
INPUTS, OUTPUTS = -10, -20
"""What the page calls the two ends of a subgraph."""
END_PX = 120


def blueprint(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """A graph of one node that holds the nodes of another, but for loaders and notes."""
    loaders = [node for node in graph["nodes"] if node["type"] in GIVEN]
    slots = {node["id"]: slot for slot, node in enumerate(loaders)}
    nodes = [node for node in graph["nodes"] if node["id"] not in slots and node["type"] != "Note"]
    (last,) = [node for node in nodes if node["type"] == LAST]
    links = [link_inside(link, slots) for link in graph["links"]]
    links.append(link_inside([len(links) + 1, last["id"], 0, OUTPUTS, 0, last["outputs"][0]["type"]], slots))
    last["outputs"][0]["links"].append(len(links))
    inputs = [
        end(
            GIVEN[node["type"]], [link for link in links if link["origin_slot"] == slot and link["origin_id"] == INPUTS]
        )
        for node, slot in zip(loaders, slots.values(), strict=True)
    ]
    outputs = [end(last["outputs"][0]["name"], links[-1:])]
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    definition = {
        "id": fixed_id(name),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": graph["last_node_id"], "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {
            "id": INPUTS,
            "bounding": [min(node["pos"][0] for node in nodes) - END_PX - GAP_PX, 0, END_PX, END_PX],
        },
        "outputNode": {"id": OUTPUTS, "bounding": [right + GAP_PX, 0, END_PX, END_PX]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": links,
        "extra": {},
        "category": CATEGORY,
        "description": DESCRIPTION,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [closed(definition)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
    }


def link_inside(link: list, slots: dict[int, int]) -> dict[str, Any]:
    """A link as subgraphs keep it; what came from a loader comes from the subgraph's input."""
    number, source, output, target, slot, kind = link
    origin = (
        {"origin_id": INPUTS, "origin_slot": slots[source]}
        if source in slots
        else {"origin_id": source, "origin_slot": output}
    )
    return {"id": number, **origin, "target_id": target, "target_slot": slot, "type": kind}


def end(name: str, links: list[dict[str, Any]]) -> dict[str, Any]:
    """An input or output of the subgraph."""
    return {"id": fixed_id(name), "name": name, "type": links[0]["type"], "linkIds": [link["id"] for link in links]}


def closed(definition: dict[str, Any]) -> dict[str, Any]:
    """The one node that stands for the subgraph."""
    shown = [[str(node["id"]), name] for node in definition["nodes"] for name in SHOWN.get(node["type"], ())]
    sockets = {
        key: [{"name": entry["name"], "type": entry["type"]} for entry in definition[key]]
        for key in ("inputs", "outputs")
    }
    return {
        "id": 1,
        "type": definition["id"],
        "pos": [0, 0],
        "size": [WIDTH_PX, ROW_PX * (len(shown) + 6)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [entry | {"link": None} for entry in sockets["inputs"]],
        "outputs": [entry | {"links": []} for entry in sockets["outputs"]],
        "properties": {"proxyWidgets": shown},
        "widgets_values": [],
        "title": definition["name"],
    }


def fixed_id(text: str) -> str:
    """The same for the same text, so that drawing again changes nothing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"wan_s2v/{text}"))


def main() -> None:
    with ComfyServer(COMFYUI, {"wan_s2v": ROOT}) as server:
        schemas = server.client.object_info()
    made = blueprint(draw(json.loads(PROMPT.read_text(encoding="utf-8")), schemas, ""), BLUEPRINT.stem)
    BLUEPRINT.parent.mkdir(exist_ok=True)
    BLUEPRINT.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
