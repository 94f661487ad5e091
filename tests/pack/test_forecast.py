"""The forecast of a run's memory: what the page is told before it, with and without a card. Nothing is loaded."""

import shutil
import urllib.parse

import pytest
from comfy_client import HttpError
from comfy_server import ComfyServer

ROUTE = "/wan_s2v/memory"
STAGES = ["voice", "text", "VAE encode", "sampling", "VAE decode"]
EMBEDDED = "embedded demo"
HD = {"width": 1280, "height": 704}


def asking(server):
    """Ask the route of a server -> its answer."""

    def ask(**query):
        answer = server.client.get(f"{ROUTE}?{urllib.parse.urlencode(query)}")
        assert ("error" in answer) != (answer.keys() >= {"stages", "device"})
        return answer

    return ask


RESERVED = 400 * 2**20
"""What ComfyUI leaves to other programs on Linux."""


@pytest.fixture(scope="module")
def card(start_with_card):
    """A server that believes in a card of 24 GB, of which 22 are free."""
    with start_with_card() as server:
        assert server.import_problems() == []
        yield server


@pytest.fixture
def plan(card):
    return asking(card)


def by_stage(answer: dict) -> dict[str, dict]:
    return {stage["stage"]: stage for stage in answer["stages"]}


def test_where_the_server_computes(comfy, device):
    answer = asking(comfy)(checkpoint=EMBEDDED)
    assert [stage["stage"] for stage in answer["stages"]] == STAGES
    assert (answer["device"] is None) == (device == "cpu")
    for stage in answer["stages"]:
        if device != "cpu":
            assert stage["error"] is None and 0 < stage["peak_bytes"] < stage["room_bytes"]
            assert stage["line"].startswith(f"{stage['peak_bytes'] / 1e9:.1f} GB")
            continue
        assert stage["line"].startswith("in main memory") and stage["error"] is None
        assert stage["peak_bytes"] is stage["room_bytes"] is None


def test_defaults_are_those_of_the_nodes(plan, card):
    answer = plan()
    assert answer["device"]["name"] == "Pretended card" and answer["device"]["total_bytes"] == 24e9
    assert [stage["stage"] for stage in answer["stages"]] == STAGES
    for stage in answer["stages"]:
        assert stage["error"] is None and 0 < stage["peak_bytes"] < stage["room_bytes"] == 22e9 - RESERVED
        assert stage["line"].startswith(f"{stage['peak_bytes'] / 1e9:.1f} GB")
    schemas = card.client.object_info()
    inputs = {
        name: options[0].get("default")
        for node in ("WanS2VSpeed", "WanS2VConditioning", "WanS2VSample", "WanS2VMemory")
        for name, (_, *options) in schemas[node]["input"]["required"].items()
        if options
    }
    inputs["vae_precision"] = inputs.pop("vae")
    told = {name: str(value).lower() if isinstance(value, bool) else value for name, value in inputs.items()}
    said = {name: value for name, value in told.items() if value is not None and name != "seconds"}
    assert plan(**said, checkpoint=EMBEDDED)["stages"] == answer["stages"]
    log = card.log()
    assert "tensors as" not in log, "nothing is loaded"
    assert "S2V DiT: " not in log, "the console tells of runs alone"


def test_what_takes_more(plan):
    """More pixels, frames, guidance, poses, sound and precision take more memory, of the stages that they concern."""
    usual = by_stage(plan(seconds=4))
    for changes, larger in (
        (HD, ("VAE encode", "sampling", "VAE decode")),
        ({"clip_frames": 160}, ("sampling", "VAE decode")),
        ({"has_pose": "true"}, ("sampling",)),
        ({"audio_guidance_scale": 3}, ("sampling",)),
        ({"precision": "float32"}, ("VAE encode", "sampling", "VAE decode")),
        ({"vae_precision": "float32"}, ("VAE encode", "VAE decode")),
        ({"seconds": 8}, ("voice",)),
    ):
        found = by_stage(plan(**{"seconds": 4, **changes}))
        grown = [name for name in STAGES if found[name]["peak_bytes"] > usual[name]["peak_bytes"]]
        assert set(grown) >= set(larger), changes
        assert "seconds" not in changes or grown == ["voice"]
    cheap = by_stage(plan(seconds=4, preset="embedded demo"))
    assert cheap["sampling"]["peak_bytes"] < usual["sampling"]["peak_bytes"], "its guidance is off"
    assert cheap == by_stage(plan(seconds=4, guidance_scale=1))


def test_less_room_makes_tighter_plans(plan):
    whole, tight = by_stage(plan(**HD)), by_stage(plan(**HD, profile="custom", vram_limit_gb=3))
    for name in ("VAE encode", "VAE decode"):
        assert tight[name]["peak_bytes"] < whole[name]["peak_bytes"] and "tiles of" in tight[name]["line"]
    for name in ("VAE encode", "sampling", "VAE decode"):
        assert tight[name]["peak_bytes"] < tight[name]["room_bytes"] < 3e9
    for name in ("voice", "text"):
        assert tight[name]["room_bytes"] < 3e9 < whole[name]["room_bytes"], "the limit is for every stage"
    profile = by_stage(plan(**HD, profile="8 GB"))
    assert profile == by_stage(plan(**HD, profile="custom", vram_limit_gb=8))
    by_hand = by_stage(plan(**HD, vae_tile=256))
    assert by_hand["VAE decode"]["line"].endswith("tiles of 256 px")
    slices = by_stage(plan(resident_blocks=1, slice_tokens=2048))["sampling"]
    assert "layers stay" in slices["line"] and "2048 tokens at once" in slices["line"]


