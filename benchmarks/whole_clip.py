"""One video from recording to mp4 at real size, random weights: seconds and peak memory of every stage.

    python benchmarks/whole_clip.py CASE... [--clips 2] [--pose] [--out FILE]

Cases: PRECISION-offload and PRECISION-resident, such as bfloat16-offload, make a video; vae measures the VAE alone,
with ways to make it faster; vae-profile tells where its time goes; copies measures how fast weights travel to the card
and back. Each case replaces the one of its name in the result file. Needs a CUDA card with 48 GB (resident: 80 GB) and
64 GB of main memory; `--tiny` tries the script on a CPU, with the sizes of the embedded checkpoint.
"""

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.bench.engine import RELEASED, SEED, random_network  # noqa: E402
from wan_s2v_core.bench.measure import card_of, read_commit, relative_l2, release  # noqa: E402
from wan_s2v_core.bench.other_networks import PROMPT  # noqa: E402
from wan_s2v_core.bench.stages import MeasuredNetworks, MeasuredPipeline  # noqa: E402
from wan_s2v_core.conditioning.bundle import make_conditioning  # noqa: E402
from wan_s2v_core.conditioning.image import read_picture, to_frames  # noqa: E402
from wan_s2v_core.config import ALWAYS, AUTO, DEFAULT_NEGATIVE_PROMPT, MemoryLimits, SamplingConfig, VideoConfig  # noqa: E402
from wan_s2v_core.geometry import FIRST_CLIP_SKIP  # noqa: E402
from wan_s2v_core.io.audio import read_recording  # noqa: E402
from wan_s2v_core.io.clip_store import ClipStore  # noqa: E402
from wan_s2v_core.io.film import write_film  # noqa: E402
from wan_s2v_core.io.video import probe_video  # noqa: E402
from wan_s2v_core.model.checkpoint import VAE  # noqa: E402
from wan_s2v_core.model.loading import find_part  # noqa: E402
from wan_s2v_core.model.parts import Checkpoint  # noqa: E402
from wan_s2v_core.model.vae import VideoVAE  # noqa: E402
from wan_s2v_core.networks import CheckpointNetworks  # noqa: E402
from wan_s2v_core.prepare import plan_loading  # noqa: E402

VAE_SIZES = ((832, 480), (1280, 704))
COPY_BYTES = 4 << 30
BYTES_SHOWN = ("held", "peak", "planned", "reserved", "device")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, when everything asked of the card is done."""
    synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], Any]) -> float:
    began = now()
    call()
    return now() - began


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@torch.inference_mode()
def random_networks(sizes: dict[str, Any], precision: str, device: torch.device, offload: bool) -> CheckpointNetworks:
    """All four, resting where offload or its absence has them."""
    loading = plan_loading(precision, device)
    networks = CheckpointNetworks(Checkpoint({}), loading, ALWAYS if offload else AUTO)
    home = torch.device("cpu") if offload else device
    for kind in sizes:
        networks.put(kind, random_network(kind, sizes[kind], loading, home))
    return networks


def weight_bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def make_videos(
    case: str, options: argparse.Namespace, sizes: dict[str, Any], device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A video for each limit, one by one: its name, and what it cost."""
    precision, _, place = case.rpartition("-")
    began = now()
    networks = random_networks(sizes, precision, device, place == "offload")
    release(device)  # what their weights were made in
    build_seconds = now() - began
    for limit in options.vram_limit_gb:
        networks.limits = MemoryLimits(vram_limit_gb=limit)
        result = make_video(networks, limit, options, device) | {"build_seconds": build_seconds}
        yield case if limit is None else f"{case}-{limit:g}GB", result


