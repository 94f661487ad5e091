"""The page in a real browser: every workflow on the canvas, in every language, what is to be seen while one runs, and
what a newcomer does.

python3 dev/run.py test sets what it needs where it finds Chromium: CHROMIUM, NODE, PLAYWRIGHT_DIR (the folder of
playwright-core) and FRONTEND_ROOT (static/ of a newer comfyui_frontend_package than the one that ComfyUI came with).
Without them it is skipped; REQUIRE_BROWSER turns that into a failure. SCREENSHOTS names a folder to keep pictures in;
for those of the docs the voice of the first video is longer (VOICE_SECONDS).

The newer frontend has most of it, in both kinds of nodes, since that is what an update brings to everybody; ComfyUI's
own opens every graph and runs the demo, in English and with classic nodes.
"""

import json
import os
import re
import shutil
import subprocess
import wave
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import av
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, RUN_SCRIPT, FIRST_SCRIPT, MEMORY_SCRIPT = (
    Path(__file__).with_name(f"{name}.mjs") for name in ("page", "page_run", "page_first_video", "page_memory")
)
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINT = ROOT / "subgraphs" / "Speech to Video (Wan2.2-S2V).json"
SHOWN_WIDGETS = ["checkpoint", "prompt", "width", "height", "steps", "seed", "filename_prefix"]
"""Of the blueprint's own node."""
DEMO, SMALL_CARD = (ROOT / "workflows" / f"{name}.json" for name in ("demo", "small_card"))
OWN, NEWER = "own", "newer"
"""Frontends: ComfyUI's own, and that of FRONTEND_ROOT."""
CARD = {OWN: "own with a card", NEWER: "newer with a card"}
"""The same on servers that believe in a card."""
VOICE_SECONDS = float(os.environ.get("VOICE_SECONDS", 0.75))
"""Of the newcomer's recording: two clips where they are to be looked at, else a short one."""


@pytest.fixture(scope="module")
def browser() -> dict[str, str]:
    """Environment of the scripts."""
    found = {
        "CHROMIUM": os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser"),
        "NODE": os.environ.get("NODE") or shutil.which("node"),
        "PLAYWRIGHT_DIR": os.environ.get("PLAYWRIGHT_DIR"),
        "FRONTEND_ROOT": os.environ.get("FRONTEND_ROOT"),
    }
    missing = [name for name, value in found.items() if not (value and Path(value).exists())]
    if missing:
        end = pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip
        end(f"{', '.join(missing)}: not set or not there. python3 dev/run.py test sets them where it finds Chromium.")
    return {**os.environ, **found}


@pytest.fixture(scope="module")
def newer(start_comfy, browser):
    """A second server, which gives out the newer frontend."""
    with start_comfy("--front-end-root", browser["FRONTEND_ROOT"]) as server:
        assert server.import_problems() == []
        yield server


ADDED = {"WanS2VEncodeText": ["text_precision"], "LoadAudio": ["audioUI"]}
"""Inputs that the page may add: optional ones that an older prompt does not name, and a player of ComfyUI's own."""


@pytest.fixture(scope="module")
def own_with_card(start_with_card):
    with start_with_card() as server:
        yield server


@pytest.fixture(scope="module")
def newer_with_card(start_with_card, browser):
    with start_with_card("--front-end-root", browser["FRONTEND_ROOT"]) as server:
        yield server


@pytest.fixture(scope="module")
def server_of(request):
    """The server that gives out a frontend, started when it is first asked for."""
    names = {OWN: "comfy", NEWER: "newer", CARD[OWN]: "own_with_card", CARD[NEWER]: "newer_with_card"}
    return lambda frontend: request.getfixturevalue(names[frontend])


@pytest.fixture(scope="module")
def in_page(browser, server_of, tmp_path_factory):
    """Run a script in the page of a frontend, with settings -> what it prints."""

    def show(frontend: str, script: Path, *arguments: str | Path, **settings) -> dict:
        server = server_of(frontend)
        known = {"Comfy.TutorialCompleted": True} | {name.replace("_", "."): value for name, value in settings.items()}
        for name, value in known.items():
            server.client.request(f"/settings/{name}", json.dumps(value).encode())
        command = [browser["NODE"], script, server.client.url, tmp_path_factory.mktemp("profile"), *arguments]
        ended = subprocess.run(command, env=browser, capture_output=True, text=True, timeout=480)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return show