def test_no_room_is_told_of_the_stage(plan):
    found = by_stage(plan(**HD, profile="custom", vram_limit_gb=1))
    for name in STAGES:
        assert "tightest form" in found[name]["error"] and found[name]["peak_bytes"] > 0


def test_text_in_main_memory(plan):
    text = by_stage(plan(text_device="cpu"))["text"]
    assert text["room_bytes"] is None and text["line"].startswith("in main memory")


def test_a_recording_is_measured(plan, write_sound, comfy, card):
    name = write_sound("forecast.wav", 5.0)
    card.client.upload(comfy.base / "input" / name)
    assert by_stage(plan(audio=name))["voice"] == by_stage(plan(seconds=5))["voice"]
    assert by_stage(plan(audio=name, start_seconds=1, seconds=2))["voice"] == by_stage(plan(seconds=2))["voice"]
    assert by_stage(plan(demo=1))["voice"]["peak_bytes"] < by_stage(plan())["voice"]["peak_bytes"]


def test_stages_of_networks_that_are_named(plan):
    assert [stage["stage"] for stage in plan(model=EMBEDDED)["stages"]] == ["sampling"]
    assert [stage["stage"] for stage in plan(vae=EMBEDDED, text_encoder=EMBEDDED)["stages"]] == [
        "text",
        "VAE encode",
        "VAE decode",
    ]


OUTSIDE = ["../../etc/passwd", "/etc/passwd", "", ".", "..", "../checkpoints/a.safetensors", "a\0b", "<b>"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("network", ["checkpoint", "model", "vae", "text_encoder", "audio_encoder"])
def test_models_that_no_menu_offers(network, name, plan, card):
    error = plan(**{network: name})["error"]
    assert error.startswith(f"{network}={name!r}") and str(card.base) not in error and "root:" not in error


def test_a_file_that_is_no_model(plan, card):
    folder = card.base / "models" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    found = by_stage(plan(checkpoint=EMBEDDED, vae="broken.safetensors"))
    for name in ("VAE encode", "VAE decode"):
        error = found[name]["error"]
        assert "broken.safetensors" in error and str(card.base) not in error and "\n" not in error
    assert found["sampling"]["error"] is None
    shutil.copy(folder / "broken.safetensors", card.base / "models" / "diffusion_models")
    error = plan(checkpoint=EMBEDDED, model="broken.safetensors")["error"]
    assert "broken.safetensors" in error and str(card.base) not in error and "\n" not in error


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ""])
def test_recordings_outside_are_refused(name, card):
    with pytest.raises(HttpError) as refused:
        card.client.get(f"{ROUTE}?{urllib.parse.urlencode({'audio': name})}")
    assert refused.value.status == 403 and "input folder" in refused.value.answer["error"]


WRONG = [
    {"width": "abc"},
    {"width": "0"},
    {"height": "-16"},
    {"height": "100000"},
    {"width": "100", "size_rule": "exact"},
    {"clip_frames": "22"},
    {"guidance_scale": "nan"},
    {"audio_guidance_scale": "0.5"},
    {"seconds": "-1"},
    {"seconds": "nan"},
    {"preset": "nothing"},
    {"profile": "huge"},
    {"profile": "custom", "vram_limit_gb": "0"},
    {"profile": "custom", "vram_limit_gb": "nan"},
    {"resident_blocks": "-2"},
    {"slice_tokens": "1.5"},
    {"vae_tile": "12"},
    {"weights": "elsewhere"},
    {"precision": "int3"},
    {"text_precision": "int3"},
    {"text_device": "moon"},
    {"attention": "warp"},
    {"sparse_keep": "7"},
    {"vae_precision": "int3"},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_settings_that_cannot_be(settings, plan):
    error = plan(**settings)["error"]
    assert error and "\n" not in error and "Traceback" not in error


def test_other_methods_are_not_there(comfy):
    with pytest.raises(HttpError) as refused:
        comfy.client.post(ROUTE, {})
    assert refused.value.status == 405


@pytest.mark.parametrize("state", ["NO_VRAM", "LOW_VRAM"])
def test_comfyuis_own_flags_are_followed(state, comfy, start_with_card):
    plain = start_with_card("--reserve-vram", "8")
    variables = {**plain.environment, "PRETENDED_STATE": state}
    with ComfyServer(plain.comfyui, plain.packs, arguments=plain.arguments, environment=variables) as server:
        found = by_stage(asking(server)())
        by_hand = by_stage(asking(server)(resident_blocks=3, slice_tokens=2048))
    for name in STAGES:
        assert found[name]["room_bytes"] == 22e9 - 8 * 2**30
    sampling = found["sampling"]
    assert sampling["layers_stay"] == 0 and sampling["slice_tokens"] == (4096 if state == "NO_VRAM" else None)
    assert by_hand["sampling"]["layers_stay"] == 3 and by_hand["sampling"]["slice_tokens"] == 2048