def make_video(
    networks: CheckpointNetworks, limit_gb: float | None, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds and bytes of every stage, and what the file holds."""
    width, height = options.size
    video = VideoConfig(exact_size=(height, width))
    sampling = SamplingConfig(steps=options.steps, seed=SEED)
    settings = {"video": video.to_dict(), "sampling": sampling.to_dict(), "pose": options.pose}

    weights = {kind: weight_bytes(network) for kind, network in networks.loaded.items()}
    networks = MeasuredNetworks(networks)
    pipeline, steps, finite = MeasuredPipeline(networks), [], True

    with tempfile.TemporaryDirectory() as folder, card_of(limit_gb, device):
        target = Path(folder) / "clip.mp4"
        began = now()
        with networks.without_network("read recording and picture"):
            seconds = (options.clips * video.clip_frames - FIRST_CLIP_SKIP) / video.fps
            recording = read_recording(ROOT / "assets/voice.flac", 0.0, seconds)
            picture = read_picture(ROOT / "assets/portrait.png")
        voice = pipeline.encode_voice(recording)
        text, negative_text = pipeline.encode_prompts(PROMPT, DEFAULT_NEGATIVE_PROMPT)
        with networks.without_network("plan and fit"):
            pose = (lambda _, frames: picture.expand(frames, -1, -1, -1)) if options.pose else None
            job = make_conditioning(picture, voice, text, negative_text, video, pose)
        assert job.clips == options.clips
        store = ClipStore(Path(folder) / "clips", video.fps, recording, settings)
        for clip in pipeline.generate(job, sampling, lambda task, step, _: steps.append((task.index, step, now()))):
            with networks.without_network("keep clip"):
                store.add(to_frames(clip.video[0]), clip.latents, clip.motion_video)
            finite = finite and bool(clip.latents.isfinite().all())
        with networks.without_network("write mp4"):
            write_film(target, store.stored, {"comment": json.dumps(settings)})
        total = now() - began
        facts = asdict(probe_video(target)) | {"bytes": target.stat().st_size}
    return {
        "size": f"{width}x{height}",
        "clips": options.clips,
        "vram_limit_gb": limit_gb,
        "settings": settings,
        "weight_bytes": weights,
        "seconds": total,
        "transfer_seconds": sum(stage.in_seconds + stage.out_seconds for stage in networks.stages),
        "peak_bytes": max(stage.peak_bytes for stage in networks.stages),
        "reserved_bytes": max(stage.reserved_bytes for stage in networks.stages),
        "device_bytes": max(stage.device_bytes for stage in networks.stages),
        "main_memory_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "stages": [asdict(stage) for stage in networks.stages],
        "is_finite": finite,
        "later_step_seconds": [b[2] - a[2] for a, b in pairwise(steps) if a[0] == b[0]],
        "file": facts,
    }


def print_stages(result: dict[str, Any]) -> None:
    for stage in result["stages"]:
        times = " ".join(f"{stage[name]:8.2f}" for name in ("in_seconds", "seconds", "out_seconds"))
        sizes = " ".join(f"{stage[f'{name}_bytes'] / 1e9:7.2f}" for name in BYTES_SHOWN)
        print(f"{stage['name']:32} {times}  {sizes}", flush=True)


# --- the VAE alone -----------------------------------------------------------------------------------------------


def vae_stage(call: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of one call, and its peak above what was there before, with and without the result."""
    reset_peak()
    before, began = allocated(), now()
    result = call()
    seconds = now() - began
    own = result.numel() * result.element_size()
    return {"seconds": seconds, "peak_bytes": peak() - before, "result_bytes": own}


def kernel_profile(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of one call by operator and by kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        synchronize()
    events = record.key_averages()

    def longest(device_type: str, count: int) -> dict[str, float]:
        chosen = [event for event in events if str(event.device_type).endswith(device_type)]
        times = {event.key[:110]: event.self_device_time_total / 1e3 for event in chosen}
        return dict(sorted(times.items(), key=lambda item: -item[1])[:count])

    return {"operators_ms": longest("CPU", 10), "kernels_ms": longest("CUDA", 12)}


@contextmanager
def plain(vae: VideoVAE) -> Iterator[VideoVAE]:
    yield vae


@contextmanager
def without_tf32(vae: VideoVAE) -> Iterator[VideoVAE]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield vae


@contextmanager
def searched(vae: VideoVAE) -> Iterator[VideoVAE]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        yield vae


@contextmanager
def channels_last(vae: VideoVAE) -> Iterator[VideoVAE]:
    """Weights, and with them the products, with the channels of a pixel side by side."""
    for module in vae.modules():
        for parameter in module.parameters(recurse=False):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    yield vae
    for parameter in vae.parameters():
        parameter.data = parameter.data.contiguous()


@contextmanager
def bfloat16(vae: VideoVAE) -> Iterator[VideoVAE]:
    yield vae.bfloat16()
    vae.float()


@contextmanager
def bfloat16_channels_last(vae: VideoVAE) -> Iterator[VideoVAE]:
    with bfloat16(vae), channels_last(vae):
        yield vae


VARIANTS = {
    "float32, tf32 convolutions (as it is)": plain,
    "float32, no tf32": without_tf32,
    "cudnn.benchmark": searched,
    "channels last": channels_last,
    "bfloat16": bfloat16,
    "bfloat16, channels last": bfloat16_channels_last,
}


@torch.inference_mode()
def measure_vae(options: argparse.Namespace, sizes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    loading = plan_loading("auto", device)
    vae = random_network(VAE, sizes[VAE], loading, device)
    generator = torch.Generator(device).manual_seed(SEED)

    def video(frames: int, width: int, height: int) -> Tensor:
        noise = torch.randn(1, 3, frames, height // 16, width // 16, generator=generator, device=device)
        return nn.functional.interpolate(noise, scale_factor=(1, 16, 16)).clamp(-1, 1)

    def latents(frames: int, width: int, height: int) -> Tensor:
        return torch.randn(1, 16, frames, height // 8, width // 8, generator=generator, device=device)

    pictures = ((64, 64),) if options.tiny else VAE_SIZES
    result: dict[str, Any] = {"weight_bytes": weight_bytes(vae), "cases": [], "variants": {}}
    for size in pictures:
        vae.encode(video(5, *size)), vae.decode(latents(2, *size))  # warm up
        runs = [("encode", frames, video(frames, *size)) for frames in (1, 73, 81)]
        runs += [("decode", frames, latents(frames, *size)) for frames in (21, 39)]
        for what, frames, given in runs:
            case = vae_stage(lambda what=what, given=given: getattr(vae, what)(given))
            working = (case["peak_bytes"] - case["result_bytes"]) / (size[0] * size[1])
            case = {"size": "{}x{}".format(*size), "what": what, "frames": frames} | case
            result["cases"].append(case | {"working_bytes_per_pixel": working})
            print(json.dumps(result["cases"][-1]), flush=True)
    size = pictures[0]
    coded, shown = latents(9, *size), video(33, *size)
    with without_tf32(vae):
        exact = {"encode": vae.encode(shown), "decode": vae.decode(coded)}
    for name, variant in VARIANTS.items():
        try:
            with variant(vae):
                vae.encode(shown[:, :, :5]), vae.decode(coded[:, :, :2])
                measured = {"encode": (vae.encode, shown), "decode": (vae.decode, coded)}
                row = {
                    what: vae_stage(lambda call=call, given=given: call(given))
                    for what, (call, given) in measured.items()
                }
                for what, (call, given) in measured.items():
                    row[what]["relative_l2"] = relative_l2(call(given), exact[what])
        except RuntimeError as error:  # a layout that cuDNN has no kernel for
            row = {"error": str(error).splitlines()[0]}
        result["variants"][name] = row
        print(name, json.dumps(row), flush=True)
    result["output_std"] = {what: float(value.std()) for what, value in exact.items()}
    return result


@torch.inference_mode()
def profile_vae() -> dict[str, Any]:
    """Where the time of 9 latent frames and of 33 frames goes, at the first size."""
    device, (width, height) = torch.device("cuda"), VAE_SIZES[0]
    vae = random_network(VAE, RELEASED[VAE], plan_loading("auto", device), device)
    coded = torch.randn(1, 16, 9, height // 8, width // 8, device=device)
    shown = vae.decode(coded)
    vae.encode(shown)
    return {"decode": kernel_profile(lambda: vae.decode(coded)), "encode": kernel_profile(lambda: vae.encode(shown))}


# --- how fast weights travel -------------------------------------------------------------------------------------


def measure_copies() -> dict[str, float]:
    """GB per second of one copy, from and to plain and page-locked main memory."""
    plain = torch.ones(COPY_BYTES, dtype=torch.uint8)
    lock_seconds = seconds_of(plain.pin_memory)
    locked = plain.pin_memory()
    card = plain.to("cuda")
    calls = {
        "plain_to_card": lambda: card.copy_(plain),
        "card_to_new_plain": lambda: card.to("cpu"),
        "card_to_plain": lambda: plain.copy_(card),
        "locked_to_card": lambda: card.copy_(locked, non_blocking=True),
        "card_to_locked": lambda: locked.copy_(card, non_blocking=True),
    }
    rates = {name: COPY_BYTES / seconds_of(call) / 1e9 for name, call in calls.items()}
    return rates | {"lock": COPY_BYTES / lock_seconds / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", default="832x480", type=lambda size: tuple(map(int, size.split("x"))))
    parser.add_argument(
        "--vram_limit_gb",
        type=float,
        nargs="+",
        default=[None],
        help="plan for cards of these sizes, and allow no more",
    )
    parser.add_argument("--pose", action="store_true", help="with a driving video: the portrait, held")
    parser.add_argument("--tiny", action="store_true", help="the embedded checkpoint's sizes on the CPU")
    parser.add_argument("--commit", default=read_commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, default=Path("whole_clip.json"))
    options = parser.parse_args()
    device, sizes = torch.device("cuda"), RELEASED
    if options.tiny:
        device, options.size = torch.device("cpu"), (64, 64)
        sizes = {kind: find_part(ROOT / "assets/checkpoint", kind).config for kind in RELEASED}

    report = json.loads(options.out.read_text()) if options.out.is_file() else {"cases": {}}
    report |= {"commit": options.commit, "torch": torch.__version__, "cpu_cores": os.cpu_count()}
    report["gpu"] = "none" if options.tiny else torch.cuda.get_device_name()
    for case in options.cases:
        if case == "vae":
            results = [(case, measure_vae(options, sizes, device))]
        elif case in ("vae-profile", "copies"):
            results = [(case, profile_vae() if case == "vae-profile" else measure_copies())]
            print(json.dumps(results[0][1]), flush=True)
        elif re.fullmatch(r".+-(offload|resident)", case):
            results = make_videos(case, options, sizes, device)
        else:
            parser.error(f"case {case!r} is not known. Use vae, vae-profile, copies, or such as bfloat16-offload.")
        for name, result in results:
            if "stages" in result:
                print(name)
                print_stages(result)
                print(json.dumps({key: value for key, value in result.items() if key != "stages"}), flush=True)
            report["cases"][name] = result
            options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
