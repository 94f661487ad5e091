"""Part `settings`: every setting of the nodes, as the server lists them, with the embedded model at 512x512.

A new input or choice of a node is covered by itself: choices one by one, switches turned, numbers set to another value.
"""

import copy
import json
import queue
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from comfy_client import Prompt, Run
from comfy_server import ComfyServer, ServerFailed
from gpu import ELSEWHERE, OK, RED, ROOT, Ground, Report
from gpu_real import problem_with
from PIL import Image
from safetensors.torch import load_file

WORKERS = 4
CASE_SECONDS, CPU_SECONDS = 120, 900
SIZE, TINY_SIZE = 512, 64
VOICE, TEXT, CONDITIONING, SAMPLE, SAVE = "3", "4", "5", "6", "7"
"""Numbers of the demo's nodes."""
SPEED, MEMORY, PAIR, EXPERTS, NOISE, LATENT = "speed", "memory", "pair", "experts", "noise", "latent"
NODES = {
    "WanS2VEncodeAudio": VOICE,
    "WanS2VEncodeText": TEXT,
    "WanS2VConditioning": CONDITIONING,
    "WanS2VSample": SAMPLE,
    "WanS2VSpeed": SPEED,
    "WanS2VMemory": MEMORY,
    "WanS2VModelPair": PAIR,
    "WanS2VExperts": EXPERTS,
    "WanS2VNoise": NOISE,
    "WanS2VSaveVideo": SAVE,
}
BEFORE_THE_SAMPLER = ("WanS2VSpeed", "WanS2VMemory", "WanS2VModelPair", "WanS2VExperts", "WanS2VNoise")
"""Those that the demo does without."""
NUMBERS: dict[str, Any] = {
    "start_seconds": 0.5,
    "seconds": 1.5,
    "gain_db": -6.0,
    "width": 528,
    "height": 400,
    "max_clips": 1,
    "fps": 24.0,
    "clip_frames": 24,
    "steps": 3,
    "guidance_scale": 3.0,
    "shift": 5.0,
    "seed": 2**40 + 1,
    "audio_guidance_scale": 2.0,
    "moe_top_k": 2,
    "moe_expert_capacity": 256,
    "moe_gate_dropout": 0.1,
    "colour_match": 1.0,
    "leftover_gb": 1,
    "sparse_keep": 0.5,
    "sparse_dense_steps": 1,
    "sparse_dense_blocks": 2,
    "vram_limit_gb": 3.0,
    "resident_blocks": 1,
    "slice_tokens": 1024,
    "vae_tile": 256,
}
"""Another value for numbers; those that are not here take the end of their range, or what lies beside it."""
TOGETHER: dict[str, dict[str, Any]] = {
    "vram_limit_gb": {"profile": "custom"},
    "sparse_by": {"sparse_keep": 0.5},
    "sparse_dense_steps": {"sparse_keep": 0.5},
    "sparse_dense_blocks": {"sparse_keep": 0.5},
    "moe_overflow": {f"{SAMPLE}__moe_expert_capacity": 256},
    "noise_boundary": {"low_noise_model": ["1", 0]},
    "weights": {"resident_blocks": 1},
    "moe_gate_dropout": {"moe_top_k": 2},
}
"""What a setting needs beside it to do anything; of another node as node__input."""
NOT_ALONE = ("prompt", "negative_prompt", "filename_prefix", "seconds")
"""Texts; the length of the voice is that of the case."""
FLAGS = (
    ("--novram",),
    ("--lowvram",),
    ("--highvram",),
    ("--reserve-vram", "4"),
    ("--cache-none",),
    ("--disable-smart-memory",),
    ("--fast",),
    ("--force-fp16",),
)
UNKNOWN_FLAG = "unrecognized arguments"
NOT_USABLE = ("BackendUnavailable",)
"""Of our errors, those that say that something is not there."""


@dataclass(frozen=True)
class Case:
    """A prompt, and the server that it needs."""

    name: str
    change: Callable[["Bench"], Prompt] = lambda bench: bench.prompt()
    flags: tuple[str, ...] = ()
    check: Callable[["Bench", Run], dict[str, Any]] | None = None
    """Instead of looking at the video alone."""
    interrupt: Callable[[str, dict, Run], bool] | None = None
    """Cancel when it says so; the prompt then runs again to its end."""


