"""What saved workflows rely on: ids, inputs and outputs of nodes, and examples that name only what is there."""

import json
import os
import urllib.parse
from pathlib import Path

import pytest
from comfy_client import HttpError

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("nodes.json")
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
KEPT_OPTIONS = ("default", "min", "max", "step", "options", "multiline", "dynamicPrompts", "control_after_generate")
FILES = ("checkpoint", "name", "picture", "voice", "file")
"""Inputs whose options are the files that happen to be there."""
CATEGORIES = {
    "WanS2V/loaders",
    "WanS2V/speed",
    "WanS2V/memory",
    "WanS2V/conditioning",
    "WanS2V/sampling",
    "WanS2V/video",
}
SOCKETS = ("WAN_S2V_", "CONDITIONING", "IMAGE", "AUDIO", "VIDEO", "LATENT")
"""Beginnings of types that are connected, not set, and may go without a tooltip."""
RENEW = "RENEW_NODES"


@pytest.fixture(scope="module")
def schemas(comfy) -> dict:
    return comfy.client.object_info()


def described_inputs(schema: dict):
    """(group, name, type, options) of each input, in order."""
    for group, names in schema["input_order"].items():
        for name in names:
            kind, *options = schema["input"][group][name]
            yield group, name, kind, options[0] if options else {}


def contract(schema: dict) -> dict:
    """What a saved workflow can notice about a node."""
    inputs = {}
    for group, name, kind, options in described_inputs(schema):
        if group == "hidden":
            continue
        kept = {key: options[key] for key in KEPT_OPTIONS if options.get(key) is not None}
        if name in FILES:
            kept = {key: value for key, value in kept.items() if key not in ("options", "default")}
        inputs[name] = {"type": kind, "group": group, **kept}
    outputs = [list(pair) for pair in zip(schema["output"], schema["output_name"], strict=True)]
    return {"inputs": inputs, "outputs": outputs, "is_output_node": schema["output_node"]}


def test_the_pack_loads_without_a_problem(comfy, pack_nodes):
    assert comfy.import_problems() == []
    assert pack_nodes and all(node.startswith("WanS2V") for node in pack_nodes)


def test_nodes_match_the_snapshot(schemas, pack_nodes):
    found = {node: contract(schemas[node]) for node in pack_nodes}
    if os.environ.get(RENEW):
        SNAPSHOT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    expected = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    ordered = {node: list(entry["inputs"]) for node, entry in expected.items()}
    changed = sorted(
        node
        for node in found.keys() | expected.keys()
        if found.get(node) != expected.get(node) or list(found[node]["inputs"]) != ordered[node]
    )
    assert not changed, (
        f"{', '.join(changed)} differ from {SNAPSHOT.name}; workflows that people have saved may break. Ids and orders "
        f"of a released node never change. For a change on purpose: {RENEW}=1 python3 dev/run.py test "
        f"tests/pack/{Path(__file__).name}, and read the difference."
    )


def test_every_node_and_input_is_explained(schemas, pack_nodes):
    silent = [node for node in pack_nodes if not schemas[node]["description"]]
    for node in pack_nodes:
        for group, name, kind, options in described_inputs(schemas[node]):
            if group != "hidden" and not options.get("tooltip") and not str(kind).startswith(SOCKETS):
                silent.append(f"{node}.{name}")
    assert silent == []


def test_nodes_stand_together_in_the_menu(schemas, pack_nodes):
    assert {schemas[node]["category"] for node in pack_nodes} == CATEGORIES
    assert all(schemas[node]["display_name"].startswith("Wan S2V ") for node in pack_nodes)


def test_other_words_find_the_node_where_comfyui_knows_such(schemas):
    asked = "search_aliases" in schemas["LoadImage"]
    assert ("lip sync" in (schemas["WanS2VTalkingVideo"].get("search_aliases") or ())) == asked


def test_web_files_are_served(comfy):
    """ComfyUI serves WEB_DIRECTORY under the name of the pack."""
    folder = ROOT / "web"
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        address = urllib.parse.quote(f"/extensions/wan_s2v/{path.relative_to(folder).as_posix()}")
        assert comfy.client.request(address) == path.read_bytes(), address
    scripts = {f"/extensions/wan_s2v/{path.relative_to(folder).as_posix()}" for path in files if path.suffix == ".js"}
    assert scripts <= set(comfy.client.get("/extensions"))


def test_workflows_are_served_as_templates(comfy):
    """A folder named example or examples in the pack would hide them: ComfyUI serves both under one address."""
    listed = comfy.client.get("/workflow_templates")["wan_s2v"]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert {path.stem for path in (ROOT / "workflows").glob("*.jpg")} == set(listed), "each has its picture there"
    for path in (path for path in (ROOT / "workflows").iterdir() if path.suffix in (".json", ".jpg")):
        assert comfy.client.request(f"/api/workflow_templates/wan_s2v/{path.name}") == path.read_bytes()


def test_blueprints_are_in_the_node_library(comfy, schemas):
    """Where ComfyUI has one: older versions know no such address."""
    try:
        listed = comfy.client.get("/global_subgraphs")
    except HttpError as error:
        assert error.status == 404
        return
    ours = {number: entry for number, entry in listed.items() if entry["info"]["node_pack"] == "custom_nodes.wan_s2v"}
    assert sorted(entry["name"] for entry in ours.values()) == [path.stem for path in BLUEPRINTS]
    for number in ours:
        graph = json.loads(comfy.client.get(f"/global_subgraphs/{number}")["data"])
        (inside,) = graph["definitions"]["subgraphs"]
        assert {node["type"] for node in inside["nodes"]} <= schemas.keys()


def test_every_graph_is_small_and_has_a_prompt():
    for path in (ROOT / "workflows").glob("*.json"):
        assert (ROOT / "workflows" / "api" / path.name).is_file()
        assert path.with_suffix(".jpg").stat().st_size < 100_000 and path.stat().st_size < 100_000


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_only_what_is_there(path, schemas):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    assert any(schemas[node["class_type"]]["output_node"] for node in prompt.values())
    for number, node in prompt.items():
        schema = schemas[node["class_type"]]
        inputs = {name: (group, kind, options) for group, name, kind, options in described_inputs(schema)}
        needed = {name for name, (group, *_) in inputs.items() if group == "required"}
        given = node["inputs"]
        assert needed <= set(given) <= set(inputs), f"node {number}"
        for name, value in given.items():
            _, kind, options = inputs[name]
            if isinstance(value, list):
                source, output = value
                assert schemas[prompt[source]["class_type"]]["output"][output] == kind, f"node {number}, {name}"
            elif kind == "COMBO" and name not in FILES and not any(option.endswith("_upload") for option in options):
                assert value in options["options"], f"node {number}, {name}"
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], f"node {number}, {name}"