@pytest.fixture(scope="module")
def opened(in_page):
    """Open all workflows in a language -> what the page made of each."""
    pages = {}

    def open_page(frontend: str, language: str) -> dict:
        if (frontend, language) not in pages:
            pages[frontend, language] = in_page(frontend, SCRIPT, *GRAPHS, Comfy_Locale=language)
        return pages[frontend, language]

    return open_page


LANGUAGES = pytest.mark.parametrize("frontend, language", [(OWN, "en"), (NEWER, "zh")])
"""ComfyUI 0.3.75's own forgets what packs translate into another language than English (ComfyUI_frontend #7214)."""


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
@LANGUAGES
def test_a_graph_on_the_canvas_is_the_prompt_of_the_api(opened, frontend, language, path):
    """Widgets keep their places: values of the graph end up in the inputs that the prompt has."""
    page = opened(frontend, language)[path.stem]
    assert page["errors"] == [] and all(node["known"] for node in page["nodes"])
    expected = json.loads((ROOT / "workflows" / "api" / path.name).read_text(encoding="utf-8"))
    found = page["prompt"]
    assert {key: node["class_type"] for key, node in found.items()} == {
        key: node["class_type"] for key, node in expected.items()
    }
    for key, node in expected.items():
        added = [name for name in ADDED.get(node["class_type"], ()) if name not in node["inputs"]]
        assert {name: value for name, value in found[key]["inputs"].items() if name not in added} == node["inputs"], key


@LANGUAGES
def test_names_are_in_the_language_of_the_page(opened, frontend, language):
    definitions = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node in opened(frontend, language)[DEMO.stem]["nodes"]:
        expected = definitions[node["type"]]
        assert node["title"] == expected["display_name"]
        for name, label in (*node["widgets"], *node["inputs"]):
            if name in expected["inputs"]:  # the page adds widgets of its own, such as the one after a seed
                assert label == expected["inputs"][name]["name"], (node["type"], name)
        labels = [label for _, label in node["outputs"]]
        assert labels == [entry["name"] for entry in expected["outputs"].values()]


@pytest.mark.parametrize("frontend", [OWN, NEWER])
def test_the_blueprint_is_the_main_path(frontend, in_page):
    """One node on the canvas; what is inside has the values of the prompt that it was drawn from."""
    page = in_page(frontend, SCRIPT, BLUEPRINT)[BLUEPRINT.stem]
    (node,) = page["nodes"]
    assert page["errors"] == [] and node["known"]
    assert [name for name, _ in node["inputs"][:2]] == ["audio", "picture"] and node["outputs"][0][0] == "video"
    assert [name.rpartition(": ")[2] for name, _ in node["widgets"]] == SHOWN_WIDGETS  # older pages: "1: checkpoint"
    drawn_from = json.loads((ROOT / "workflows" / "api" / "talking_video.json").read_text(encoding="utf-8"))
    expected = {node["class_type"]: plain_inputs(node) for node in drawn_from.values() if "S2V" in node["class_type"]}
    found = {node["class_type"]: plain_inputs(node) for node in page["prompt"].values()}
    assert found.keys() == expected.keys()
    for kind in expected:
        assert {name: found[kind][name] for name in expected[kind]} == expected[kind], kind


def plain_inputs(node: dict) -> dict:
    """Those of a prompt that are not linked, but for what the page adds."""
    added = ADDED.get(node["class_type"], ())
    return {name: value for name, value in node["inputs"].items() if not isinstance(value, list) and name not in added}


QUICK = {
    "WanS2VConditioning": {"width": 64, "height": 64, "size_rule": "exact", "clip_frames": 20, "max_clips": 3},
    "WanS2VSample": {"steps": 2, "guidance_scale": 1.0},
}
"""What makes the demo three clips that take a second each."""
WORDS = {
    "en": {
        "demo": ["3 clips", "188 frames", "11.8 s", "what a run will make"],
        "quick": "3 clips",
        "clip": "clip ",
        "clips": ["3 clips", "3.6 of 61.0 s", "49 clips", "Load Audio"],
    },
    "zh": {
        "demo": ["3 个片段", "188 帧", "11.8 秒", "运行后将生成的内容"],
        "quick": "3 个片段",
        "clip": "片段 ",
        "clips": ["3 个片段", "61.0 秒中的 3.6 秒", "49 个片段", "加载音频"],
    },
}


