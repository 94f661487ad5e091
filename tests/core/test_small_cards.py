"""benchmarks/small_cards.py and whole_clip.py on the embedded model: that they run, and measure what they say."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run_apart(script, *arguments) -> None:
    """In a process of its own, whose memory is counted."""
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments), "--tiny"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def run_here(monkeypatch):
    """Run a script in this process, where torch is there already."""

    def run(script, *arguments) -> None:
        spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / "benchmarks" / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--tiny"])
        module.main()

    return run


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("forwards", ["--runs", 1, "--warm_ups", 0, "--caps", 8, 6, "--precision", "float32"]),
        ("stages", ["--precision", "float32"]),
        ("planner", ["--settings", 3]),
        ("ram", []),
    ],
)
def test_small_cards(what, options, tmp_path, run_here):
    run = run_apart if what == "ram" else run_here
    run("small_cards.py", what, *options, "--out", tmp_path, "--folder", tmp_path)
    report = json.loads((tmp_path / f"small_cards_{what}.json").read_text())
    rows = report["rows"]
    assert report.keys() == {"device", "torch", "commit", "seed", "rows"}
    if what == "forwards":
        assert [row["cap_gb"] for row in rows] == [None, 8, 6] and all(len(row["seconds"]) == 1 for row in rows)
    if what in ("forwards", "stages"):
        assert [row["difference"] for row in rows] == [0.0] * len(rows)
    if what == "stages":
        assert [row["cap_gb"] for row in rows] == [None, 4.8] * 4 + [None, 8.0]
    if what == "planner":
        assert {row["precision"] for row in rows} == {"bfloat16", "float8", "float8-weights"}
    if what == "ram":
        mapped, packed = rows
        assert mapped["most_loading_bytes"] < 0.5 * mapped["file_bytes"] < 0.5 * packed["most_loading_bytes"] + 2e6


def test_a_whole_clip_under_several_limits(tmp_path, run_here, pooled_vae):
    out = tmp_path / "clips.json"
    run_here("whole_clip.py", "float32-offload", "--steps", 1, "--vram_limit_gb", 8, 6, "--out", out)
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["float32-offload-8GB", "float32-offload-6GB"]
    for case in cases.values():
        assert case["is_finite"] and case["file"]["frames"] == 77
        assert {"text_encoder", "audio_encoder", "dit"} <= {stage["name"] for stage in case["stages"]}
