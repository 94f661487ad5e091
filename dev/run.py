#!/usr/bin/env python3
"""Set up what the project needs in .venv, once, and run something there.

    python3 dev/run.py test [PYTEST ARGUMENTS]      style, then all tests
    python3 dev/run.py verify tests/golden          any command of python -m wan_s2v_core

Needs Python 3.10 or newer with venv and pip, and nothing else. The first run installs PyTorch as constraints.txt pins
it, which is several GB with CUDA on machines that have no CPU build of it.
"""

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
INPUTS = ("requirements.txt", "constraints.txt")
TOOLS = ("hypothesis", "pytest", "ruff")


def set_up() -> None:
    """Make the environment, unless it is there and was made from the same requirements."""
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in INPUTS)).hexdigest()
    stamp = ENVIRONMENT / "made-from"
    if PYTHON.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"setting up {ENVIRONMENT} (once)", file=sys.stderr)
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, "-r", ROOT / "requirements.txt", *TOOLS], check=True)
    stamp.write_text(wanted)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    set_up()
    command, arguments = sys.argv[1], sys.argv[2:]
    if command != "test":
        return subprocess.run([PYTHON, "-m", "wan_s2v_core", command, *arguments], cwd=ROOT).returncode
    steps = (
        [PYTHON, "-m", "ruff", "check"],
        [PYTHON, "-m", "ruff", "format", "--check"],
        [PYTHON, "-m", "pytest", "tests/core", *arguments],
    )
    return next((code for step in steps if (code := subprocess.run(step, cwd=ROOT).returncode)), 0)


if __name__ == "__main__":
    sys.exit(main())
