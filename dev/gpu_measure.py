"""A ComfyUI with the pack, watched while it runs: seconds by node and stage, memory, weights that cross to the GPU."""

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_client import Prompt, Run
from comfy_server import ComfyServer
from gpu import ROOT, Ground

STAGES = {
    "WanS2VEncodeAudio": "voice",
    "WanS2VEncodeText": "text",
    "WanS2VSaveVideo": "saving",
    "GpuWatchCoreModel": "core model",
}
SAMPLER = "WanS2VSample"
BEGINS = "denoising begins"
"""In the line of the log that the pipeline writes when a clip's network is in place."""
GB = 1e9


class Samples(threading.Thread):
    """GPU memory in use as the driver says, and anonymous memory of a process, over time."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.ended = pid, threading.Event()
        self.gpu: list[tuple[float, float]] = []
        self.anonymous: list[tuple[float, float]] = []
        self.driver: subprocess.Popen | None = None
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
            self.driver = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read_driver, daemon=True).start()

    def _read_driver(self) -> None:
        for line in self.driver.stdout:
            with contextlib.suppress(ValueError):
                self.gpu.append((time.monotonic(), float(line) * (1 << 20) / GB))

    def run(self) -> None:
        while not self.ended.wait(0.1):
            with contextlib.suppress(OSError, TypeError):
                status = Path(f"/proc/{self.pid}/status").read_text()
                size = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / GB
                self.anonymous.append((time.monotonic(), size))

    def stop(self) -> None:
        self.ended.set()
        if self.driver is not None:
            self.driver.terminate()
            self.driver.wait()


def most(samples: list[tuple[float, float]], begin: float, end: float) -> float | None:
    """The largest value between two times; that at its beginning where there is none."""
    inside = [value for at, value in samples if begin <= at <= end + 0.15]
    before = [value for at, value in samples if at < begin]
    return round(max(inside), 2) if inside else (before[-1] if before else None)


class LogTail(threading.Thread):
    """Lines of the server's log, with the time at which each was there."""

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self.path, self.ended = path, threading.Event()
        self.lines: list[tuple[float, str]] = []

    def run(self) -> None:
        with self.path.open("rb") as file:
            file.seek(0, 2)
            rest = b""
            while not self.ended.wait(0.01):
                *whole, rest = (rest + file.read()).split(b"\n")
                self.lines += [(time.monotonic(), line.decode(errors="replace")) for line in whole]


@dataclass
class Measured:
    """A run and what was seen meanwhile. Times are in seconds after it was queued."""

    run: Run
    began: float
    began_at: float
    """The same as seconds since 1970."""
    steps: list[tuple[float, float]] = field(default_factory=list)
    """(time, value) of the sampler's progress bar."""
    begins: list[float] = field(default_factory=list)
    """When the denoising of each clip began."""
    stages: dict[str, float] = field(default_factory=dict)
    """Most GPU memory in each, in GB."""
    anonymous_gb: float | None = None
    anonymous_after_gb: float | None = None
    gpu_gb: float | None = None
    crossings: list[tuple[float, float]] = field(default_factory=list)
    """(time, GB) of weights."""

    def crossed(self, begin: float, end: float) -> dict[str, float]:
        sizes = [size for at, size in self.crossings if begin <= at < end]
        return {"tensors": len(sizes), "GB": round(sum(sizes), 2)}

    @property
    def seconds_per_step(self) -> float | None:
        """Within clips, the first step of each left out."""
        gaps = [b[0] - a[0] for a, b in zip(self.steps, self.steps[1:], strict=False) if not self._begins_between(a, b)]
        return round(min(gaps), 2) if gaps else None

    def _begins_between(self, a: tuple[float, float], b: tuple[float, float]) -> bool:
        return any(a[0] < begin < b[0] for begin in self.begins)

    def nodes(self) -> dict[str, float]:
        """Seconds by node."""
        starts = sorted(self.run.started.items(), key=lambda entry: entry[1])
        ends = [start for _, start in starts[1:]] + [self.run.seconds]
        kinds = (self.run.prompt.get(node, {}).get("class_type", node) for node, _ in starts)
        return {kind: round(end - start, 2) for kind, (_, start), end in zip(kinds, starts, ends, strict=True)}

    def figures(self) -> dict[str, Any]:
        first = self.steps[0][0] if self.steps else None
        return {
            "seconds": round(self.run.seconds, 2),
            "nodes": self.nodes(),
            "first_step_begins": round(self.begins[0], 2) if self.begins else None,
            "first_step_ends": first and round(first, 2),
            "seconds_per_step": self.seconds_per_step,
            "gpu_gb": self.gpu_gb,
            "gpu_gb_by_stage": self.stages,
            "anonymous_gb": self.anonymous_gb,
            "anonymous_after_gb": self.anonymous_after_gb,
            "weights_crossed": self.crossed(0, float("inf")),
        }


