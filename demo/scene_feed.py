"""Worker processes that draw scenes without end, and hand their frames over through memory that all of them share."""

import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from faces import CENTRE, PIVOT, UNIT, Face, mouth_shape  # noqa: E402
from scenes import Scene, draw_pose, draw_scene, make_scene  # noqa: E402

FPS = 16.0
SPEECH_HZ = 16000
HELD_OUT_SEED = 1_000_000_000
"""Scenes from this seed on are never trained on."""
SEEDS_PER_WORKER = 1_000_000
MOUTH_MARGIN = 0.12
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class SceneSettings:
    """What the workers draw.

    A scene is a stretch of one recording. It begins `lead` frames before the recording does, in silence.
    """

    voices: str
    frames: int
    lead: int = 0
    size_px: int = 256
    supersample: int = 1
    pose_share: float = 0.0
    """Share of the scenes that come with pose drawings as well."""

    @property
    def samples(self) -> int:
        """Of the recording, at 16 kHz."""
        return round((self.frames - self.lead) / FPS * SPEECH_HZ)


@dataclass(frozen=True)
class DrawnScene:
    """A scene and its drawings. `pixels` and `pose` lie in shared memory and are valid until the feed goes on."""

    seed: int
    prompt: str
    samples: np.ndarray
    """N float32 at 16 kHz."""
    pixels: np.ndarray
    """T H W 3 uint8."""
    pose: np.ndarray | None
    """The same, or None."""
    mouths: np.ndarray
    """T 4 int16: left, top, right, bottom of the mouth in pixels."""
    openings: np.ndarray
    """T float32: how open the mouth is, 0 to 1."""


def choose_voice(voices: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """A stretch of `count` samples of a random recording, changed; short recordings are followed by silence."""
    from voices import augment

    voice = np.asarray(voices[rng.integers(len(voices))], np.float32)
    start = int(rng.integers(max(1, len(voice) - count // 2)))
    stretch = augment(voice[start : start + 2 * count], rng)[:count]
    return np.pad(np.asarray(stretch, np.float32), (0, count - len(stretch)))


def plan_scene(seed: int, voices: list[np.ndarray], settings: SceneSettings) -> tuple[Scene, np.ndarray, bool]:
    """The scene of a seed, its recording, and whether it comes with pose drawings."""
    rng = np.random.default_rng(seed)
    samples = choose_voice(voices, settings.samples, rng)
    scene = make_scene(seed, samples, settings.frames, -settings.lead, FPS)
    return scene, samples, bool(rng.random() < settings.pose_share)


def mouth_box(face: Face, size_px: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the mouth of a drawn face, with a margin. Open or not, it is about as large."""
    shape = mouth_shape(replace(face, mouth_opening=0.7, mouth_rounding=0.0))
    points = np.concatenate([shape.outer_upper, shape.outer_lower])
    angle = np.radians(face.tilt_degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # of row vectors, as Canvas does
    places = ((points - PIVOT) @ turn + PIVOT + face.offset) * UNIT + CENTRE
    low, high = places.min(0) - MOUTH_MARGIN * UNIT, places.max(0) + MOUTH_MARGIN * UNIT
    return tuple(np.clip(np.round(np.concatenate([low, high]) * size_px), 0, size_px).astype(int).tolist())


def draw(seed: int, voices: list[np.ndarray], settings: SceneSettings) -> DrawnScene:
    """One scene, in this process."""
    scene, samples, has_pose = plan_scene(seed, voices, settings)
    return DrawnScene(
        seed=seed,
        prompt=scene.prompt,
        samples=samples,
        pixels=draw_scene(scene, settings.size_px, settings.supersample),
        pose=draw_pose(scene, settings.size_px) if has_pose else None,
        mouths=np.array([mouth_box(face, settings.size_px) for face in scene.frames], np.int16),
        openings=np.array([face.mouth_opening for face in scene.frames], np.float32),
    )


def shared_folder(needed_bytes: int) -> Path:
    """Memory where there is enough of it, else a disk: a container's /dev/shm is often tiny."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * needed_bytes:
        return memory
    return Path(tempfile.gettempdir())


def open_slots(path: str, slots: int, settings: SceneSettings) -> np.ndarray:
    """slots 2 T H W 3: places for pixels and pose drawings."""
    side = settings.size_px
    return np.memmap(path, np.uint8, "r+", shape=(slots, 2, settings.frames, side, side, 3))


def draw_forever(worker: int, first_seed: int, path: str, slots: int, settings: SceneSettings, free, ready) -> None:
    """What a worker does: take a free slot, fill it, say so."""
    try:
        from voices import load_voices

        voices = load_voices(Path(settings.voices))
        memory = open_slots(path, slots, settings)
        seed = first_seed + worker * SEEDS_PER_WORKER
        while (slot := free.get()) is not None:
            drawn = draw(seed, voices, settings)
            memory[slot, 0] = drawn.pixels
            if drawn.pose is not None:
                memory[slot, 1] = drawn.pose
            ready.put((slot, drawn.pose is not None, replace(drawn, pixels=None, pose=None)))
            seed += 1
    except Exception:
        ready.put((None, False, f"worker {worker}:\n{traceback.format_exc()}"))


class SceneFeed:
    """Scenes drawn by `workers` processes: `for scene in feed.arrived()`, or `feed.wait()` for one.

    Args:
        first_seed: scenes of other seeds are other scenes; a resumed training takes new ones.
    """

    def __init__(self, settings: SceneSettings, workers: int, first_seed: int = 0):
        self.settings, slots = settings, 2 * workers + 2
        bytes_needed = slots * 2 * settings.frames * settings.size_px**2 * 3
        handle, self.path = tempfile.mkstemp(prefix="scenes_", dir=shared_folder(bytes_needed))
        os.truncate(handle, bytes_needed)
        os.close(handle)
        self.memory = open_slots(self.path, slots, settings)
        context = multiprocessing.get_context("spawn")
        self.free, self.ready = context.Queue(), context.Queue()
        for slot in range(slots):
            self.free.put(slot)
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
        arguments = (first_seed, self.path, slots, settings, self.free, self.ready)
        self.processes = [
            context.Process(target=draw_forever, args=(worker, *arguments), daemon=True) for worker in range(workers)
        ]
        for process in self.processes:
            process.start()
        self.began, self.scenes = time.monotonic(), 0

    def wait(self) -> Iterator[DrawnScene]:
        """The next scene, once it is there."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for scene in self.arrived(1):
                yield scene
                return
            if not any(process.is_alive() for process in self.processes):
                break
            time.sleep(0.01)
        ended = [process.exitcode for process in self.processes]
        raise RuntimeError(
            f"no scene has come from the workers in {PATIENCE_SECONDS} s; exit codes {ended} (None: still at work)"
        )

    def arrived(self, at_most: int = 1 << 30) -> Iterator[DrawnScene]:
        """Scenes that are there now, each valid until the next is taken."""
        while at_most > 0:
            try:
                slot, has_pose, scene = self.ready.get_nowait()
            except queue.Empty:
                return
            if slot is None:
                raise RuntimeError(scene)
            pixels, pose = self.memory[slot]
            try:
                yield replace(scene, pixels=pixels, pose=pose if has_pose else None)
            finally:  # also where the caller takes no other
                self.free.put(slot)
                self.scenes, at_most = self.scenes + 1, at_most - 1

    @property
    def frames_per_second(self) -> float:
        """Drawn and taken, on average since the start."""
        return self.scenes * self.settings.frames / (time.monotonic() - self.began)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(5)
        Path(self.path).unlink(missing_ok=True)
