"""Part `real`: a random checkpoint of real size through ComfyUI's API, as a person would run it, and what it takes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from comfy_client import Prompt
from gpu import OK, RED, ROOT, Ground, Report
from gpu_measure import GB, SAMPLER, Measured, WatchedServer, watched_server

NAME = "Wan2.2-S2V-14B"
BLOCKS, BLOCK_GB, OTHERS_GB, SPARE_GB = 40, 0.75, 14.5, 6.0
"""Of the DiT; what one block takes; the other networks and the DiT's ends; what else needs room."""
STEPS = 2
SIZE_480, SIZE_720 = {"width": 832, "height": 480}, {"width": 1280, "height": 704}
TINY_SIZE = {"width": 64, "height": 64}
FRAMES_PER_CLIP = 80


def checkpoint(ground: Ground, report: Report) -> Path:
    """The random checkpoint, made unless an earlier part has."""
    folder, began = ground.work / NAME, time.monotonic()
    blocks = BLOCKS if ground.is_tiny else ground.blocks or blocks_that_fit(ground)
    marker = folder / "made-from.json"
    if marker.is_file():
        made = json.loads(marker.read_text(encoding="utf-8"))
        if made["tiny"] == ground.is_tiny and (ground.is_tiny or made["blocks"] == blocks):
            return folder
    shutil.rmtree(folder, ignore_errors=True)
    maker = [sys.executable, ROOT / "dev" / "random_checkpoint.py", folder, "--blocks", str(blocks)]
    done = subprocess.run([*maker, *(["--tiny"] if ground.is_tiny else [])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no checkpoint could be made: {done.stderr[-1500:]}")
    note = "" if blocks == BLOCKS else f"a smaller DiT of {blocks} of {BLOCKS} blocks: there is no room for more"
    size = round(json.loads(marker.read_text(encoding="utf-8"))["bytes"] / GB, 2)
    report.add("checkpoint", OK, time.monotonic() - began, note, GB=size, blocks=blocks)
    return folder


def blocks_that_fit(ground: Ground) -> int:
    """As many blocks as disk, host memory and GPU have room for."""
    disk = shutil.disk_usage(ground.work).free / GB
    rooms = (disk, ground.facts["host_gb"], ground.facts["vram_gb"] + OTHERS_GB)
    return max(2, min(BLOCKS, int((min(rooms) - OTHERS_GB - SPARE_GB) / BLOCK_GB)))


def offer(watched: WatchedServer, folder: Path) -> None:
    """Put the checkpoint and inputs where the server finds them."""
    models = watched.server.base / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    (models / NAME).symlink_to(folder, target_is_directory=True)
    for name in ("voice.flac", "portrait.png"):
        watched.client.upload(ROOT / "assets" / name)


def prompt_of(
    ground: Ground, size: dict[str, int], clips: int, speed: dict[str, Any] | None = None, **sampling
) -> Prompt:
    """The workflow of the released model, with another size and as many clips; `sampling` are inputs of the sampler.

    Args:
        speed: inputs of Wan S2V Speed, which is left out without.
    """
    prompt = json.loads((ROOT / "workflows" / "api" / "talking_video.json").read_text(encoding="utf-8"))
    by_kind = {node["class_type"]: node["inputs"] for node in prompt.values()}
    frames = 20 if ground.is_tiny else FRAMES_PER_CLIP
    seconds = clips * frames / 16 - 0.25
    by_kind["WanS2VEncodeAudio"]["seconds"] = min(seconds, 14.0)
    conditioning = (TINY_SIZE if ground.is_tiny else size) | {
        "max_clips": clips,
        "clip_frames": frames,
        "size_rule": "exact",
    }
    by_kind["WanS2VConditioning"] |= conditioning
    by_kind[SAMPLER] |= {"steps": STEPS, "seed": 0, **sampling}
    by_kind["WanS2VSaveVideo"] |= {"format": "lossless-mkv"}
    if speed:
        usual = {"attention": "auto", "sparse_keep": 1.0, "sparse_by": "scores", "sparse_dense_steps": 0}
        usual |= {"sparse_dense_blocks": 1, "fused": True, "vae": "auto"}
        prompt["speed"] = {
            "class_type": "WanS2VSpeed",
            "inputs": {"model": by_kind[SAMPLER]["model"], **usual, **speed},
        }
        by_kind[SAMPLER]["model"] = ["speed", 0]
    return prompt


def pictures(path: Path) -> np.ndarray:
    """T H W 3."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def problem_with(path: Path) -> str:
    """What is wrong with a video, or nothing."""
    try:
        shown = pictures(path)
        with av.open(str(path)) as container:
            loudest = max((np.abs(frame.to_ndarray()).max() for frame in container.decode(audio=0)), default=0)
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        return f"the video cannot be read ({error})"
    if shown.std() < 2 or shown.mean() < 2:
        return f"the video is black or plain (mean {shown.mean():.1f}, deviation {shown.std():.1f})"
    return "" if loudest > 0 else "the video is silent"


def outcome(watched: WatchedServer, measured: Measured, wanted: str = "success") -> dict[str, Any]:
    """Status, error and figures of a run, with its video looked at."""
    run, error = measured.run, ""
    if run.status != wanted:
        said = [f"{one.get('exception_type')}: {one.get('exception_message')}" for one in run.errors]
        error = f"{run.status}: {' '.join(said)} {run.node_errors or ''}"
    elif wanted == "success":
        videos = watched.server.videos(run)
        error = problem_with(videos[-1]) if videos else "no video"
    return {"status": RED if error else OK, "error": error, **measured.figures()}


def between_clips(measured: Measured, steps: int) -> dict[str, float] | None:
    """Weights that crossed to the GPU between the last step of the first clip and the first one of the second."""
    ends = [at for at, value in measured.steps if value == steps]
    begins = [at for at in measured.begins[1:] if ends and at > ends[0]]
    return measured.crossed(ends[0], begins[0]) if begins else None


def run(ground: Ground, report: Report) -> None:
    folder = checkpoint(ground, report)
    with watched_server(ground) as watched:
        offer(watched, folder)
        undisturbed(ground, report, watched)
        report.run("1280x704, float8, 8-bit attention, half of it", lambda: float8(ground, watched))
        report.run(
            "832x480, float16",
            lambda: outcome(watched, watched.run(prompt_of(ground, SIZE_480, 1, precision="float16", seed=5))),
        )


def undisturbed(ground: Ground, report: Report, watched: WatchedServer) -> None:
    """Two clips in one go; the same cancelled in the second and gone on with: one film, frame for frame."""
    films: dict[str, Path] = {}
    prompt = prompt_of(ground, SIZE_480, 2)

    def keep(name: str, measured: Measured) -> None:
        if videos := watched.server.videos(measured.run):
            films[name] = Path(shutil.copy(videos[-1], ground.work / f"{name}.mkv"))

    def first() -> dict[str, Any]:
        measured = watched.run(prompt)
        keep("undisturbed", measured)
        return outcome(watched, measured) | {"weights_crossed_between_clips": between_clips(measured, STEPS)}

    def again() -> dict[str, Any]:
        return outcome(watched, watched.run(prompt_of(ground, SIZE_480, 1, seed=9)))

    def other_seed() -> dict[str, Any]:
        measured = watched.run(prompt_of(ground, SIZE_480, 2, seed=1), interrupt_at=2)
        return outcome(watched, measured, "interrupted")

    def cancelled() -> dict[str, Any]:
        watched.free()
        measured = watched.run(prompt, interrupt_at=STEPS + 1)
        found = outcome(watched, measured, "interrupted")
        if measured.steps and measured.steps[-1][1] >= 2 * STEPS:
            found |= {"status": RED, "error": "it went on to the end of the clip"}
        return found

    def resumed() -> dict[str, Any]:
        measured = watched.run(prompt)
        keep("resumed", measured)
        found = outcome(watched, measured)
        if found["status"] == OK:
            before, after = (pictures(films[name]) for name in ("undisturbed", "resumed"))
            is_same = before.shape == after.shape and np.array_equal(before, after)
            started = measured.steps[0][1] if measured.steps else 0
            found["frames"] = len(after)
            if not is_same or started <= STEPS:
                found |= {"status": RED, "error": f"not the undisturbed film (it began at step {started})"}
        return found

    report.run("832x480, two clips, first run", first)
    report.run("832x480, one clip, everything at hand", again)
    report.run("another seed, cancelled in its first clip", other_seed)
    report.run("the first seed again, cancelled in the second clip", cancelled)
    report.run("gone on with, equal to the undisturbed film", resumed)


def float8(ground: Ground, watched: WatchedServer) -> dict[str, Any]:
    precision = "auto" if ground.on_cpu else "float8"
    speed = {"attention": "auto8", "sparse_keep": 0.5}
    return outcome(watched, watched.run(prompt_of(ground, SIZE_720, 1, speed, precision=precision, seed=3)))
