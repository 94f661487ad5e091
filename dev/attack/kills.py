"""Runs of `generate` that are ended at any moment, again and again; the same command then makes the same film."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .lab import HANG_SECONDS, ROOT, THREADS, Lab, Stopwatch, Worker, chance_for
from .outcome import DIED, DIFFERS, FINE, HANG, LEFT, TRACEBACK, WORDING, Outcome, message_of, unreadable

SIGNALS = {"KILL": signal.SIGKILL, "INT": signal.SIGINT, "TERM": signal.SIGTERM}
LONG = {"audio_seconds": 2.2, "sample_steps": 2}
MOST_KILLS = 3
ENDED_BY_USER = 130
REAL_EVERY, START_SECONDS = 10, 5.0
"""So many have one that is not forked, which needs seconds to begin."""
MOMENTS = ("at any time", "when a file appears", "late")
"""By chance over the whole run, just when something new lies in the folder, or while the video is put together."""


class Runs:
    """Processes of `generate`: forked from a child that has made a film, so that they begin at once, or real ones."""

    def __init__(self, lab: Lab) -> None:
        self.parent = Worker()
        self.real: dict[int, subprocess.Popen] = {}
        with lab.box() as box:
            assert self.parent.ask(do="command", arguments=lab.generate(box / "v.mkv"))["code"] == 0

    def start(self, arguments: list[str], log: Path, real: bool = False) -> int:
        log.touch()
        if not real:
            return self.parent.ask(do="start", arguments=arguments, log=str(log))["pid"]
        command = [sys.executable, "-m", "wan_s2v_core", *arguments]
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **THREADS})
        self.real[process.pid] = process
        return process.pid

    def wait(self, pid: int, seconds: float = HANG_SECONDS) -> int | None:
        """Its exit code, or minus the signal that ended it; None if it has not ended, which ends it now."""
        watch = Stopwatch(pid)
        while watch.look() < seconds and not self.is_over(pid):
            time.sleep(0.01)
        code = self._code(pid)
        if code is None:
            send(pid, signal.SIGKILL)
            self._code(pid)
        return code

    def _code(self, pid: int, seconds: float = 5) -> int | None:
        """Of a process that ends, which takes a moment while it has threads."""
        if pid in self.real:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.real[pid].wait(seconds)
            return None
        return self.parent.ask(do="wait", pid=pid, seconds=seconds).get("code")

    def is_over(self, pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        return state == "Z"

    def close(self) -> None:
        self.parent.close()


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    runs = Runs(lab)
    try:
        with lab.box() as box:
            began = time.monotonic()
            code = runs.wait(runs.start(lab.generate(box / "v.mkv", **LONG), box / "log"))
            whole, plain = time.monotonic() - began, lab.film(box / "v.mkv")
            assert code == 0 and plain, (box / "log").read_text()
        for number in numbers:
            with lab.box(keep) as box:
                yield try_kills(lab, runs, seed, number, box, whole, plain)
    finally:
        runs.close()


def try_kills(lab: Lab, runs: Runs, seed: int, number: int, box: Path, whole: float, plain: dict[str, Any]) -> Outcome:
    chance, began, folder = chance_for(seed, number), time.monotonic(), box / "run"
    how, moment = list(SIGNALS)[number % len(SIGNALS)], MOMENTS[number // len(SIGNALS) % len(MOMENTS)]
    folder.mkdir()
    arguments, log = lab.generate(folder / "v.mkv", **LONG), box / "log"
    real = number % REAL_EVERY == REAL_EVERY - 1
    kind = f"{how} {moment}{', a process of its own' if real else ''}"

    def outcome(verdict: str, said: str = "") -> Outcome:
        return Outcome("kills", kind, number, verdict, said, time.monotonic() - began)

    for _ in range(chance.randint(1, MOST_KILLS)):
        pid = runs.start(arguments, log, real)
        wait_for_moment(chance, runs, pid, folder, moment, whole + START_SECONDS * real)
        send(pid, SIGNALS[how])
        code = runs.wait(pid)
        if wrong := wrong_end(how, code, log):
            return outcome(*wrong)
    code = runs.wait(runs.start(arguments, log))
    if wrong := wrong_end("", code, log):
        return outcome(*wrong)
    if code:
        return outcome(LEFT, f"the same command: exit {code}: {message_of(log.read_text(errors='replace'))}")
    film = lab.film(folder / "v.mkv")
    if any(film.get(fact) != plain[fact] for fact in ("frames", "digest", "sound_digest")):
        return outcome(DIFFERS, f"{film.get('frames')} frames for {plain['frames']}")
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "v.mkv")
    return outcome(LEFT, ", ".join(left)) if left else outcome(FINE)


def wait_for_moment(chance: random.Random, runs: Runs, pid: int, folder: Path, moment: str, whole: float) -> None:
    """Return when the process is to be ended."""
    if moment == "at any time":
        sleep_while_running(runs, pid, chance.uniform(0, whole))
    elif moment == "late":
        sleep_while_running(runs, pid, chance.uniform(0.8, 1.05) * whole)
    else:
        wanted = chance.choice((1, 2, 3, 4, 5, 8, 12))
        seen: set[Path] = set()
        deadline = time.monotonic() + whole
        while len(seen) < wanted and time.monotonic() < deadline and not runs.is_over(pid):
            seen.update(folder.rglob("*"))
            time.sleep(0.001)
        time.sleep(chance.choice((0, 0, chance.uniform(0, 0.02))))


def sleep_while_running(runs: Runs, pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not runs.is_over(pid):
        time.sleep(0.005)


def wrong_end(how: str, code: int | None, log: Path) -> tuple[str, str] | None:
    """What is wrong with how a process ended, and with what it said."""
    text = log.read_text(errors="replace")
    if code is None:
        return HANG, f"no end {HANG_SECONDS:.0f} s after {how or 'its start'}"
    if "Traceback" in text:
        return TRACEBACK, text[-3000:]
    if code == 2 and (problem := unreadable(message_of(text))):
        return WORDING, f"{problem}: {message_of(text)[:200]}"
    expected = {0, 2, *({"KILL": {-9}, "TERM": {-15, 143, ENDED_BY_USER}, "INT": {-2, ENDED_BY_USER}}.get(how, set()))}
    if code not in expected:
        return DIED, f"exit {code} after {how or 'its start'}: {text[-300:]}"
    return (LEFT, f"exit 2: {message_of(text)}") if code == 2 else None
