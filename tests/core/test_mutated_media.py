"""Damaged media files: each is read as far as it goes or refused in one line, in bounded time and memory."""

import json
import subprocess
import sys
from pathlib import Path

FILES = 20
SEED = 7


def test_damaged_files_end_in_a_reading_or_one_line():
    script = Path(__file__).with_name("media_mutations.py")
    command = [sys.executable, str(script), str(SEED), str(FILES)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["read"] > FILES and found["refused"] > FILES, "both happen"
    assert found["slowest_seconds"] < 20 and found["most_bytes"] < 1_000_000_000
