"""The page in a real browser: the demo on the canvas, in every language.

Needs node, Chromium (CHROMIUM, or on the path) and playwright-core (PLAYWRIGHT_DIR: the folder in which
`npm install playwright-core` was run). Skipped without them.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("page.mjs")
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


@pytest.fixture(scope="module")
def opened(comfy, browser, tmp_path_factory):
    """Open the demo in a language -> what the page made of it."""
    pages = {}

    def open_page(language: str) -> dict:
        if language not in pages:
            known = {"Comfy.Locale": language, "Comfy.TutorialCompleted": True}
            for name, value in known.items():
                comfy.client.request(f"/settings/{name}", json.dumps(value).encode())
            arguments = ["node", SCRIPT, comfy.client.url, DEMO, tmp_path_factory.mktemp("profile")]
            ended = subprocess.run(arguments, env=browser, capture_output=True, text=True, timeout=240)
            assert ended.returncode == 0, ended.stderr
            pages[language] = json.loads(ended.stdout)
        return pages[language]

    return open_page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_demo_on_the_canvas_is_the_demo_of_the_api(opened, language):
    """Widgets keep their places: values of the graph end up in the inputs that the prompt has."""
    page = opened(language)
    assert page["errors"] == [] and all(node["known"] for node in page["nodes"])
    expected = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))
    assert {key: (node["class_type"], node["inputs"]) for key, node in page["prompt"].items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in expected.items()
    }


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_are_in_the_language_of_the_page(opened, language):
    definitions = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    version = opened(language)["version"]
    if language != "en" and tuple(map(int, version.split("."))) <= FORGETFUL:
        pytest.skip(f"frontend {version} forgets translations of packs. FRONTEND_ROOT names a newer one")
    for node in opened(language)["nodes"]:
        expected = definitions[node["type"]]
        assert node["title"] == expected["display_name"]
        for name, label in (*node["widgets"], *node["inputs"]):
            if name in expected["inputs"]:  # the page adds widgets of its own, such as the one after a seed
                assert label == expected["inputs"][name]["name"], (node["type"], name)
        labels = [label for _, label in node["outputs"]]
        assert labels == [entry["name"] for entry in expected["outputs"].values()]
