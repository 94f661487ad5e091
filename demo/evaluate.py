"""Judge the embedded model: faces and voices that it never met, and what each setting does to them.

    python demo/evaluate.py clips --out FOLDER        # 24 videos of 10 s or more, and one of 30 s; see KINDS
    python demo/evaluate.py knobs --out FOLDER        # every setting in turn, on videos of one clip
    python demo/evaluate.py split --out FOLDER --checkpoint DENSE --split SPLIT    # what research split makes of it
    python demo/evaluate.py show --out FOLDER         # tables and plots from what they wrote; needs matplotlib

Videos are made by `render` and judged by `quality`, as from the command line; many run side by side. Needs
voices_heldout.npz (voices.py).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import wave
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from scene_feed import FPS, HELD_OUT_SEED, SPEECH_HZ  # noqa: E402

from wan_s2v_core.config import DEMO, PRESETS  # noqa: E402

FIRST_SEED = HELD_OUT_SEED + 1000
"""Of the faces; the trainers judge with others."""
CLIPS, CLIP_SECONDS = 24, 10.0
LONG_SECONDS = 30.0
KNOB_SCENES, KNOB_SECONDS = 6, 4.8
SIDE_PX = 256
DEMO_SETTINGS = {name: getattr(PRESETS[DEMO], name) for name in ("steps", "guidance_scale")}
PLAIN = {"steps": 12, "guidance_scale": 2.0}
"""What each setting is varied from, but for splits; the rest are the defaults."""
Knobs = dict[str, list[dict[str, Any]]]
KNOBS: Knobs = {
    "top_k": [{"top_k": k} for k in (8, 7, 6, 5, 4, 3, 2, 1)],
    "expert_capacity, drop": [
        {"expert_capacity": tokens, "overflow": "drop"} for tokens in (6000, 4500, 4000, 3500, 3000, 2500, 2000, 1000)
    ],
    "gate_dropout": [{"gate_dropout": p, "gate_dropout_seed": 0} for p in (0.02, 0.05, 0.1, 0.2, 0.3)],
    "steps": [{"steps": n} for n in (4, 6, 8, 12, 20, 30, 50)],
    "guidance_scale": [{"guidance_scale": g} for g in (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0)],
    "solver": [{"solver": s, "steps": n} for s in ("unipc", "dpm++") for n in (6, 12)],
    "shift": [{"shift": s} for s in (1.0, 2.0, 3.0, 5.0, 8.0)],
}
SPLITS: Knobs = {"split": [{"is_split": True, "top_k": k} for k in (8, 7, 6, 5, 4, 2)]}
ROUTING = ("top_k", "expert_capacity", "overflow", "gate_dropout", "gate_dropout_seed")
EQUAL_DB = 100
SILENT = ("overflow", "gate_dropout_seed")
"""Settings that the plots need not name."""
MEASURES = ("lip_sync_correlation", "lip_sync_lag_ms", "identity_drift", "seam_jump", "flicker", "psnr", "ssim")


MADE, DRAWN, CODED = "made", "drawn", "coded"
KINDS = {
    MADE: "by the model",
    DRAWN: "the drawing itself, as if a perfect model had made it",
    CODED: "the drawing behind the VAE: all that the DiT can learn, and so the bound for drift and seams",
}
BOUNDED = ("identity_drift", "seam_jump")


@dataclass(frozen=True)
class Task:
    """One video to make and to judge."""

    name: str
    scene: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: DEMO_SETTINGS)
    """What `settings` are changes of."""
    against: str | None = None
    """Name of the setting whose video of the same scene it is compared with."""
    kind: str = MADE


@dataclass(frozen=True)
class Place:
    folder: Path
    checkpoint: Path
    voices: Path
    device: str
    split: Path | None = None

    def file(self, task: Task, suffix: str) -> Path:
        return self.folder / f"{task.name}_{task.scene:02d}{suffix}"

    def voice(self, scene: int, seconds: float) -> Path:
        return self.folder / f"voice_{scene:02d}_{seconds:.0f}s.wav"


def held_out_voice(voices: list[np.ndarray], scene: int, seconds: float) -> np.ndarray:
    """The recording of a scene, followed by the next ones until it is long enough; at least `seconds`, or 30 cut."""
    longest = round(seconds * SPEECH_HZ)
    if seconds == CLIP_SECONDS:  # whole recordings, 10 to 12 s
        return np.asarray(voices[scene % len(voices)], np.float32)
    joined, following = np.zeros(0, np.float32), scene
    while len(joined) < longest:
        joined = np.concatenate([joined, np.asarray(voices[following % len(voices)], np.float32)])
        following += 1
    return joined[:longest]


def write_voice(path: Path, samples: np.ndarray) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    with wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SPEECH_HZ)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    part.replace(path)


def run(task: Task, place: Place) -> dict[str, Any]:
    """Make a video and judge it; what went wrong instead of figures where something did."""
    try:
        return {"name": task.name, "scene": task.scene, **task.settings, **make(task, place)}
    except Exception:
        return {"name": task.name, "scene": task.scene, "error": traceback.format_exc()}


def make(task: Task, place: Place) -> dict[str, Any]:
    import torch
    from PIL import Image
    from scenes import draw_scene, make_scene
    from voices import load_voices

    from wan_s2v_core.bench.quality import QualityRequest, measure

    torch.set_num_threads(1)
    voices = load_voices(place.voices)
    samples = held_out_voice(voices, task.scene, task.seconds)
    voice, other = place.voice(task.scene, task.seconds), place.voice(task.scene + 1, task.seconds)
    for path, number in ((voice, task.scene), (other, task.scene + 1)):
        if not path.exists():
            write_voice(path, held_out_voice(voices, number, task.seconds))
    frames = int(np.ceil(len(samples) / SPEECH_HZ * FPS))
    scene = make_scene(FIRST_SEED + task.scene, samples, frames, 0, FPS)
    video = place.file(task, ".mp4")
    began = time.monotonic()
    if task.kind != MADE:
        pixels = draw_scene(scene, SIDE_PX)
        write_drawing(video, pixels if task.kind == DRAWN else coded(pixels, place), voice)
    else:
        picture = place.file(task, ".png")
        first = make_scene(FIRST_SEED + task.scene, samples[:0], 1, 0, FPS)  # with its mouth closed
        Image.fromarray(draw_scene(first, SIDE_PX)[0]).save(picture)
        generate(task, place, voice, picture, scene.prompt)
    seconds = time.monotonic() - began
    against = place.folder / f"{task.against}_{task.scene:02d}.mp4" if task.against else None
    found = measure(QualityRequest(video, voice, against))
    swapped = measure(QualityRequest(video, other)).values["lip_sync_correlation"]
    return {
        "prompt": scene.prompt,
        "seconds": round(seconds, 2),
        **{name: found.values.get(name) for name in MEASURES},
        "swapped_correlation": swapped,
        "reasons": found.reasons,
    }


def write_drawing(path: Path, pixels: np.ndarray, voice: Path) -> None:
    """With the borders of the clips that the model would have made of it."""
    import torch

    from wan_s2v_core.config import VideoConfig
    from wan_s2v_core.io.audio import read_recording
    from wan_s2v_core.io.video import VideoWriter

    tags = {"comment": json.dumps({"video": asdict(VideoConfig())})}
    with VideoWriter(path, SIDE_PX, SIDE_PX, FPS, read_recording(voice), metadata=tags) as writer:
        writer.write(torch.from_numpy(np.array(pixels)))


def coded(pixels: np.ndarray, place: Place) -> np.ndarray:
    """T H W 3 -> what the VAE makes of it; borders of latent frames lie as in a video that the model makes."""
    import torch
    from training import to_bytes, to_video

    from wan_s2v_core.acceleration.convolution import flatten_convolutions
    from wan_s2v_core.model.checkpoint import VAE
    from wan_s2v_core.model.loading import load

    vae = load(place.checkpoint, VAE, torch.float32, place.device)
    if place.device == "cpu":
        flatten_convolutions(vae)
    missing = -(len(pixels) - 1) % 4
    video = to_video(np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]), place.device)
    with torch.no_grad():
        return to_bytes(vae.decode(vae.encode(video))[0]).numpy()[: len(pixels)]


def generate(task: Task, place: Place, voice: Path, picture: Path, prompt: str) -> None:
    from wan_s2v_core.config import ExpertRouting, SamplingConfig, VideoConfig
    from wan_s2v_core.render import RenderRequest, render

    settings = {**task.base, **task.settings}
    checkpoint = place.split if settings.pop("is_split", False) else place.checkpoint
    routing = ExpertRouting(**{name: settings.pop(name) for name in ROUTING if name in settings})
    target = place.file(task, ".mp4")
    request = RenderRequest(
        checkpoint=str(checkpoint),
        audio=str(voice),
        image=str(picture),
        save_file=str(target),
        prompt=prompt,
        device=place.device,
    )
    sampling = SamplingConfig(seed=task.scene, **settings)
    render(request, VideoConfig(max_area=SIDE_PX * SIDE_PX), sampling, routing=routing)


def clip_tasks(options: argparse.Namespace) -> list[Task]:
    """The long ones first, as they take longest."""
    tasks = []
    for kind in options.kinds:
        settings = options.settings if kind == MADE else {}
        tasks.append(Task(f"long_{kind}", 0, LONG_SECONDS, settings, kind=kind))
        tasks += [Task(kind, scene, CLIP_SECONDS, settings, kind=kind) for scene in range(options.count)]
    return sorted(tasks, key=lambda task: -task.seconds)


def knob_tasks(scenes: int, knobs: Knobs, base: dict[str, Any]) -> tuple[list[Task], list[Task]]:
    """The plain ones, then those that are compared with them."""
    plain = [Task("plain", scene, KNOB_SECONDS, {}, base) for scene in range(scenes)]
    varied = [
        Task(f"{knob}_{number}".replace(", ", "_"), scene, KNOB_SECONDS, settings, base, "plain")
        for knob, all_settings in knobs.items()
        for number, settings in enumerate(all_settings)
        for scene in range(scenes)
    ]
    return plain, sorted(varied, key=lambda task: -task.settings.get("steps", 0))


def run_all(tasks: list[Task], place: Place, workers: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(tasks))), context) as pool:
        return list(pool.map(run, tasks, [place] * len(tasks)))


def sheet(path: Path, videos: list[Path], columns: int = 10) -> None:
    """Frames of each video in a row, evenly over its length."""
    from training import contact_sheet, spread

    from wan_s2v_core.io.video import frames_of

    rows = []
    for video in videos:
        frames = [picture for picture, _ in frames_of(video)]
        rows.append([np.asarray(frames[i])[::2, ::2] for i in spread(len(frames), columns)])
    contact_sheet(rows, path)


def median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the scenes; of swapped voices and lags, those of the magnitudes."""
    names = (*MEASURES, "swapped_correlation", "seconds")
    magnitudes = ("lip_sync_lag_ms", "swapped_correlation")
    fine = [result for result in results if "error" not in result]
    found = {}
    for name in names:
        values = [result[name] for result in fine]
        if name in magnitudes:
            values = [None if value is None else abs(value) for value in values]
        found[name] = median(values)
    correlations = [result["lip_sync_correlation"] for result in fine if result["lip_sync_correlation"] is not None]
    return {
        "videos": len(fine),
        "failed": len(results) - len(fine),
        "least_correlation": min(correlations, default=None),
        **found,
    }