@pytest.mark.parametrize("frontend, canvas, language", [(OWN, "classic", "en"), (NEWER, "vue", "zh")])
def test_clips_are_seen_before_and_while_they_are_made(
    frontend, canvas, language, in_page, server_of, comfy, new_seed, write_sound
):
    """The plan before the run; a clip that plays while others are made; and no workflow knows of either widget."""
    quick = {**QUICK, "WanS2VSample": QUICK["WanS2VSample"] | {"seed": new_seed() % 2**32}}
    sound = write_sound("page.wav", 61.0, rate=16000)
    server_of(frontend).client.upload(comfy.base / "input" / sound)
    arguments = DEMO, f"{canvas}_{language}", json.dumps(quick), sound
    page = in_page(frontend, RUN_SCRIPT, *arguments, Comfy_Locale=language, Comfy_VueNodes_Enabled=canvas == "vue")
    words = WORDS[language]
    assert page["errors"] == []
    assert page["demo"].splitlines() == words["demo"]
    assert page["settled"].startswith(words["quick"]) and page["status"] == "success"
    during = page["during"]
    assert during["ended"] is None, "a clip plays before the run has ended"
    assert during["width"] == 64 and during["muted"]
    first, others = 17 / 16, 20 / 16  # where the cores are busy the second clip is there when one is looked at
    assert min(abs(during["seconds"] - first), abs(during["seconds"] - others)) < 0.1
    assert during["label"].startswith(words["clip"]) and during["told"].startswith(words["quick"])
    assert page["after"].splitlines()[-1] in ("3 of 3 clips finished", "已完成 3/3 个片段")
    assert len(page["others"]) >= 2, "after the newest the others play in turn"

    other = page["other"]
    assert other["absent"].startswith("absent.wav is not there")
    assert other["chosen"].startswith(words["clips"][0]) and words["clips"][1] in other["chosen"]
    assert other["whole"].startswith(words["clips"][2])
    assert words["clips"][3] in other["muted"], "a node that will not run tells nothing"

    for saved in json.loads(DEMO.read_text(encoding="utf-8"))["nodes"]:
        kept = page["nodes"][saved["type"]].get("values", [])[: len(saved["widgets_values"])]
        changed = quick.get(saved["type"], {}).values()
        assert all(new == old or new in changed for new, old in zip(kept, saved["widgets_values"], strict=True))
    expected = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))
    assert {key: node["inputs"] for key, node in page["prompt"].items()} == {
        key: node["inputs"] | quick.get(node["class_type"], {}) for key, node in expected.items()
    }


MEMORY_WORDS = {
    "en": ("6.3 GB of 24.0 GB", "voice text VAE_encode sampling VAE_decode", "whole", "tiles of ", "Wan S2V Sample"),
    "zh": ("可用 6.3 GB，共 24.0 GB", "语音 文本 VAE_编码 采样 VAE_解码", "完整", " 像素的分块", "Wan S2V Sample"),
}
"""In the panel of a card of 8 GB: what may be used, stages, two plans, and what is not known without a sampler."""


@pytest.mark.parametrize("frontend, canvas, language", [(OWN, "classic", "en"), (NEWER, "vue", "zh")])
def test_memory_is_told_before_a_run(frontend, canvas, language, in_page):
    """The panel follows widgets and links: tighter plans where there is less room, and what there is no room for."""
    settings = {"Comfy_Locale": language, "Comfy_VueNodes_Enabled": canvas == "vue"}
    page = in_page(CARD[frontend], MEMORY_SCRIPT, SMALL_CARD, f"memory_{canvas}_{language}", **settings)
    usable, names, whole, tiles, sampler = MEMORY_WORDS[language]
    names = [name.replace("_", " ") for name in names.split()]
    assert page["errors"] == []
    assert [part for part, panel in page["seen"].items() if not panel["fits"]] == []
    stages = {part: panel["stages"] for part, panel in page["seen"].items()}
    assert usable in page["seen"]["opened"]["text"]
    for part in ("opened", "large", "tight", "small", "preset"):
        assert [stage["lines"][0] for stage in stages[part]] == names
    assert all(stage["lines"][1] == whole and 0 < stage["share"] < 0.5 for stage in stages["opened"])
    opened, large, tight, small, preset = (
        [stages[part][number] for number in (2, 4)] for part in ("opened", "large", "tight", "small", "preset")
    )
    for number in range(2):
        bytes_ = [float(part[number]["lines"][2].split()[0]) for part in (opened, large, tight)]
        assert bytes_[0] < bytes_[2] < bytes_[1]
        assert tiles in large[number]["lines"][1] and tiles in tight[number]["lines"][1]
        assert all(0.3 < part[number]["share"] < 1 for part in (large, tight))
        assert "tightest form" in small[number]["lines"][1] and small[number]["share"] == pytest.approx(1)
        assert float(preset[number]["lines"][2].split()[0]) > bytes_[1], "float32 takes more"
    asked = {"preset": "reference 480p", "vae_precision": "float32", "vram_limit_gb": "24", "demo": "1"}
    assert page["last"].items() >= asked.items() and "guidance_scale" not in page["last"]
    assert [stage["lines"][0] for stage in stages["alone"]] == [names[3]] and sampler in page["seen"]["alone"]["text"]
    assert stages["unloaded"] == [] and page["values"] == ["custom", 24, -1, -1, -1, "auto"], "no workflow knows of it"


