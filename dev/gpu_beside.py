"""Part `beside`: a model of 10 GB of ComfyUI's own kind before and after ours in one graph.

Neither leaves the GPU while both fit; where they do not, nothing runs out of memory. Where this ComfyUI has dynamic
VRAM, with it and without.
"""

import json
import subprocess
import sys
from typing import Any

from comfy_client import Prompt
from gpu import ELSEWHERE, OK, RED, Ground, Report
from gpu_measure import SAMPLER, Measured, WatchedServer, watched_server
from gpu_real import SIZE_480, checkpoint, offer, outcome, prompt_of

CORE_GB = 10.0
SMALL_GB = 40
"""Of a GPU on which both do not fit."""
STEPS = 2
DYNAMIC, WITHOUT_DYNAMIC = "--enable-dynamic-vram", "--disable-dynamic-vram"
DYNAMIC_LINE = "DynamicVRAM support detected"
"""In the log, where the packages that it needs are there."""
MOST_CROSSING_GB = 1.0
"""Of weights that cross again though nothing had to leave: what is no weight, or is small."""


def run(ground: Ground, report: Report) -> None:
    folder = checkpoint(ground, report)
    known = help_of(ground)
    ways = [(flag,) for flag in (DYNAMIC, WITHOUT_DYNAMIC) if flag in known] or [()]
    for flags in ways:
        for size in (None, SMALL_GB):
            name = f"{f'GPU of {size} GB' if size else 'room for both'} {' '.join(flags)}".strip()
            try:
                with watched_server(ground, *flags, gigabytes=size, looks_small=True) as watched:
                    offer(watched, folder)
                    if DYNAMIC in flags and DYNAMIC_LINE not in watched.server.log(2000):
                        report.add(name, ELSEWHERE, 0, "the server says that it cannot: comfy-aimdo does not work here")
                        continue
                    report.run(name, lambda w=watched, s=size: turns(w, ground, fit=s is None))
            except Exception as error:  # the server did not start: the next one may
                report.add(name, RED, report.seconds, f"{type(error).__name__}: {error}")


def help_of(ground: Ground) -> str:
    """What ComfyUI's command line knows."""
    ask = [sys.executable, "main.py", "--help"]
    done = subprocess.run(ask, cwd=ground.comfyui, capture_output=True, text=True, timeout=120)
    return done.stdout


def between(ground: Ground, seed: int) -> Prompt:
    """Ours between two uses of the other model: its picture passes through the first, its frames through the second."""
    prompt = prompt_of(ground, SIZE_480, 1, steps=STEPS, seed=seed)
    (conditioning,) = [node for node in prompt.values() if node["class_type"] == "WanS2VConditioning"]
    (sampler,) = [number for number, node in prompt.items() if node["class_type"] == SAMPLER]
    gigabytes = 0.001 if ground.is_tiny else CORE_GB
    prompt["before"] = core_model(conditioning["inputs"]["picture"], gigabytes, f"before {seed}")
    conditioning["inputs"]["picture"] = ["before", 0]
    prompt["frames"] = {"class_type": "WanS2VDecode", "inputs": {"clips": [sampler, 0]}}
    prompt["after"] = core_model(["frames", 0], gigabytes, f"after {seed}")
    return prompt


def core_model(image: list, gigabytes: float, name: str) -> dict[str, Any]:
    return {"class_type": "GpuWatchCoreModel", "inputs": {"image": image, "gigabytes": gigabytes, "name": name}}


def core_facts(watched: WatchedServer) -> list[dict[str, Any]]:
    lines = (watched.server.output / "core_model.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def turns(watched: WatchedServer, ground: Ground, fit: bool) -> dict[str, Any]:
    """Two prompts one after the other, of which the second finds both models where they were."""
    first = watched.run(between(ground, 1))
    found = outcome(watched, first)
    if found["status"] != OK:
        return found
    second = watched.run(between(ground, 2))
    found = outcome(watched, second)
    uses = core_facts(watched)
    crossed = {use["name"]: crossed_within(first, second, use) for use in uses}
    all_crossed = second.crossed(0, second.begins[0] if second.begins else 0)["GB"]
    ours = round(all_crossed - crossed["before 2"]["GB"], 2)
    figures = {"core_seconds": {use["name"]: round(use["ended"] - use["began"], 2) for use in uses}}
    figures |= {"core_crossed": crossed, "ours_crossed_again_gb": ours, "first_run": first.figures()}
    again = [name for name, one in list(crossed.items())[1:] if one["GB"] > MOST_CROSSING_GB]
    if found["status"] == OK and fit and not ground.on_cpu and (again or ours > MOST_CROSSING_GB):
        found |= {"status": RED, "error": f"models left though both fit: {again or 'ours'}"}
    return found | figures


def crossed_within(first: Measured, second: Measured, use: dict[str, Any]) -> dict[str, float]:
    """Weights that crossed to the GPU while the other model was used."""
    run = second if use["began"] >= second.began_at else first
    return run.crossed(use["began"] - run.began_at, use["ended"] - run.began_at)