class Bench:
    """A server with inputs in place, and prompts for it."""

    def __init__(self, ground: Ground, server: ComfyServer, files: Path):
        self.ground, self.server, self.client = ground, server, server.client
        self.schemas = server.client.object_info()
        for file in sorted(files.iterdir()):
            self.client.upload(file)

    def prompt(self, **changes: Any) -> Prompt:
        """The demo at 512x512 with two short clips. `node__input=value` sets inputs, `node=...` adds nodes."""
        prompt = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))
        side = TINY_SIZE if self.ground.is_tiny else SIZE
        prompt[VOICE]["inputs"]["seconds"] = 2.2
        prompt[CONDITIONING]["inputs"] |= {"width": side, "height": side, "clip_frames": 20}
        prompt[SAMPLE]["inputs"] |= {"steps": 2, "seed": next_seed()}
        prompt[LATENT] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [SAMPLE, 1], "filename_prefix": "latents/l"},
        }
        for kind in BEFORE_THE_SAMPLER:
            number = NODES[kind]
            if any(name.startswith(f"{number}__") for name in changes):
                self._insert(prompt, kind, number)
        for name, value in changes.items():
            number, _, key = name.partition("__")
            if key:
                prompt[number]["inputs"][key] = value
            else:
                prompt[number] = value
        return prompt

    def _insert(self, prompt: Prompt, kind: str, number: str) -> None:
        """Put a node of the model's line before the sampler, with its defaults."""
        required = self.schemas[kind]["input"]["required"]
        defaults = {name: default_of(entry) for name, entry in required.items() if has_widget(entry)}
        prompt[number] = {"class_type": kind, "inputs": {**defaults, "model": prompt[SAMPLE]["inputs"]["model"]}}
        prompt[SAMPLE]["inputs"]["model"] = [number, 0]

    def look(self, run: Run) -> dict[str, Any]:
        """Whether a run has made what it should: frames, sound, pictures that are none of black, finite latents."""
        if run.status != "success":
            return failure(run)
        if not (videos := self.server.videos(run)):
            return {"status": RED, "error": "no video"}
        if problem := problem_with(videos[-1]) or self._wrong_length(run, videos[-1]) or self._not_finite(run):
            return {"status": RED, "error": problem}
        return {}

    def _wrong_length(self, run: Run, path: Path) -> str:
        lines = [text for node, text in run.texts if node == CONDITIONING and " frames, " in text]
        if not lines:
            return ""
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
            streams = [stream.type for stream in container.streams]
        wanted = int(lines[-1].split(" frames")[0])
        if frames != wanted or "audio" not in streams:
            return f"{frames} of {wanted} frames, streams {streams}"
        return ""

    def _not_finite(self, run: Run) -> str:
        files = [file.path for file in self.server.output_files(run) if file.path.suffix == ".latent"]
        for file in files:
            if not all(bool(torch.isfinite(value.float()).all()) for value in load_file(file).values()):
                return f"{file.name} is not finite"
        return ""


SEEDS = iter(range(1, 10**9))
SEED_LOCK = threading.Lock()


def next_seed() -> int:
    with SEED_LOCK:
        return next(SEEDS)


def failure(run: Run) -> dict[str, Any]:
    """How a run ended that was no success; red unless it says in one line that something is not there."""
    said = " ".join(f"{one.get('exception_type')}: {one.get('exception_message')}" for one in run.errors)
    is_elsewhere = any(f".{name}" in str(one.get("exception_type")) for one in run.errors for name in NOT_USABLE)
    return {"status": ELSEWHERE if is_elsewhere else RED, "error": f"{run.status}: {said} {run.node_errors or ''}"}


# --- cases from the schema -----------------------------------------------------------------------------------------


def choices_of(entry: list) -> list | None:
    """Of a combo, in either form that ComfyUI lists it in."""
    if isinstance(entry[0], list):
        return entry[0]
    return entry[1].get("options") if entry[0] == "COMBO" else None


def has_widget(entry: list) -> bool:
    return choices_of(entry) is not None or entry[0] in ("INT", "FLOAT", "BOOLEAN", "STRING")


