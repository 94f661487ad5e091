"""Every Triton kernel on the CPU: the files interpreted_*.py, in one process in which Triton interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_kernels_as_python():
    pytest.importorskip("triton.tools.tensor_descriptor")
    files = sorted(Path(__file__).parent.glob("interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", *map(str, files)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-9000:] + run.stderr[-2000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout
