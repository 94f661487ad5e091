#!/usr/bin/env python3
"""Set up what the project needs in .venv, once, and run something there.

    python3 dev/run.py comfy [--audio talk.wav] [--image face.png]   a demo video through a real ComfyUI, by itself
    python3 dev/run.py serve [--port 8188]          ComfyUI with these nodes, to try in a browser
    python3 dev/run.py test [PYTEST ARGUMENTS]      style, then all tests, those of the nodes in a real ComfyUI
                                                    and, where Chromium is found, in its page
    python3 dev/run.py attack [CLASS ...]           damaged files, odd prompts, kills and rivals by chance: what breaks
    python3 dev/run.py verify tests/golden          any command of python -m wan_s2v_core

Needs Python 3.10 or newer with venv and pip, and nothing else. The first run installs PyTorch as constraints.txt pins
it, which is several GB with CUDA on machines that have no CPU build of it. ComfyUI comes with the first of comfy,
serve, test and attack; the other commands do without.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import comfy_demo
from environment import COMFYUI, PYTHON, ROOT, set_up_comfyui, set_up_core, set_up_page

SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile")
"""For all tests: two files at a time, each with its own ComfyUI where it needs one."""
SUITES: dict[str, dict[str, str]] = {
    "tests/core": {},
    "tests/pack": {"COMFYUI_PATH": str(COMFYUI), "REQUIRE_COMFYUI": "1"},
}
NO_TESTS_CHOSEN = 5
"""pytest's exit code when its arguments choose nothing in a folder."""


def run(*command: str | Path, folder: Path = ROOT, **variables: str) -> int:
    """Run to its exit code. Ctrl-C reaches it from the terminal, SIGTERM is passed on, so that it can clean up."""
    with subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}) as process:
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


def test(arguments: list[str], page: dict[str, str]) -> int:
    """Style, then the suites; arguments that name a file or folder of one suite leave out the other.

    Args:
        page: variables for the tests in a browser.
    """
    for style in (["check"], ["format", "--check"]):
        if code := run(PYTHON, "-m", "ruff", *style):
            return code
    codes = []
    for suite, variables in SUITES.items():
        named = [argument for argument in arguments if argument.startswith(tuple(SUITES))]
        if named and not any(argument.startswith(suite) for argument in named):
            continue
        chosen = [argument for argument in arguments if argument not in named or argument.startswith(suite)]
        how = chosen if arguments else SIDE_BY_SIDE
        codes.append(run(PYTHON, "-m", "pytest", *(() if named else (suite,)), *how, **variables, **page))
        if codes[-1] and not (arguments and codes[-1] == NO_TESTS_CHOSEN):
            return codes[-1]
    return min(codes)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    command, arguments = sys.argv[1], sys.argv[2:]
    if command in comfy_demo.COMMANDS:
        comfy_demo.parse(sys.argv[1:])  # mistakes are told before anything is installed
    page = {}
    try:
        set_up_comfyui() if command in (*comfy_demo.COMMANDS, "test", "attack") else set_up_core()
        if command == "test":
            page = set_up_page()
    except subprocess.CalledProcessError as error:
        print(f"error: setting up .venv failed in {' '.join(map(str, error.cmd))}", file=sys.stderr)
        print("It needs venv (on Debian and Ubuntu: apt install python3-venv) and a package index.", file=sys.stderr)
        return 1
    if command == "test":
        return test(arguments, page)
    if command in comfy_demo.COMMANDS:
        return run(PYTHON, ROOT / "dev" / "comfy_demo.py", command, *arguments, folder=Path.cwd())
    if command == "attack":
        return run(PYTHON, ROOT / "dev" / "attack", *arguments, folder=Path.cwd())
    return run(PYTHON, "-m", "wan_s2v_core", command, *arguments)


if __name__ == "__main__":
    sys.exit(main())