def default_of(entry: list) -> Any:
    options = entry[1] if len(entry) > 1 else {}
    return options["default"] if "default" in options else (choices_of(entry) or [None])[0]


def other_values(name: str, entry: list) -> list:
    """Values of an input that are not its default: all choices, the switch turned, one other number."""
    default, options = default_of(entry), entry[1] if len(entry) > 1 else {}
    if (choices := choices_of(entry)) is not None:
        return [choice for choice in choices if choice != default]
    if entry[0] == "BOOLEAN":
        return [not default]
    if name in NUMBERS:
        return [NUMBERS[name]]
    low, step = options.get("min", 0), options.get("step", 1)
    return [low if low != default else low + step]


def settings(schemas: dict[str, Any]) -> Iterator[Case]:
    """A case for every other value of every input of our nodes."""
    for kind, number in NODES.items():
        groups = schemas[kind]["input"]
        for name, entry in {**groups.get("required", {}), **groups.get("optional", {})}.items():
            if name in NOT_ALONE or not has_widget(entry):
                continue
            for value in other_values(name, entry):
                wanted = {name: value, **TOGETHER.get(name, {})}
                changes = {key if "__" in key else f"{number}__{key}": one for key, one in wanted.items()}
                if name in ("width", "height"):
                    changes[f"{number}__size_rule"] = "exact"
                yield Case(f"{kind[6:]} {name}={value}", lambda bench, changes=changes: bench.prompt(**changes))


def presets(schemas: dict[str, Any]) -> Iterator[Case]:
    """Whole presets, with their steps cut to what a test needs, and the one node with each of its choices."""
    links = {"guidance_scale": 1, "shift": 2, "solver": 3}
    for name in choices_of(schemas["WanS2VSamplingPreset"]["input"]["required"]["preset"]):
        node = {"class_type": "WanS2VSamplingPreset", "inputs": {"preset": name}}
        changes = {"preset": node, **{f"{SAMPLE}__{key}": ["preset", output] for key, output in links.items()}}
        yield Case(f"SamplingPreset {name}", lambda bench, changes=changes: bench.prompt(**changes))
    yield Case("TalkingVideo", one_node)


def one_node(bench: Bench) -> Prompt:
    prompt = json.loads((ROOT / "workflows" / "api" / "one_node.json").read_text(encoding="utf-8"))
    (node,) = [node for node in prompt.values() if node["class_type"] == "WanS2VTalkingVideo"]
    node["inputs"] |= {"checkpoint": "embedded demo", "picture": "rgba.png", "voice": "short.wav", "seed": next_seed()}
    return prompt