class WatchedServer:
    """A server that is measured while it runs prompts."""

    def __init__(self, server: ComfyServer):
        self.server, self.client = server, server.client
        self.samples = Samples(server.process.pid)
        self.samples.start()

    def stop(self) -> None:
        self.samples.stop()

    def run(self, prompt: Prompt, timeout: float = 500, interrupt_at: float | None = None) -> Measured:
        """Run a prompt to its end.

        Args:
            interrupt_at: cancel when the sampler's bar stands there.
        """
        sampler = next((number for number, node in prompt.items() if node["class_type"] == SAMPLER), None)
        tail = LogTail(self.server.base / "server.log")
        tail.start()
        began, began_at, steps = time.monotonic(), time.time(), []

        def look(_: str, __: dict, run: Run) -> None:
            value = (run.step(sampler) or (0,))[0]
            if value and (not steps or steps[-1][1] != value):
                steps.append((time.monotonic() - began, value))

        run = self.client.run(prompt, timeout, look, interrupt_at)
        ended = time.monotonic()
        time.sleep(0.3)
        tail.ended.set()
        begins = [at - began for at, line in tail.lines if BEGINS in line]
        measured = Measured(run, began, began_at, steps, begins)
        measured.gpu_gb = most(self.samples.gpu, began, ended)
        measured.anonymous_gb = most(self.samples.anonymous, began, ended)
        measured.anonymous_after_gb = self._anonymous_gb()
        marks = stage_marks(run, measured)
        for (name, start), (_, end) in zip(marks, [*marks[1:], ("", run.seconds)], strict=True):
            if (found := most(self.samples.gpu, began + start, began + end)) is not None:
                measured.stages[name] = max(found, measured.stages.get(name, 0))
        measured.crossings = self._crossings(began_at, time.time())
        return measured

    def _anonymous_gb(self) -> float | None:
        """Of the server now, with what the kernel keeps count of by mapping."""
        try:
            rollup = Path(f"/proc/{self.server.process.pid}/smaps_rollup").read_text()
        except OSError:
            return None
        found = re.search(r"Anonymous:\s+(\d+) kB", rollup)
        return round(int(found[1]) * 1024 / GB, 2) if found else None

    def _crossings(self, begin: float, end: float) -> list[tuple[float, float]]:
        path = self.server.output / "gpu_watch.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [(event["at"] - begin, event["bytes"] / GB) for event in events if begin <= event["at"] <= end]

    def free(self) -> None:
        """What ComfyUI's buttons do: networks leave, and cached results are forgotten."""
        self.client.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)


def stage_marks(run: Run, measured: Measured) -> list[tuple[str, float]]:
    """(name, time) at which each stage began; the sampler's are told by what it says."""
    marks = []
    per_clip = None
    for node, start in run.started.items():
        kind = run.prompt.get(node, {}).get("class_type", node)
        marks.append(("VAE encode" if kind == SAMPLER else STAGES.get(kind, "others"), start))
        if kind == SAMPLER:
            per_clip = run.prompt[node]["inputs"].get("steps")
    marks += [("sampling", at) for at in measured.begins]
    marks += [("VAE decode", at) for at, value in measured.steps if per_clip and value % per_clip == 0]
    return sorted(marks, key=lambda mark: mark[1])


@contextlib.contextmanager
def watched_server(
    ground: Ground, *arguments: str, gigabytes: float | None = None, looks_small: bool = False
) -> Iterator[WatchedServer]:
    """A server with the pack, the watching nodes and the checkpoint of the ground.

    Args:
        gigabytes: what the server may take of the GPU.
        looks_small: whether the GPU seems to have no more, to all in the server.
    """
    packs = {"wan_s2v": ROOT, "gpu_watch.py": ROOT / "dev" / "gpu_watch.py"}
    variables = {"GPU_GB": str(gigabytes), "GPU_LOOKS_SMALL": "1" if looks_small else ""} if gigabytes else {}
    options = {"arguments": (*ground.server_arguments, *arguments), "environment": variables}
    with ComfyServer(ground.comfyui, packs, **options) as server:
        watched = WatchedServer(server)
        try:
            yield watched
        finally:
            watched.stop()
            (ground.out / "server.log").write_text(server.log(2000), encoding="utf-8")
