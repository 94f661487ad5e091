"""A real ComfyUI with the pack, small input files and the tiny checkpoint, for prompts and for kills."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .lab import ROOT, THREADS, Lab

sys.path.append(str(ROOT / "dev"))

from comfy_client import Run
from comfy_server import ComfyServer

DENSE = "Dense (folder)"
VOICE, FACE, POSE = "voice.wav", "face.png", "pose.mp4"
SMALL = {
    "width": 64,
    "height": 64,
    "size_rule": "exact",
    "clip_frames": 20,
    "steps": 1,
    "guidance_scale": 1.0,
    "audio_guidance_scale": 0.0,
    "seconds": 0.6,
    "start_seconds": 0.0,
    "max_clips": 0,
    "size": "demo (256x256)",
    "preset": "quick look",
}
WITHOUT_EXPERTS = {"moe_top_k": 0, "moe_expert_capacity": 0, "moe_gate_dropout": 0.0, "moe_overflow": "spill"}
FILES = {"LoadAudio": {"audio": VOICE}, "LoadImage": {"image": FACE}, "LoadVideo": {"file": POSE}}
WORKFLOWS = ("demo", "all_options", "pose_driven", "talking_video", "one_node", "speed")
Prompt = dict[str, dict[str, Any]]


def comfyui() -> Path:
    """Of COMFYUI_PATH, or what dev/run.py sets up."""
    return Path(os.environ.get("COMFYUI_PATH") or ROOT / ".venv" / "comfyui")


@contextmanager
def comfy_server(lab: Lab) -> Iterator[ComfyServer]:
    """A running server whose menus have the tiny checkpoint, and whose input folder has a voice, a face and a film."""
    packs = {"wan_s2v": ROOT, "attack_values.py": Path(__file__).with_name("value_pack.py")}
    server = ComfyServer(comfyui(), packs, environment=THREADS)
    try:
        shutil.copytree(lab.checkpoint, server.base / "models" / "diffusion_models" / "Dense")
        write_inputs(server.base / "input")
        server.start()
        yield server
    finally:
        server.__exit__()


def write_inputs(folder: Path) -> None:
    from . import films, sounds, stills

    sounds.plain_wav(folder / VOICE, sounds.tone(440, 16000, 2.4))
    stills.image().save(folder / FACE)
    films.encode(folder / POSE, films.still(), "libx264", "yuv420p")


def base_prompt(name: str, seed: int) -> Prompt:
    """One of the pack's workflows, shrunk, with the tiny checkpoint and our files."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "WanS2VSamplingPreset":
            continue
        inputs.update(
            {name: value for name, value in SMALL.items() if name in inputs and not isinstance(inputs[name], list)}
        )
        inputs.update(FILES.get(node["class_type"], {}))
        if node["class_type"].startswith("WanS2VLoad"):
            inputs.update({name: DENSE for name in inputs if name in ("checkpoint", "name")})
        if node["class_type"] == "WanS2VTalkingVideo":
            inputs.update(checkpoint=DENSE, picture=FACE, voice=VOICE)
        if "seed" in inputs:
            inputs["seed"] = seed
        inputs.update({name: value for name, value in WITHOUT_EXPERTS.items() if name in inputs})
    return quick(prompt)


def quick(prompt: Prompt) -> Prompt:
    """With steps and guidance of our own, where a node of presets gave them."""
    prompt = copy.deepcopy(prompt)
    presets = [number for number, node in prompt.items() if node["class_type"] == "WanS2VSamplingPreset"]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value and value[0] in presets and name in SMALL:
                node["inputs"][name] = SMALL[name]
    return prompt


def inputs_of(schemas: dict[str, Any], kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> type and options of a node's inputs."""
    schema = schemas[kind]
    return {
        name: (entry[0], entry[1] if len(entry) > 1 else {})
        for group, names in schema["input"].items()
        if group != "hidden"
        for name, entry in names.items()
    }


def film_of(lab: Lab, server: ComfyServer, run: Run) -> dict[str, Any]:
    """Facts about the video that a run has saved last; nothing if there is none."""
    videos = server.videos(run)
    return lab.film(videos[-1]) if videos else {}
