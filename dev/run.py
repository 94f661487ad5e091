#!/usr/bin/env python3
"""Set up what the project needs in .venv, once, and run something there.

    python3 dev/run.py comfy [--audio talk.wav] [--image face.png]   a demo video through a real ComfyUI, by itself
    python3 dev/run.py serve [--port 8188]          ComfyUI with these nodes, to try in a browser
    python3 dev/run.py test [PYTEST ARGUMENTS]      style, then all tests, those of the nodes in a real ComfyUI
                                                    and, where Chromium is found, in its page
    python3 dev/run.py newer [PYTEST ARGUMENTS]     the tests of the nodes in a newer ComfyUI
    python3 dev/run.py gpu [PART ...] [--out DIR]   what only a GPU shows: tests, all settings, a run of real size
    python3 dev/run.py attack [CLASS ...]           damaged files, odd prompts, kills and rivals by chance: what breaks
    python3 dev/run.py verify tests/golden          any command of python -m wan_s2v_core

Needs Python 3.10 or newer with venv and pip, and nothing else. The first run installs PyTorch as constraints.txt pins
it, which is several GB with CUDA on machines that have no CPU build of it. ComfyUI comes with the first of comfy,
serve, test, newer, attack and gpu; the others do without. COMFYUI_PATH=FOLDER lets test and gpu use any checkout of
ComfyUI: what that one asks for is put into an environment of its own. gpu takes the Python that it is called with, and
sets nothing up, where COMFYUI_PATH is given and that Python has a torch that sees the GPU.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import comfy_demo
from environment import COMFYUI, PYTHON, ROOT, SetUpFailed, python_for, set_up_core, set_up_newer_comfyui, set_up_page

SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
"""For all tests: two files at a time, each with its own ComfyUI where it needs one, long ones first (conftest.py)."""
CORE, PACK = "tests/core", "tests/pack"
NO_TESTS_CHOSEN = 5
"""pytest's exit code when its arguments choose nothing in a folder."""


def run(*command: str | Path, folder: Path = ROOT, **variables: str) -> int:
    """Run to its exit code. Ctrl-C reaches it from the terminal, SIGTERM is passed on, so that it can clean up."""
    with subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}) as process:
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


def test(arguments: list[str], comfyui: Path) -> int:
    """Style, then both suites; arguments that name a file or folder of one suite leave out the other."""
    for style in (["check"], ["format", "--check"]):
        if code := run(PYTHON, "-m", "ruff", *style):
            return code
    return test_suites((CORE, PACK), arguments, comfyui)


def test_suites(suites: tuple[str, ...], arguments: list[str], comfyui: Path) -> int:
    """Run suites of tests, those of the nodes in the ComfyUI of a folder."""
    pack = {"COMFYUI_PATH": str(comfyui), "REQUIRE_COMFYUI": "1"}
    settings = {CORE: (PYTHON, {}), PACK: (python_for(comfyui), pack | set_up_page())}
    codes = []
    for suite in suites:
        python, variables = settings[suite]
        named = [argument for argument in arguments if argument.startswith((CORE, PACK))]
        if named and not any(argument.startswith(suite) for argument in named):
            continue
        chosen = [argument for argument in arguments if argument not in named or argument.startswith(suite)]
        how = chosen if arguments else SIDE_BY_SIDE
        codes.append(run(python, "-m", "pytest", *(() if named else (suite,)), *how, **variables))
        if codes[-1] and not (arguments and codes[-1] == NO_TESTS_CHOSEN):
            return codes[-1]
    return min(codes)


def brings_its_own(arguments: list[str]) -> bool:
    """Whether the Python that runs has all that the GPU's parts need: a ComfyUI, and a torch that sees the GPU."""
    needed = "True" if "--cpu" in arguments else "torch.cuda.is_available()"
    ask = f"import sys, torch; sys.exit(not {needed})"
    has_comfyui = (Path(os.environ.get("COMFYUI_PATH", "")) / "main.py").is_file()
    return has_comfyui and subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode == 0


def gpu(arguments: list[str]) -> int:
    """All that only a GPU shows, with the Python that has what it takes."""
    script = ROOT / "dev" / "gpu.py"
    if brings_its_own(arguments):
        return run(sys.executable, script, *arguments, folder=Path.cwd())
    set_up_core()
    comfyui = Path(os.environ.get("COMFYUI_PATH") or COMFYUI).resolve()
    return run(python_for(comfyui), script, *arguments, folder=Path.cwd(), COMFYUI_PATH=str(comfyui))


def start(command: str, arguments: list[str]) -> int:
    """Set up what a command needs, and run it.

    Raises:
        SetUpFailed, CalledProcessError: if that cannot be had.
    """
    if command == "gpu":
        return gpu(arguments)
    set_up_core()
    if command == "test":
        return test(arguments, Path(os.environ.get("COMFYUI_PATH") or COMFYUI).resolve())
    if command == "newer":
        return test_suites((PACK,), arguments, set_up_newer_comfyui())
    if command == "attack":
        return run(python_for(COMFYUI), ROOT / "dev" / "attack", *arguments, folder=Path.cwd())
    if command in comfy_demo.COMMANDS:
        return run(python_for(COMFYUI), ROOT / "dev" / "comfy_demo.py", command, *arguments, folder=Path.cwd())
    return run(PYTHON, "-m", "wan_s2v_core", command, *arguments)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    command, arguments = sys.argv[1], sys.argv[2:]
    if command in comfy_demo.COMMANDS:
        comfy_demo.parse(sys.argv[1:])  # mistakes are told before anything is installed
    try:
        return start(command, arguments)
    except SetUpFailed as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"error: setting up .venv failed in {' '.join(map(str, error.cmd))}", file=sys.stderr)
        print("It needs venv (on Debian and Ubuntu: apt install python3-venv) and a package index.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