# --- kinds of input ------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> Path:
    """Sounds, pictures and a driving video of the kinds that people have."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, rate = np.random.default_rng(0), 48000
    times = np.arange(int(2.2 * rate)) / rate
    voice = 0.3 * chance.standard_normal(len(times)).clip(-3, 3) * (np.sin(2 * np.pi * 4 * times) > -0.3)
    write_wave(folder / "24_bit.wav", np.stack([voice, voice]), rate, 3)
    write_wave(folder / "short.wav", voice[None, : int(1.2 * rate)], rate, 2)
    write_surround(folder / "surround.m4a", voice.astype(np.float32), rate)
    pixels = chance.integers(0, 256, (96, 96, 4), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 600)).save(folder / "rgba.png")
    grey = np.linspace(0, 65535, 600 * 600, dtype=np.uint16).reshape(600, 600)
    Image.fromarray(grey).save(folder / "16_bit.png")
    with av.open(str(folder / "driving.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(60):
            frame = chance.integers(0, 256, (240, 320, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def write_wave(path: Path, samples: np.ndarray, rate: int, width: int) -> None:
    """C N in -1..1 as integers of so many bytes."""
    whole = (samples.T.clip(-1, 1) * (2 ** (8 * width - 1) - 1)).astype("<i4")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(whole)[..., None].view(np.uint8)[..., :width].tobytes())


def write_surround(path: Path, voice: np.ndarray, rate: int) -> None:
    """5.1 with the voice in its centre."""
    samples = np.zeros((6, len(voice)), np.float32)
    samples[2] = voice
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="5.1")
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="5.1")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def loader(kind: str, name: str, value: str) -> dict[str, Any]:
    return {"class_type": kind, "inputs": {name: value}}


def inputs() -> Iterator[Case]:
    for name in ("24_bit.wav", "surround.m4a"):
        changes = {"sound": loader("LoadAudio", "audio", name), f"{VOICE}__audio": ["sound", 0]}
        yield Case(f"sound {name}", lambda bench, changes=changes: bench.prompt(**changes))
    for name in ("rgba.png", "16_bit.png"):
        changes = {"face": loader("LoadImage", "image", name), f"{CONDITIONING}__picture": ["face", 0]}
        yield Case(f"picture {name}", lambda bench, changes=changes: bench.prompt(**changes))
    changes = {"pose": loader("LoadVideo", "file", "driving.mp4"), f"{CONDITIONING}__pose_video": ["pose", 0]}
    yield Case("driving video", lambda bench: bench.prompt(**changes))
    yield Case("a second model of low noise", lambda bench: bench.prompt(**{f"{PAIR}__low_noise_model": ["1", 0]}))
    yield Case("Decode, Create Video, Save Video", through_pictures)


def through_pictures(bench: Bench) -> Prompt:
    save = {"video": ["made", 0], "filename_prefix": "through", "format": "auto", "codec": "auto"}
    make = {"images": ["frames", 0], "audio": ["frames", 1], "fps": 16.0}
    prompt = bench.prompt(
        frames={"class_type": "WanS2VDecode", "inputs": {"clips": [SAMPLE, 0]}},
        made={"class_type": "CreateVideo", "inputs": make},
        saved={"class_type": "SaveVideo", "inputs": save},
    )
    del prompt[SAVE]
    return prompt


# --- previews, flags and cancels -----------------------------------------------------------------------------------


def previewed(bench: Bench, run: Run) -> dict[str, Any]:
    found = bench.look(run)
    if not found and not run.previews:
        return {"status": RED, "error": "no preview was shown"}
    return found or {"previews": len(run.previews)}


def previews() -> Iterator[Case]:
    for method in ("auto", "latent2rgb", "taesd"):
        yield Case(f"previews {method}", flags=("--preview-method", method), check=previewed)


def flags() -> Iterator[Case]:
    for these in FLAGS:
        yield Case(" ".join(these), flags=these)


def at_node(number: str) -> Callable[[str, dict, Run], bool]:
    return lambda kind, data, run: kind == "executing" and data.get("node") == number


def at_step(number: str, value: int) -> Callable[[str, dict, Run], bool]:
    return lambda kind, data, run: (run.step(number) or (0,))[0] >= value


def cancels() -> Iterator[Case]:
    """While each stage is at work: by the node that begins, or the bar of the sampler and of the saving."""

    def anew(bench: Bench, is_long_voice: bool) -> Prompt:
        """Nothing of it comes out of ComfyUI's cache."""
        number = next_seed()
        changes = {f"{VOICE}__start_seconds": number / 1000, f"{TEXT}__prompt": f"A person talks, take {number}."}
        changes |= {f"{VOICE}__seconds": 0.0, f"{CONDITIONING}__max_clips": 1} if is_long_voice else {}
        return bench.prompt(**changes, **{f"{SAMPLE}__steps": 4})

    for name, stop in {
        "the voice": at_node(VOICE),
        "the text": at_node(TEXT),
        "the conditioning": at_node(CONDITIONING),
        "the VAE encodes": at_node(SAMPLE),
        "a clip is sampled": at_step(SAMPLE, 2),
        "a clip is decoded": at_step(SAMPLE, 4),
        "the second clip": at_step(SAMPLE, 6),
        "the video is saved": at_step(SAVE, 8),
    }.items():
        is_long = name in ("the voice", "the text")
        yield Case(f"cancel: {name}", lambda bench, is_long=is_long: anew(bench, is_long), interrupt=stop)


# --- running them --------------------------------------------------------------------------------------------------