def judge_clips(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Kinds that an earlier call has judged in the same folder stay."""
    file = options.out / "clips.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    groups, settings = before.get("results", {}), before.get("settings")
    if MADE in options.kinds:
        settings = {**DEMO_SETTINGS, **options.settings}
    results = run_all(clip_tasks(options), place, options.workers)
    groups |= {name: [r for r in results if r["name"] == name] for name in dict.fromkeys(r["name"] for r in results)}
    for kind in options.kinds:
        sheet(options.out / f"{kind}.png", [place.folder / f"{kind}_{n:02d}.mp4" for n in range(min(8, options.count))])
        sheet(options.out / f"long_{kind}.png", [place.folder / f"long_{kind}_00.mp4"], 12)
    return {
        "settings": settings,
        "summary": {name: summary(found) for name, found in groups.items()},
        "bounds": bounds([*groups.get(CODED, []), *groups.get(f"long_{CODED}", [])]),
        "results": groups,
    }


def bounds(coded_drawings: list[dict[str, Any]]) -> dict[str, float | None]:
    """The largest of each that a drawing has behind the VAE."""
    fine = [result for result in coded_drawings if "error" not in result]
    return {name: max((r[name] for r in fine if r[name] is not None), default=None) for name in BOUNDED}


def judge_knobs(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    all_knobs, base = (SPLITS, DEMO_SETTINGS) if options.what == "split" else (KNOBS, PLAIN)
    plain, varied = knob_tasks(options.scenes, all_knobs, base)
    found = {"plain": run_all(plain, place, options.workers)}
    for result in run_all(varied, place, options.workers):
        found.setdefault(result["name"], []).append(result)
    knobs = {
        knob: [
            {**settings, **summary(found[f"{knob}_{number}".replace(", ", "_")])}
            for number, settings in enumerate(all_settings)
        ]
        for knob, all_settings in all_knobs.items()
    }
    failed = [result for results in found.values() for result in results if "error" in result]
    return {"plain": {**base, **summary(found["plain"])}, "knobs": knobs, "failed": failed}


def table(path: Path) -> str:
    """What judge_clips or judge_knobs wrote, as Markdown."""
    found = json.loads(path.read_text(encoding="utf-8"))
    columns = (
        "lip_sync_correlation",
        "lip_sync_lag_ms",
        "swapped_correlation",
        "identity_drift",
        "seam_jump",
        "flicker",
    )
    if "summary" in found:
        rows = {name: group for name, group in found["summary"].items()}
        columns = ("videos", "least_correlation", *columns, "seconds")
        return markdown("videos", columns, rows)
    columns = (*columns, "psnr", "ssim", "seconds")
    parts = [markdown("plain", columns, {described(found["plain"], [PLAIN]): found["plain"]})]
    for knob, values in found["knobs"].items():
        parts.append(markdown(knob, columns, {described(value, {**KNOBS, **SPLITS}[knob]): value for value in values}))
    return "\n".join(parts)


def described(value: dict[str, Any], known: list[dict[str, Any]] | None = None) -> str:
    names = dict.fromkeys(name for settings in known for name in settings) if known else value
    return ", ".join(f"{name} {value[name]}" for name in names if name in value)


def markdown(title: str, columns: tuple[str, ...], rows: dict[str, dict[str, Any]]) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    lines = [f"| {title} | " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [f"| {name} | " + " | ".join(cell(row.get(c)) for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def plot(path: Path, target: Path) -> None:
    """Lip sync, likeness to the plain setting and flicker over every setting."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("the plots are drawn by matplotlib, which is not installed: pip install matplotlib") from None
    found = json.loads(path.read_text(encoding="utf-8"))
    measures = {"lip_sync_correlation": "lip sync, correlation", "psnr": "PSNR to plain, dB", "flicker": "flicker"}
    figure = Figure(figsize=(2.4 * len(KNOBS), 6), layout="constrained")
    axes = figure.subplots(len(measures), len(KNOBS), sharey="row", squeeze=False)
    for column, (knob, all_settings) in enumerate(KNOBS.items()):
        names = [" ".join(str(v) for name, v in one.items() if name not in SILENT) for one in all_settings]
        for row, (measure, label) in enumerate(measures.items()):
            one = axes[row][column]
            values = [value[measure] for value in found["knobs"][knob]]
            if measure == "psnr":  # equal videos have 100 dB
                values = [float("nan") if value >= EQUAL_DB else value for value in values]
            one.plot(values, "o-", markersize=4)
            one.set_xlim(-0.3, len(names) - 0.7)
            one.set_xticks(range(len(names)), names if row == len(measures) - 1 else [])
            if measure != "psnr":
                one.axhline(found["plain"][measure], color="grey", linewidth=0.8, linestyle="--")
            one.tick_params(axis="x", rotation=90, labelsize=6)
            one.set_ylabel(label if column == 0 else "")
            one.set_title(knob if row == 0 else "", fontsize=9)
    figure.savefig(target, dpi=80)


def show(folder: Path) -> None:
    for name in ("clips", "knobs", "split"):
        if (path := folder / f"{name}.json").exists():
            print(table(path))
            if name == "knobs":
                plot(path, folder / "knobs.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clips", "knobs", "split", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the videos go; --out unless given")
    parser.add_argument("--checkpoint", type=Path, default=HERE.parent / "assets" / "checkpoint")
    parser.add_argument("--split", type=Path, help="for split: the same checkpoint, split into 8 experts")
    parser.add_argument("--voices", type=Path, default=Path(".demo/voices_heldout.npz"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--count", type=int, default=CLIPS)
    parser.add_argument("--scenes", type=int, default=KNOB_SCENES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="for clips")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of sampling settings, for clips")
    options = parser.parse_args()
    if options.what == "show":
        return show(options.out)
    place = Place(options.work or options.out, options.checkpoint, options.voices, options.device, options.split)
    for folder in (options.out, place.folder):
        folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = (judge_clips if options.what == "clips" else judge_knobs)(options, place)
    found["device"], found["took_seconds"] = options.device, round(time.monotonic() - began, 1)
    (options.out / f"{options.what}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found.get("summary") or found["plain"], indent=1))


if __name__ == "__main__":
    main()
