"""The page in a real browser: every workflow on the canvas, in every language, and what is to be seen while one runs.

Needs node, Chromium (CHROMIUM, or on the path) and playwright-core (PLAYWRIGHT_DIR: the folder in which
`npm install playwright-core` was run). Skipped without them. SCREENSHOTS names a folder to keep pictures in.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, RUN_SCRIPT = (Path(__file__).with_name(name) for name in ("page.mjs", "page_run.mjs"))
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
DEMO = ROOT / "workflows" / "demo.json"
FORGETFUL = (1, 32, 9)
"""Frontends up to this one, at least, forget what packs translate into a language that is loaded later than English
(ComfyUI_frontend pull request 7214). Seen to be right: 1.58.1."""


@pytest.fixture(scope="module")
def browser() -> dict[str, str]:
    """Environment of the script."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    folder = os.environ.get("PLAYWRIGHT_DIR")
    if not (shutil.which("node") and chromium and folder and (Path(folder) / "node_modules/playwright-core").is_dir()):
        pytest.skip("needs node, CHROMIUM and PLAYWRIGHT_DIR (a folder in which playwright-core is installed)")
    return {**os.environ, "CHROMIUM": chromium, "PLAYWRIGHT_DIR": folder}


ADDED = {"WanS2VSample": ["colour_match"], "LoadAudio": ["audioUI"]}
"""Inputs that the page may add: an optional one that an older prompt does not name, and a player of ComfyUI's own."""


@pytest.fixture(scope="module")
def in_page(comfy, browser, tmp_path_factory):
    """Run a script in a page with settings -> what it prints."""

    def show(script: Path, *arguments: str | Path, **settings) -> dict:
        known = {"Comfy.TutorialCompleted": True} | {name.replace("_", "."): value for name, value in settings.items()}
        for name, value in known.items():
            comfy.client.request(f"/settings/{name}", json.dumps(value).encode())
        command = ["node", script, comfy.client.url, tmp_path_factory.mktemp("profile"), *arguments]
        ended = subprocess.run(command, env=browser, capture_output=True, text=True, timeout=480)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return show


@pytest.fixture(scope="module")
def opened(in_page):
    """Open all workflows in a language -> what the page made of each."""
    pages = {}

    def open_page(language: str) -> dict:
        if language not in pages:
            pages[language] = in_page(SCRIPT, *GRAPHS, Comfy_Locale=language)
        return pages[language]

    return open_page


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_graph_on_the_canvas_is_the_prompt_of_the_api(opened, language, path):
    """Widgets keep their places: values of the graph end up in the inputs that the prompt has."""
    page = opened(language)[path.stem]
    assert page["errors"] == [] and all(node["known"] for node in page["nodes"])
    expected = json.loads((ROOT / "workflows" / "api" / path.name).read_text(encoding="utf-8"))
    found = page["prompt"]
    assert {key: node["class_type"] for key, node in found.items()} == {
        key: node["class_type"] for key, node in expected.items()
    }
    for key, node in expected.items():
        added = [name for name in ADDED.get(node["class_type"], ()) if name not in node["inputs"]]
        assert {name: value for name, value in found[key]["inputs"].items() if name not in added} == node["inputs"], key


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_are_in_the_language_of_the_page(opened, language):
    definitions = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    page = opened(language)[DEMO.stem]
    version = page["version"]
    if language != "en" and tuple(map(int, version.split("."))) <= FORGETFUL:
        pytest.skip(f"frontend {version} forgets translations of packs. FRONTEND_ROOT names a newer one")
    for node in page["nodes"]:
        expected = definitions[node["type"]]
        assert node["title"] == expected["display_name"]
        for name, label in (*node["widgets"], *node["inputs"]):
            if name in expected["inputs"]:  # the page adds widgets of its own, such as the one after a seed
                assert label == expected["inputs"][name]["name"], (node["type"], name)
        labels = [label for _, label in node["outputs"]]
        assert labels == [entry["name"] for entry in expected["outputs"].values()]


QUICK = {
    "WanS2VConditioning": {"width": 64, "height": 64, "size_rule": "exact", "clip_frames": 20},
    "WanS2VSample": {"steps": 2, "guidance_scale": 1.0},
}
"""What makes the demo ten clips that take a second each."""
WORDS = {
    "en": {
        "demo": ["3 clips", "188 frames", "11.8 s", "what a run will make"],
        "quick": "10 clips",
        "clip": "clip ",
        "clips": ["49 clips", "8.6 of 61.0 s", "Load Audio"],
    },
    "zh": {
        "demo": ["3 个片段", "188 帧", "11.8 秒", "运行后将生成的内容"],
        "quick": "10 个片段",
        "clip": "片段 ",
        "clips": ["49 个片段", "61.0 秒中的 8.6 秒", "加载音频"],
    },
}


@pytest.mark.parametrize("canvas, language", [("classic", "en"), ("vue", "zh")])
def test_clips_are_seen_before_and_while_they_are_made(canvas, language, in_page, new_seed, write_sound):
    """The plan before the run; a clip that plays while others are made; and no workflow knows of either widget."""
    quick = {**QUICK, "WanS2VSample": QUICK["WanS2VSample"] | {"seed": new_seed() % 2**32}}
    arguments = DEMO, f"{canvas}_{language}", json.dumps(quick), write_sound("page.wav", 61.0, rate=16000)
    page = in_page(RUN_SCRIPT, *arguments, Comfy_Locale=language, Comfy_VueNodes_Enabled=canvas == "vue")
    words = WORDS[language]
    assert page["errors"] == []
    assert page["demo"].splitlines() == words["demo"]
    assert page["settled"].startswith(words["quick"]) and page["status"] == "success"
    during = page["during"]
    assert during["ended"] is None, "a clip plays before the run has ended"
    assert during["width"] == 64 and during["muted"] and during["seconds"] == pytest.approx(17 / 16, abs=0.1)
    assert during["label"].startswith(words["clip"]) and during["told"].startswith(words["quick"])
    assert page["after"].splitlines()[-1] in ("10 of 10 clips finished", "已完成 10/10 个片段")
    assert len(page["others"]) >= 2, "after the newest the others play in turn"

    other = page["other"]
    assert other["absent"].startswith("absent.wav is not there")
    assert other["chosen"].startswith(words["clips"][0]) and words["clips"][1] in other["cut"]
    assert words["clips"][2] in other["muted"], "a node that will not run tells nothing"

    for saved in json.loads(DEMO.read_text(encoding="utf-8"))["nodes"]:
        kept = page["nodes"][saved["type"]]["values"][: len(saved["widgets_values"])]
        changed = quick.get(saved["type"], {}).values()
        assert all(new == old or new in changed for new, old in zip(kept, saved["widgets_values"], strict=True))
    expected = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))
    assert {key: node["inputs"] for key, node in page["prompt"].items()} == {
        key: node["inputs"] | quick.get(node["class_type"], {}) for key, node in expected.items()
    }


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
