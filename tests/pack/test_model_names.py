"""Which networks the loaders offer and find: official folders at any depth, names from Windows, links of any type."""

import shutil
from pathlib import Path

import pytest
from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "assets" / "checkpoint"
DEEP, TWICE = "below/deeper/S2V", "below/Twice"
INPUTS = {"WanS2VLoadCheckpoint": "checkpoint", "WanS2VLoadModel": "name", "WanS2VLoadVAE": "name"}


@pytest.fixture(scope="module")
def server(comfy, extra_models):
    """A server with official folders below folders, two of one name, and a pack whose links fit everything."""
    packs = {**comfy.packs, "any_link.py": Path(__file__).with_name("any_link.py")}
    made = ComfyServer(comfy.comfyui, packs, arguments=comfy.arguments, environment=comfy.environment)
    near, far = made.base / "models" / "diffusion_models", extra_models / "diffusion_models"
    shutil.copytree(CHECKPOINT, near / DEEP)
    for root in (near, far):
        shutil.copytree(CHECKPOINT, root / TWICE)
    (far / TWICE / "config.json").write_text("{ only the first root's is right")
    (far / "below" / "plain").mkdir()
    shutil.copy(CHECKPOINT / "Wan2.1_VAE.pth", far / "below" / "plain" / "vae.pth")
    with made:
        yield made
    shutil.rmtree(far / "below")


def offered(server, loader: str) -> list[str]:
    return server.client.object_info()[loader]["input"]["required"][INPUTS[loader]][1]["options"]


@pytest.mark.parametrize("loader", INPUTS)
def test_official_folders_are_named_by_their_path_and_offered_once(server, loader):
    names = offered(server, loader)
    for folder in (DEEP, TWICE):
        assert names.count(f"{folder} (folder)") == 1
        assert not [name for name in names if name.startswith(f"{folder}/")], "its parts are not offered one by one"
    assert not [name for name in names if "wav2vec2" in name or "google" in name]


def test_files_below_folders_are_named_as_comfyui_does(server):
    assert "below/plain/vae.pth" in offered(server, "WanS2VLoadModel")


@pytest.mark.parametrize("name", [f"{DEEP} (folder)", f"{TWICE} (folder)"])
def test_folders_below_folders_make_videos(server, graph, name):
    """Of two roots with that name, the first one's is read: the other one's config is broken."""
    assert server.client.run(graph(checkpoint=name)).status == "success"


def test_names_from_windows_are_understood(server, graph):
    ended = server.client.run(graph(checkpoint=f"{DEEP} (folder)".replace("/", "\\")))
    if ended.status == "rejected":  # newer versions compare with the menu before any node is asked
        (error,) = [error for node in ended.node_errors.values() for error in node["errors"]]
        assert error["type"] == "value_not_in_list"
    else:
        assert ended.status == "success"


@pytest.mark.parametrize(
    ("name", "output", "given"),
    [
        ("model", 3, "Wan 2.1 VAE"),
        ("vae", 0, "S2V DiT"),
        ("text_encoder", 2, "wav2vec 2.0"),
        ("audio_encoder", 1, "umT5"),
    ],
)
def test_a_network_of_another_kind_is_named(server, graph, message_of, name, output, given):
    link = ("HandOn", {"anything": ("WanS2VLoadCheckpoint", {"checkpoint": "embedded demo"}, output)})
    message = message_of(server.client.run(graph(**{name: link})))
    assert message.startswith(f"{name} is connected to a {given}") and "\n" not in message.strip()
