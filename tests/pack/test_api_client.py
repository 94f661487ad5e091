"""workflows/api_client.py as a user runs it: a process of its own, against the server, on the embedded model."""

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "workflows" / "api_client.py"
TINY = ("--checkpoint", "embedded demo", "--steps", "1", "--size", "64x64")
NOBODY = "http://127.0.0.1:9"


def command(comfy, *arguments) -> list[str]:
    return [sys.executable, str(CLIENT), "--server", comfy.client.url, *map(str, arguments)]


def outcome(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def work(tmp_path, comfy, write_sound, write_picture) -> Path:
    """A user's folder: a face, and recordings of which one is broken."""
    talks = tmp_path / "talks"
    talks.mkdir()
    for name, seconds in (("a first.wav", 0.5), ("größer 音.wav", 1.0)):
        shutil.move(comfy.base / "input" / write_sound("sent.wav", seconds), talks / name)
    (talks / "broken.wav").write_bytes(b"RIFF no sound at all")
    (talks / "notes.txt").write_text("no recording")
    shutil.move(comfy.base / "input" / write_picture("sent.png"), tmp_path / "face.png")
    return tmp_path


def test_a_folder_with_a_broken_recording(work, comfy, watch):
    arguments = command(comfy, "--image", "face.png", "--folder", "talks", "--out", "made", *TINY)
    ended = outcome(arguments, work)
    assert ended.returncode == 1, ended.stderr
    assert sorted(file.name for file in (work / "made").iterdir()) == ["a first.mp4", "größer 音.mp4"]
    assert len(watch(work / "made" / "a first.mp4").pictures) == 8
    assert len(watch(work / "made" / "größer 音.mp4").pictures) == 16
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: broken.wav: LoadAudio: "), ended.stderr
    assert "1 of 3 failed" in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stdout.splitlines()) == 2
    written = (work / "made" / "a first.mp4").stat().st_mtime_ns
    again = outcome(arguments, work)
    assert again.returncode == 1 and again.stderr.count("is there already") == 2 and not again.stdout
    assert (work / "made" / "a first.mp4").stat().st_mtime_ns == written


def test_one_recording(work, comfy, watch):
    options = ("--prompt", "Ein Gesicht “spricht”.", "--seed", "7", "--guidance_scale", "1.5")
    ended = outcome(command(comfy, "--image", "face.png", "--audio", "talks/a first.wav", *TINY, *options), work)
    assert (ended.returncode, ended.stdout) == (0, "a first.mp4\n"), ended.stderr
    prompt = json.loads(watch(work / "a first.mp4").tags["prompt"])
    values = {name: value for node in prompt.values() for name, value in node["inputs"].items()}
    told = tuple(values[name] for name in ("prompt", "seed", "guidance_scale", "width"))
    assert told == ("Ein Gesicht “spricht”.", 7, 1.5, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--server", NOBODY), f"error: no answer from {NOBODY} "),
        (("--checkpoint", "no such"), "error: a first.wav: WanS2VLoadCheckpoint: "),
        (("--steps", "0"), "error: a first.wav: WanS2VSample: Value 0 smaller than min of 1"),
        (("--image", "talks/notes.txt"), "error: a first.wav: LoadImage: "),
    ],
)
def test_errors_are_one_line(work, comfy, options, message):
    arguments = command(comfy, "--image", "face.png", "--audio", "talks/a first.wav", *TINY, *options)
    ended = outcome(arguments, work)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1 and not ended.stdout and "Traceback" not in ended.stderr
    assert len(errors) == 1 and errors[0].startswith(message), ended.stderr


@pytest.mark.parametrize(
    "options",
    [("--audio", "nowhere.wav"), ("--folder", "empty"), ("--audio", "face.png", "--size", "big"), ()],
)
def test_wrong_usage(work, comfy, options):
    (work / "empty").mkdir()
    ended = outcome(command(comfy, "--image", "face.png", *options), work)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_ctrl_c_takes_the_run_back(work, comfy):
    arguments = command(comfy, "--image", "face.png", "--audio", "talks/a first.wav", *TINY, "--steps", "1000")
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # jobs in the background do not
    with subprocess.Popen(arguments, cwd=work, stderr=subprocess.PIPE, text=True, **listens) as process:
        while "running" not in (line := process.stderr.readline()):  # it may wait first
            assert line, "it ended"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "stopped\n"
    assert process.returncode == 130
    deadline = time.monotonic() + 20
    while any(comfy.client.queue().values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(comfy.client.queue().values())
    assert not list(work.glob("*.mp4*"))


def test_it_stands_alone():
    """Users copy it: the standard library alone, nothing of ours."""
    tree = ast.parse(CLIENT.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)
