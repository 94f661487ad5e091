"""Where inputs are tried: a tiny checkpoint, a face and a voice, and a child with a watchdog.

Standard library only, so that what an input does to torch or PyAV happens in the child.
"""

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .outcome import GIGABYTE

ROOT = Path(__file__).resolve().parents[2]
HANG_SECONDS = 60.0
"""No input is large: longer than this a command must not take."""
STOP_BYTES = 5 * GIGABYTE
"""A child that has taken so much more is ended, to spare the machine."""
SAMPLE_SECONDS = 0.01
START_SECONDS = 180.0
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else 0


class Stopwatch:
    """Seconds that a process has worked or waited. Time in which it was ready and others had the processors is left
    out, so that a busy machine makes no hang."""

    def __init__(self, pid: int):
        self.pid, self.seconds = pid, 0.0
        self._now, (self._busy, _) = time.monotonic(), self._facts()

    def look(self) -> float:
        """To be called often."""
        now, (busy, is_ready) = time.monotonic(), self._facts()
        worked, passed = max(0.0, busy - self._busy), now - self._now
        self.seconds += min(worked, passed) if is_ready else passed
        self._now, self._busy = now, busy
        return self.seconds

    def _facts(self) -> tuple[float, bool]:
        """Its processor seconds, and whether it could use more."""
        try:
            facts = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK"), facts[0] == "R"
        except (OSError, IndexError):
            return 0.0, False


class Worker:
    """A child that runs `worker.py`. It is started again when an input has ended it."""

    def __init__(self, hang_seconds: float = HANG_SECONDS):
        self.hang_seconds = hang_seconds
        self.process: subprocess.Popen | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)

    def ask(self, **job: Any) -> dict[str, Any]:
        """The answer to a job, with the seconds and the anonymous memory that it took.

        Instead of an answer: `hang`, where it was when its time had passed; `too_large`; `died`, by which signal.
        """
        self._start()
        pid = self.process.pid
        watch = Stopwatch(pid)
        before = peak = anonymous_bytes(pid)
        self._send(job)
        ending: dict[str, Any] = {}
        while not self._is_ready(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes(pid))
            if watch.look() > self.hang_seconds:
                ending = {"hang": self._stack()}
                break
            if peak - before > STOP_BYTES:
                self._kill()
                ending = {"too_large": True}
                break
        line = "" if ending else self.process.stdout.readline()
        if line:
            ending = json.loads(line)
        elif not ending:
            code = self.process.wait()
            ending = {"died": f"ended with {code}: {self._said()[-300:]}"}
            self._kill()
        if "broken" in ending:
            raise RuntimeError(ending["broken"])
        return ending | {"seconds": watch.seconds, "peak_bytes": max(peak, anonymous_bytes(pid)) - before}

    def close(self) -> None:
        self._kill()
        self.log.close()

    def _start(self) -> None:
        if self.process is not None:
            return
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **THREADS},
        )
        if not self._is_ready(START_SECONDS) or not self.process.stdout.readline():
            raise RuntimeError(f"the child does not start: {self._said()}")

    def _send(self, job: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def _is_ready(self, seconds: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def _stack(self) -> str:
        """Where the child is, as faulthandler tells it when it is ended."""
        self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self._kill()
        lines = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', self._said())
        return " < ".join(f"{Path(file).name}:{line} {name}" for file, line, name in lines[:6]) or "an unknown place"

    def _said(self) -> str:
        self.log.seek(0)
        said = self.log.read().decode(errors="replace")
        self.log.seek(0)
        self.log.truncate()
        return said

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


class Lab:
    """A folder with what every attack begins from.

    Args:
        checkpoint: a tiny one of demo/tiny_checkpoint.py; made here if it is not given.
    """

    def __init__(self, folder: Path, checkpoint: Path | None = None, hang_seconds: float = HANG_SECONDS):
        self.folder = folder
        self.worker = Worker(hang_seconds)
        self.checkpoint = checkpoint or self._make_checkpoint()
        self.face, self.voice = ROOT / "assets" / "portrait.png", ROOT / "assets" / "voice.flac"

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def clear(self) -> None:
        """Delete all of it."""
        remove(self.folder)

    def _make_checkpoint(self) -> Path:
        folder = self.folder / "tiny"
        if not folder.is_dir():
            maker = [sys.executable, str(ROOT / "demo" / "tiny_checkpoint.py"), str(folder)]
            subprocess.run(maker, check=True, capture_output=True, env={**os.environ, **THREADS})
        return folder

    @contextlib.contextmanager
    def box(self, keep: bool = False) -> Iterator[Path]:
        """An empty folder for one input."""
        box = Path(tempfile.mkdtemp(prefix="input-", dir=self.folder))
        try:
            yield box
        finally:
            if not keep:
                remove(box)

    def generate(self, save_file: Path, **changes: Any) -> list[str]:
        """The arguments of a quick `generate`: one step, half a second. None leaves an argument out."""
        options = {
            "ckpt_dir": self.checkpoint,
            "audio": self.voice,
            "audio_seconds": 0.5,
            "image": self.face,
            "size": "64*64",
            "infer_frames": 20,
            "sample_steps": 1,
            "sample_guide_scale": 1,
            "base_seed": 1,
            "save_file": save_file,
        } | changes
        given = {name: value for name, value in options.items() if value is not None}
        flags = [(f"--{name}", *(() if value is True else (str(value),))) for name, value in given.items()]
        return ["generate", *(part for flag in flags for part in flag)]

    def film(self, path: Path) -> dict[str, Any]:
        """Facts about a film; nothing if it is not there or cannot be decoded."""
        if not path.is_file():
            return {}
        with contextlib.suppress(RuntimeError):
            return self.worker.ask(do="film", path=str(path))
        return {}


def chance_for(seed: int, number: int) -> random.Random:
    """The random numbers of one input."""
    return random.Random(f"{seed}/{number}")


def chosen_kinds(kinds: list[str], seed: int, count: int) -> list[str]:
    """Which kind each number has: all of them in an order by chance, again and again."""
    order: list[str] = []
    for turn in range(-(-count // len(kinds))):
        order += random.Random(f"{seed}/kinds/{turn}").sample(kinds, len(kinds))
    return order[:count]


def size_of(path: Path) -> int:
    """Bytes on disk of a file or of all files in a folder; holes count as nothing."""
    files = [path] if not path.is_dir() else [file for file in path.rglob("*") if not file.is_symlink()]
    return sum(file.lstat().st_blocks * 512 for file in files)


def remove(folder: Path) -> None:
    """Delete a folder, whatever its permissions are."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