@dataclass
class Jobs:
    """Cases for some servers side by side, each with its own."""

    ground: Ground
    report: Report
    files: Path
    waiting: "queue.Queue[Case]" = field(default_factory=queue.Queue)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def seconds(self) -> float:
        """That a case may take."""
        return CPU_SECONDS if self.ground.on_cpu else CASE_SECONDS

    def work(self) -> None:
        """Take cases until there are none; one server serves those without flags."""
        plain: ComfyServer | None = None
        bench: Bench | None = None
        try:
            while True:
                try:
                    case = self.waiting.get_nowait()
                except queue.Empty:
                    return
                if not self.report.has_time:
                    self.add(case, 0, {"status": RED, "error": "left out: the time is over"})
                elif case.flags:
                    self.run_alone(case)
                else:
                    if plain is None or plain.process.poll() is not None:
                        plain = self.server().__enter__()
                        bench = Bench(self.ground, plain, self.files)
                    self.run(case, bench)
        finally:
            if plain is not None:
                plain.__exit__()

    def server(self, *arguments: str) -> ComfyServer:
        return ComfyServer(
            self.ground.comfyui, {"wan_s2v": ROOT}, arguments=(*self.ground.server_arguments, *arguments)
        )

    def run_alone(self, case: Case) -> None:
        began = time.monotonic()
        try:
            with self.server(*case.flags) as server:
                if "taesd" in case.flags:
                    add_tiny_decoder(server)
                self.run(case, Bench(self.ground, server, self.files))
        except ServerFailed as error:
            status = ELSEWHERE if UNKNOWN_FLAG in str(error) else RED
            self.add(case, time.monotonic() - began, {"status": status, "error": str(error)[-400:]})

    def run(self, case: Case, bench: Bench) -> None:
        began = time.monotonic()
        try:
            found = self.cancelled(case, bench) if case.interrupt else self.looked_at(case, bench)
        except Exception as error:  # one case never ends the others
            found = {"status": RED, "error": f"{type(error).__name__}: {error}"}
        self.add(case, time.monotonic() - began, found)

    def looked_at(self, case: Case, bench: Bench) -> dict[str, Any]:
        run = bench.client.run(case.change(bench), timeout=self.seconds)
        return (case.check or Bench.look)(bench, run)

    def cancelled(self, case: Case, bench: Bench) -> dict[str, Any]:
        """A run that is cancelled, and the same again, which is to come to its end."""
        prompt, asked = case.change(bench), []

        def stop(kind: str, data: dict, run: Run) -> None:
            if not asked and case.interrupt(kind, data, run):
                asked.append(time.monotonic())
                bench.client.interrupt(run.prompt_id)

        run = bench.client.run(copy.deepcopy(prompt), timeout=self.seconds, on_event=stop)
        took = time.monotonic() - asked[0] if asked else 0.0
        again = bench.look(bench.client.run(prompt, timeout=self.seconds))
        if again:
            return again | {"error": f"after a cancel: {again['error']}"}
        if not asked or run.status not in ("interrupted", "success") or took > 5:
            return {"status": RED, "error": f"cancelled: {run.status}, {took:.1f} s", "seconds_to_stop": took}
        return {"ended": run.status, "seconds_to_stop": round(took, 2)}

    def add(self, case: Case, seconds: float, found: dict[str, Any]) -> None:
        with self.lock:
            self.report.add(case.name, found.pop("status", OK), found.pop("seconds", seconds), **found)


def add_tiny_decoder(server: ComfyServer) -> None:
    folder = server.base / "models" / "vae_approx"
    folder.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, ROOT / "dev" / "tiny_preview_decoder.py", folder]
    subprocess.run(script, cwd=server.comfyui, check=True, capture_output=True)


def run(ground: Ground, report: Report) -> None:
    files = write_inputs(ground.work / "inputs")
    jobs = Jobs(ground, report, files)
    with jobs.server() as server:
        schemas = server.client.object_info()
    cases = [*flags(), *previews(), *settings(schemas), *presets(schemas), *inputs(), *cancels()]
    chosen = [case for case in cases if ground.wants(case.name)]
    for case in chosen:
        jobs.waiting.put(case)
    workers = [threading.Thread(target=jobs.work) for _ in range(1 if ground.is_tiny else WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if len(report.cases) != len(chosen):
        report.add("all cases", RED, report.seconds, f"{len(report.cases)} of {len(chosen)} cases told anything")
