"""A long voice on the tiny checkpoint: memory and time of every clip, which must not grow.

    python benchmarks/long_voice.py [--minutes 10] [--out benchmarks/results]

The voice that comes with the pack is repeated to the wanted length. Memory is this process's, as Linux counts it:
`rss` where a clip begins, `peak` the most within a clip. Slopes are of a straight line from the second clip on. The
yardstick is the time of a fixed product beside every clip: it tells a clip that takes longer from a busy machine.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.assets import CHECKPOINT, DEMO_PROMPT, PORTRAIT, VOICE, embedded  # noqa: E402
from wan_s2v_core.config import SamplingConfig, VideoConfig  # noqa: E402
from wan_s2v_core.io.audio import read_recording  # noqa: E402
from wan_s2v_core.render import RenderReport, RenderRequest, render  # noqa: E402

RESET_PEAK = "5"
"""Written to clear_refs, sets VmHWM back to VmRSS."""


def write_voice(path: Path, seconds: float) -> None:
    """The embedded voice, repeated, as a 16-bit wav."""
    spoken = read_recording(embedded(VOICE))
    count = round(seconds * spoken.rate_hz)
    samples = spoken.samples[0].repeat(-(-count // spoken.samples.shape[1]))[:count]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(spoken.rate_hz)
        file.writeframes((samples * 32767).to(torch.int16).numpy().tobytes())


def memory_bytes() -> dict[str, int]:
    """What this process has in main memory, and the most it had since the peak was last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[name].split()[0]) * 1024 for key, name in (("rss", "VmRSS"), ("peak", "VmHWM"))}


def tensor_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    found = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    storages = (tensor.untyped_storage() for tensor in found if not tensor.is_meta)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def yardstick() -> float:
    """CPU seconds of the same work each time."""
    began, a = time.process_time(), torch.full((512, 512), 0.01)
    for _ in range(10):
        a = a @ a
    return time.process_time() - began


class Meter:
    """One reading per clip, taken at its first step: all that the clips before it left behind is there."""

    def __init__(self):
        self.began = time.monotonic()
        self.readings: list[dict[str, float]] = []

    def __call__(self, clip: int, clips: int, step: int) -> None:
        if step == 1:
            self.read()

    def read(self) -> None:
        before = {"seconds": time.monotonic() - self.began, "cpu": time.process_time(), **memory_bytes()}
        measured = {"tensors": tensor_bytes(), "yardstick": yardstick()}
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        after = {"seconds_after": time.monotonic() - self.began, "cpu_after": time.process_time()}
        self.readings.append({**before, **measured, **after})

    def per_clip(self, clock: str) -> list[float]:
        """Without what the readings themselves take."""
        pairs = zip(self.readings, self.readings[1:], strict=False)
        return [later[clock] - earlier[f"{clock}_after"] for earlier, later in pairs]


def slope(values: list[float]) -> float:
    """Of the straight line that fits best, per entry."""
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0


def summary(meter: Meter, report: RenderReport) -> dict:
    """What a run used. Readings: 0 in the first clip, k in clip k + 1, so 2 is where two clips are done."""
    rss, peak, tensors = ([int(reading[key]) for reading in meter.readings] for key in ("rss", "peak", "tensors"))
    cpu, wall, later = meter.per_clip("cpu")[1:], meter.per_clip("seconds")[1:], rss[2:]
    work = [seconds / reading["yardstick"] for seconds, reading in zip(cpu, meter.readings[2:], strict=True)]
    third = max(1, len(work) // 3)
    return {
        "clips": report.clips,
        "frames": report.frames,
        "audio_seconds": report.audio_seconds,
        "seconds": report.seconds,
        "seconds_before_first_step": meter.readings[0]["seconds"],
        "rss_after_clip_2": rss[2],
        "rss_max": max(later),
        "rss_end": rss[-1],
        "rss_slope_per_clip": slope(later),
        "rss_after_video": memory_bytes()["rss"],
        "peak_before_first_step": peak[0],
        "peak_within_a_clip": max(peak[2:]),
        "peak_slope_per_clip": slope(peak[2:]),
        "tensors_after_clip_2": tensors[2],
        "tensors_max": max(tensors[2:]),
        "seconds_per_clip": statistics.median(wall),
        "cpu_seconds_per_clip": statistics.median(cpu),
        "cpu_seconds_slope_per_clip": slope(cpu),
        "yardsticks_per_clip": statistics.median(work),
        "yardsticks_first_third": statistics.median(work[:third]),
        "yardsticks_last_third": statistics.median(work[-third:]),
        "yardsticks_slope_per_clip": slope(work),
        "all_rss": rss,
        "all_peak": peak,
        "all_tensors": tensors,
        "all_cpu_seconds": [round(value, 3) for value in cpu],
        "all_yardsticks": [round(value, 2) for value in work],
    }


def measure(seconds: float, video: VideoConfig, sampling: SamplingConfig) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        voice, target = Path(folder, "voice.wav"), Path(folder, "out.mp4")
        write_voice(voice, seconds)
        paths = (str(path) for path in (embedded(CHECKPOINT), voice, embedded(PORTRAIT), target))
        meter = Meter()
        report = render(RenderRequest(*paths, prompt=DEMO_PROMPT), video, sampling, meter)
        return summary(meter, report)


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{', '.join(sorted(names)) or platform.machine()}, {os.cpu_count()} cores, {gigabytes:.0f} GB"


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clip-frames", type=int, default=80)
    parser.add_argument("--motion-frames", type=int, default=73)
    parser.add_argument("--side", type=int, default=64, help="of the square video, in px")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--commit", default=commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, help="folder for long_voice.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    video = VideoConfig(max_area=options.side**2, clip_frames=options.clip_frames, motion_frames=options.motion_frames)
    settings = ("minutes", "clip_frames", "motion_frames", "side", "steps", "threads")
    flags = [f"--{name.replace('_', '-')} {getattr(options, name):g}" for name in settings]
    result = {
        "command": " ".join(["python benchmarks/long_voice.py", *flags]),
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": options.commit,
        **measure(60 * options.minutes, video, SamplingConfig(steps=options.steps, guidance_scale=1.0)),
    }
    if options.out:
        (options.out / "long_voice.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
