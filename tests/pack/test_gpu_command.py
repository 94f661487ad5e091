"""dev/run.py gpu, as far as a CPU shows it: its cases, its report, and two of its parts with tiny networks."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gpu
import gpu_settings
import numpy as np
import pytest
from comfy_client import Run
from gpu_measure import Measured, most, stage_marks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ground(tmp_path) -> gpu.Ground:
    return gpu.Ground(
        tmp_path, tmp_path, tmp_path, on_cpu=True, is_tiny=True, facts={"torch": "2", "commit": "unknown"}
    )


@pytest.fixture
def command(comfy, tmp_path):
    """Run some parts on the CPU -> exit code, and what each wrote."""

    def run(*arguments: str) -> tuple[int, dict[str, dict]]:
        words = [sys.executable, ROOT / "dev" / "run.py", "gpu", *arguments, "--cpu", "--tiny"]
        words += ["--out", tmp_path / "out", "--work", tmp_path / "work"]
        variables = {**os.environ, **comfy.environment, "COMFYUI_PATH": str(comfy.comfyui)}
        done = subprocess.run(words, capture_output=True, text=True, env=variables)
        print(done.stdout, done.stderr)
        files = (tmp_path / "out").glob("gpu_*.json")
        return done.returncode, {file.stem[4:]: json.loads(file.read_text()) for file in files}

    return run


def test_settings_on_a_cpu(command, tmp_path):
    code, written = command("settings", "--only", "solver=euler,cancel: a clip is sampled,16_bit")
    cases = {case["case"]: case["status"] for case in written["settings"]["cases"]}
    assert code == 0 and set(cases.values()) == {"ok"} and len(cases) == 3
    assert "settings: 3 ok" in (tmp_path / "out" / "gpu.md").read_text()


def test_real_on_a_cpu(command):
    code, written = command("real", "--only", "everything at hand")
    made, run = written["real"]["cases"]
    assert code == 0 and (made["case"], made["status"], run["status"]) == ("checkpoint", "ok", "ok")
    assert 0 < run["first_step_begins"] < run["first_step_ends"] < run["seconds"]
    assert run["nodes"]["WanS2VSample"] > 0 and run["anonymous_gb"] > 0
    assert written["real"]["comfyui"] != "unknown" and written["real"]["torch"]


def test_every_setting_has_its_cases(comfy):
    """All choices of all our nodes, and one other value of each number and switch."""
    schemas = comfy.client.object_info()
    cases = list(gpu_settings.settings(schemas))
    names = Counter(case.name for case in cases)
    assert max(names.values()) == 1
    for kind in gpu_settings.NODES:
        groups = schemas[kind]["input"]
        for name, entry in {**groups.get("required", {}), **groups.get("optional", {})}.items():
            if not gpu_settings.has_widget(entry) or name in gpu_settings.NOT_ALONE:
                continue
            found = [case for case in names if case.startswith(f"{kind[6:]} {name}=")]
            choices = gpu_settings.choices_of(entry)
            assert len(found) == (1 if choices is None else len(choices) - 1), (kind, name, found)


def test_a_case_that_fails_ends_no_other_and_turns_the_report_red(ground, tmp_path):
    report = gpu.Report("real", ground)
    assert report.run("one", lambda: {"frames": 3})
    assert not report.run("two", lambda: 1 / 0)
    assert report.run("three", lambda: {"status": gpu.ELSEWHERE, "error": "'sage' cannot be used: it is missing."})
    written = json.loads((tmp_path / "gpu_real.json").read_text())
    assert [case["status"] for case in written["cases"]] == ["ok", "red", "not here"] and not report.is_green
    assert "ZeroDivisionError" in written["cases"][1]["error"]
    text = gpu.table(tmp_path)
    assert "real: 1 ok, 1 not here, 1 red" in text and "| one | ok |" in text and "frames 3" in text
    ground.minutes = 0
    assert not report.run("late", lambda: None) and "left out" in report.cases[-1]["error"]


def test_results_of_pytest_are_cases(ground, tmp_path):
    from gpu_tests import add_results

    (tmp_path / "test_it.py").write_text("import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    told = tmp_path / "told.xml"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py", f"--junitxml={told}"]
    code = subprocess.run(words, cwd=tmp_path, capture_output=True).returncode
    report = gpu.Report("tests", ground)
    add_results("tests/it", told, code, report)
    suite, bad = report.cases
    assert (suite["passed"], suite["failed"], suite["status"], bad["status"]) == (1, 1, "red", "red")
    assert bad["case"] == "test_it::test_bad" and "assert 1 == 2" in bad["error"]


def test_peaks_belong_to_their_stages():
    """Of a sampler with two clips of two steps: encoding, sampling and decoding are told by the log and the bar."""
    prompt = {"3": {"class_type": "WanS2VEncodeAudio"}, "6": {"class_type": "WanS2VSample", "inputs": {"steps": 2}}}
    run = Run(prompt, started={"3": 0.0, "6": 1.0}, seconds=9.0)
    measured = Measured(run, 0.0, 0.0, [(3.0, 1), (4.0, 2), (7.0, 3), (8.0, 4)], [2.0, 6.0])
    assert stage_marks(run, measured) == [
        ("voice", 0.0), ("VAE encode", 1.0), ("sampling", 2.0), ("VAE decode", 4.0), ("sampling", 6.0),
        ("VAE decode", 8.0),
    ]  # fmt: skip
    samples = [(0.5, 1.0), (1.5, 2.0), (3.5, 30.0), (5.0, 4.0)]
    assert most(samples, 2.0, 4.0) == 30.0 and most(samples, 6.0, 7.0) == 4.0
    assert measured.seconds_per_step == 1.0
    measured.crossings = [(1.5, 33.0), (5.0, 2.0)]
    assert measured.crossed(4.0, 6.0) == {"tensors": 1, "GB": 2.0}


def test_inputs_are_what_they_are_called(tmp_path):
    import av
    from PIL import Image

    folder = gpu_settings.write_inputs(tmp_path / "inputs")
    with av.open(str(folder / "24_bit.wav")) as container:
        assert container.streams.audio[0].format.name == "s32" or "24" in container.streams.audio[0].codec_context.name
    with av.open(str(folder / "surround.m4a")) as container:
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert len(sound) == 6 and np.abs(sound[2]).max() > 0.1 > np.abs(sound[3]).max()
    assert Image.open(folder / "rgba.png").mode == "RGBA" and Image.open(folder / "16_bit.png").mode.startswith("I")
