"""Part `small`: the model of real size as if the GPU had 24, 12 and 8 GB: the process is capped, or the node asks."""

from typing import Any

from gpu import OK, RED, Ground, Report
from gpu_measure import WatchedServer, watched_server
from gpu_real import SAMPLER, SIZE_480, checkpoint, offer, outcome, prompt_of

SIZES_GB = (24, 12, 8)
STEPS = 2


def run(ground: Ground, report: Report) -> None:
    folder = checkpoint(ground, report)
    for size in SIZES_GB:
        try:
            with watched_server(ground, gigabytes=size) as watched:
                offer(watched, folder)
                report.run(f"capped to {size} GB, profile auto", lambda w=watched, s=size: below(w, ground, s, "auto"))
        except Exception as error:  # the server did not start: the next one may
            report.add(f"a server of {size} GB", RED, report.seconds, f"{type(error).__name__}: {error}")
    with watched_server(ground) as watched:
        offer(watched, folder)
        for size in SIZES_GB:
            watched.free()
            report.run(f"node Memory, {size} GB", lambda s=size: below(watched, ground, s, "custom"))


def below(watched: WatchedServer, ground: Ground, size: float, profile: str) -> dict[str, Any]:
    """A clip whose every stage must stay below so many GB, as the driver sees it."""
    prompt = prompt_of(ground, SIZE_480, 1, steps=STEPS, seed=round(size) + (profile == "auto"))
    given = {"profile": profile, "vram_limit_gb": float(size), "resident_blocks": -1, "slice_tokens": -1}
    (sampler,) = [node["inputs"] for node in prompt.values() if node["class_type"] == SAMPLER]
    given |= {"vae_tile": -1, "weights": "auto", "model": sampler["model"]}
    prompt["memory"], sampler["model"] = {"class_type": "WanS2VMemory", "inputs": given}, ["memory", 0]
    found = outcome(watched, watched.run(prompt))
    above = {stage: peak for stage, peak in found["gpu_gb_by_stage"].items() if peak > size}
    if found["status"] == OK and above:
        found |= {"status": RED, "error": f"above {size} GB: {above}"}
    return found