@pytest.fixture
def own_files(tmp_path, chance) -> tuple[Path, Path]:
    """A picture, and a recording that no earlier run knows."""
    picture, voice = tmp_path / "my_picture.png", tmp_path / "my_voice.wav"
    shutil.copyfile(ROOT / "assets" / "portrait.png", picture)
    with av.open(str(ROOT / "assets" / "voice.flac")) as container:
        rate = container.streams.audio[0].rate
        mixer = av.AudioResampler(format="s16", layout="mono")
        parts = [part.to_ndarray() for frame in container.decode(audio=0) for part in mixer.resample(frame)]
    with wave.open(str(voice), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        start = chance.integers(rate)
        file.writeframes(np.concatenate(parts, axis=1)[0, start : start + round(VOICE_SECONDS * rate)].tobytes())
    return picture, voice


@pytest.mark.parametrize("canvas", ["classic", "vue"])
def test_a_newcomer_has_a_video_after_one_drag_and_two_files(canvas, in_page, newer, own_files, watch):
    arguments = ROOT / "workflows" / "one_node.json", *own_files, f"first_video_{canvas}"
    settings = {"Comfy_Locale": "en", "Comfy_VueNodes_Enabled": canvas == "vue"}
    page = in_page(NEWER, FIRST_SCRIPT, *arguments, **settings)
    assert page["errors"] == [] and page["before"] == 0, "the canvas was empty"
    assert (page["drags"], page["picks"]) == (1, 2) and page["presses"] <= 3, "Run, and play where it waits for that"
    for name, path in zip(("picture", "voice"), own_files, strict=True):
        assert (newer.base / "input" / page["chosen"][name]).read_bytes() == path.read_bytes()

    frames = round(16 * VOICE_SECONDS)
    assert page["planned"].splitlines()[1] == "188 frames" and page["heard"].splitlines()[1] == f"{frames} frames"
    assert page["seen"]["width"] and page["status"] == "success" and "clips finished" in page["finished"]
    playing = page["playing"]
    assert playing["width"] == playing["height"] == 256
    assert playing["seconds"] == pytest.approx(VOICE_SECONDS, abs=0.1) and not playing["paused"]
    assert playing["box"]["right"] <= 1000 and playing["box"]["bottom"] <= 900, "it is in view"
    (name,) = parse_qs(urlsplit(playing["source"]).query)["filename"]
    film = watch(newer.output / "video" / name)
    assert len(film.pictures) == frames and film.sound_seconds == pytest.approx(VOICE_SECONDS, abs=0.1)


def test_the_widgets_speak_every_language():
    """Every text has the same placeholders in each of them."""
    source = (ROOT / "web" / "js" / "texts.js").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^  (\w+): \{$(.*?)^  \},$", source, re.M | re.S))
    texts = {language: dict(re.findall(r"^    (\w+): '(.*)',$", block, re.M)) for language, block in blocks.items()}
    assert texts.keys() == {path.name for path in (ROOT / "locales").iterdir()} and len(texts["en"]) > 10
    holes = {
        language: {name: set(re.findall(r"\{(\w+)\}", text)) for name, text in known.items()}
        for language, known in texts.items()
    }
    assert all(found == holes["en"] for found in holes.values())
