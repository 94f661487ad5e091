"""How much slower small cards are, and whether what the planner predicts is so. 14B with random weights.

    python benchmarks/small_cards.py forwards [--sizes 832x480 1280x704] [--caps 24 16 12 10 8 6] [--runs 5]
    python benchmarks/small_cards.py stages
    python benchmarks/small_cards.py planner [--settings 20]
    python benchmarks/small_cards.py ram [--folder FOLDER]

forwards: one forward of a second clip under a plan for each size of card, beside the same forward with everything on
the card, one after the other in every run. A cap is the card's size; the allocator is allowed that less what CUDA
takes. stages: umT5, wav2vec and the VAE where 4 GB are free, and one pair of latent frames of 3840x2160 on a card of
8 GB, beside the same with no limit. planner: random sizes, caps and precisions, predicted and measured peaks. ram: main
memory while a checkpoint of 33 GB, written to FOLDER first, is loaded into pieces of its own, and while it is used
where it is mapped.

forwards and planner need a card that holds the whole model, and 80 GB of main memory. ram runs without a card as well,
with a small clip. --tiny tries the script on a CPU.
Results go to small_cards_WHAT.json in --out, and as a table to the terminal.
"""

import argparse
import ctypes
import json
import math
import random
import re
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.assets import CHECKPOINT, embedded  # noqa: E402
from wan_s2v_core.attach import accelerated  # noqa: E402
from wan_s2v_core.bench.engine import RELEASED, loading_of, make_inputs, meta_network, random_network, with_blocks  # noqa: E402
from wan_s2v_core.bench.flops import ForwardShape  # noqa: E402
from wan_s2v_core.bench.measure import PeakMemory, card_of, device_name, now, read_commit, release  # noqa: E402
from wan_s2v_core.bench.random_weights import random_tensor, shapes_of  # noqa: E402
from wan_s2v_core.bench.stages import MeasuredNetworks  # noqa: E402
from wan_s2v_core.clip_denoiser import clip_shape  # noqa: E402
from wan_s2v_core.config import AccelerationPlan, MemoryLimits, OffloadPlan, S2VModelConfig  # noqa: E402
from wan_s2v_core.errors import OutOfMemory  # noqa: E402
from wan_s2v_core.geometry import frames_of  # noqa: E402
from wan_s2v_core.io.audio import read_recording  # noqa: E402
from wan_s2v_core.io.host_memory import free_ram_bytes  # noqa: E402
from wan_s2v_core.memory.budget import CONTEXT_BYTES, Planned, Room, Sizes, dit_plan  # noqa: E402
from wan_s2v_core.memory.placement import Placement  # noqa: E402
from wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE, dit_name, official_dit_config  # noqa: E402
from wan_s2v_core.model.loading import find_part  # noqa: E402
from wan_s2v_core.model.parts import Checkpoint  # noqa: E402
from wan_s2v_core.networks import CheckpointNetworks, load_placed  # noqa: E402
from wan_s2v_core.pipeline import S2VPipeline  # noqa: E402

TIMESTEP = 723.0
GB = 1e9


class Bench:
    """One DiT in main memory, and what a forward of it needs.

    Args:
        config: of the DiT, which has random weights.
    """

    def __init__(self, config: S2VModelConfig, precision: str, device: torch.device):
        self.config, self.device = config, device
        self.loading = loading_of(precision, device)
        network = random_network(DIT, config, self.loading, torch.device("cpu"))
        self.placement = Placement(network)
        self.placement.pack()
        self.sizes = Sizes.of(self.placement)
        release(device)

    def plan(self, shape: ForwardShape, cap_gb: float | None, has_pose: bool = True) -> Planned:
        """As the sampler would for one guidance branch."""
        size = shape.height_px, shape.width_px
        past = shape.motion_latents if shape.has_motion else 0
        clip = clip_shape(self.config, size, shape.latent_frames, past, has_pose)
        room = Room(None if cap_gb is None else round(cap_gb * GB) - CONTEXT_BYTES)
        return dit_plan(self.config, clip, self.loading.forward_way(self.config), MemoryLimits())(room, self.sizes)

    @torch.inference_mode()
    def forward(self, shape: ForwardShape, plan: OffloadPlan, repeats: int = 1) -> tuple[float, int, int, Tensor]:
        """Seconds of the last of some forwards, peak bytes allocated and reserved, and the velocity."""
        release(self.device)
        peak = PeakMemory(self.device)
        with self.placement.on(self.device, plan) as model, accelerated(model, AccelerationPlan(), plan):
            inputs, noise = make_inputs(self.config, shape, self.device)
            condition = model.condition(inputs)
            for _ in range(repeats):
                began = now(self.device)
                velocity = model(noise, TIMESTEP, condition)
                seconds = now(self.device) - began
            del condition, inputs
        return seconds, peak.bytes() or 0, peak.held_bytes()[0], velocity.cpu()


def measure_forwards(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    bench, rows = Bench(config_of(options), options.precision, device), []
    for width, height in options.sizes:
        shape = ForwardShape(width, height)
        plans = {cap: bench.plan(shape, cap) for cap in (None, *options.caps)}
        seconds: dict[float | None, list[float]] = {cap: [] for cap in plans}
        facts: dict[float | None, dict[str, Any]] = {}
        expected = None
        for run in range(-options.warm_ups, options.runs):  # a first one compiles and locks memory
            for cap, planned in plans.items():
                with card_of(cap, device):
                    taken, allocated, reserved, velocity = bench.forward(shape, planned.plan)
                expected = velocity if expected is None else expected
                error = float((velocity - expected).norm() / expected.norm())
                facts[cap] = {"allocated_bytes": allocated, "reserved_bytes": reserved, "difference": error}
                if run >= 0:
                    seconds[cap].append(taken)
                print(f"{width}x{height} run {run + 1} {told(cap)} {taken:.3f} s", flush=True)
        whole = statistics.median(seconds[None])
        for cap, planned in plans.items():
            median = statistics.median(seconds[cap])
            rows.append(
                {
                    "width": width,
                    "height": height,
                    "cap_gb": cap,
                    "plan": planned.plan.to_dict(),
                    "line": planned.line(bench.sizes),
                    "predicted_bytes": planned.bytes,
                    "seconds": seconds[cap],
                    "median_seconds": median,
                    "slower": median / whole - 1,
                    "spread": (max(seconds[cap]) - min(seconds[cap])) / median,
                    **facts[cap],
                }
            )
            print_row(rows[-1])
    return rows


def told(cap_gb: float | None) -> str:
    return "whole card" if cap_gb is None else f"{cap_gb:g} GB"


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['width']}x{row['height']} {told(row['cap_gb']):>10} {row['median_seconds']:8.3f} s "
        f"{100 * row['slower']:+6.2f} % (spread {100 * row['spread']:.2f} %)  "
        f"predicted {row['predicted_bytes'] / GB:6.2f}, allocated {row['allocated_bytes'] / GB:6.2f}, reserved "
        f"{row['reserved_bytes'] / GB:6.2f} GB, difference {row['difference']:.1e}: {row['line']}",
        flush=True,
    )


SMALLEST_GB, SMALL_GB = 4.8, 8.0
"""Of a card with 4 GB free when CUDA has its own, and of one that many have."""


@torch.inference_mode()
def measure_stages(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every stage but sampling, on a small card and with no limit."""
    configs = {kind: config_of(options, kind) for kind in (TEXT_ENCODER, SPEECH_ENCODER, VAE)}
    loading, rows = loading_of(options.precision, device), []
    all_networks = {
        kind: random_network(kind, config, loading, torch.device("cpu")) for kind, config in configs.items()
    }
    recording = read_recording(ROOT / "assets/voice.flac", 0.0, 60.0)
    (width, height), (wide, high) = ((64, 64), (128, 96)) if options.tiny else ((1280, 704), (3840, 2160))
    frames, count = (9, 3) if options.tiny else (73, 21)
    video = torch.rand(1, 3, frames, height, width) * 2 - 1
    latents, large = torch.randn(1, 16, count, height // 8, width // 8), torch.randn(1, 16, 2, high // 8, wide // 8)
    works: dict[str, tuple[float, Callable[[S2VPipeline], Tensor]]] = {
        "umT5, two prompts": (SMALLEST_GB, lambda pipeline: torch.cat(pipeline.encode_prompts("a", "man"), 1)),
        f"wav2vec, {recording.seconds:.1f} s": (SMALLEST_GB, lambda it: it.encode_voice(recording).features),
        f"VAE encode {frames} frames {width}x{height}": (SMALLEST_GB, lambda pipeline: pipeline.encode(video)),
        f"VAE decode {frames_of(count)} frames {width}x{height}": (
            SMALLEST_GB,
            lambda pipeline: pipeline.decode(latents.to(device)),
        ),
        f"VAE decode 5 frames {wide}x{high}": (SMALL_GB, lambda pipeline: pipeline.decode(large.to(device))),
    }
    for name, (cap, work) in works.items():
        results: dict[float | None, Tensor] = {}
        for size in (None, cap):
            networks = CheckpointNetworks(Checkpoint({}), loading, limits=MemoryLimits(vram_limit_gb=size))
            for kind, network in all_networks.items():
                networks.put(kind, network)
            measured = MeasuredNetworks(networks)
            with card_of(size, device):
                for _ in range(2):  # the first one compiles and is not counted
                    release(device)
                    results[size] = work(S2VPipeline(measured)).cpu()
            row = asdict(measured.stages[-1]) | {"name": name, "cap_gb": size}
            far = (results[size].float() - results[None].float()).norm() / results[None].float().norm()
            rows.append(row | {"retries": retries(device), "difference": float(far)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def retries(device: torch.device) -> int:
    """How often torch had to give free blocks back to get another, since the process began."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def measure_planner(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Few blocks, for time; every kind of layer is there."""
    chance, rows = random.Random(options.seed), []
    for precision in ("bfloat16", "float8", "float8-weights"):
        bench = Bench(with_blocks(config_of(options), options.blocks or 6), precision, device)
        for _ in range(-(-options.settings // 3)):
            sides = (128, 192) if options.tiny else (480, 1280)
            width, height = (chance.randrange(*sides, 16) for _ in range(2))
            shape = ForwardShape(width, height, chance.choice((5, 10, 20, 30)), chance.random() < 0.7)
            cap = chance.uniform(4, 16)
            row = {"precision": precision, "width": width, "height": height, "frames": shape.frames, "cap_gb": cap}
            try:
                planned = bench.plan(shape, cap)
            except OutOfMemory as error:
                rows.append(row | {"refused": str(error)})
                continue
            with card_of(cap, device):
                _, allocated, reserved, _ = bench.forward(shape, planned.plan)
            ratio = planned.bytes / allocated if allocated else None
            facts = {"line": planned.line(bench.sizes), "predicted_bytes": planned.bytes, "ratio": ratio}
            rows.append(row | facts | {"allocated_bytes": allocated, "reserved_bytes": reserved})
            print(json.dumps(rows[-1]), flush=True)
        del bench
        release(device)
    ratios = [row["ratio"] for row in rows if row.get("ratio")]
    if ratios:
        print(f"{len(ratios)} settings: predicted / measured {min(ratios):.3f} to {max(ratios):.3f}, none ran out")
    return rows


def status_bytes(name: str) -> int:
    """Of this process, as Linux tells."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class AnonymousPeak:
    """The most main memory that this process holds besides what it maps from files, beyond what it began with."""

    def __enter__(self) -> "AnonymousPeak":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # or memory freed before would be taken again unseen
        self.before = self.most = status_bytes("RssAnon")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, status_bytes("RssAnon"))

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self.most = max(self.most, status_bytes("RssAnon"))

    @property
    def bytes(self) -> int:
        return self.most - self.before


def measure_ram(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Two ways to hold a checkpoint in main memory; the mapped one computes a forward as well."""
    config, rows = config_of(options), []
    if options.blocks:
        config = with_blocks(config, options.blocks)
    shape = ForwardShape(832, 480) if device.type == "cuda" else ForwardShape(64, 64)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_checkpoint(Path(folder), config)
        for packs in (way == "packed" for way in options.ways):
            release(device)
            with AnonymousPeak() as peak:
                began = now(device)
                placement = load_placed(Checkpoint({DIT: folder}), DIT, loading_of("bfloat16", device), packs)
                row = {"file_bytes": size, "packs": packs, "load_seconds": now(device) - began}
            row["most_loading_bytes"] = peak.bytes
            if not packs:
                bench = Bench.__new__(Bench)
                bench.config, bench.device, bench.placement = config, device, placement
                bench.loading, bench.sizes = loading_of("bfloat16", device), Sizes.of(placement)
                plan = replace(bench.plan(shape, options.caps[-1]).plan, locks=False)
                with AnonymousPeak() as working:
                    row["forward_seconds"] = bench.forward(shape, plan)[0]
                row |= {"most_working_bytes": working.bytes + working.before - peak.before, "plan": plan.to_dict()}
                del bench
            row["most_resident_bytes"] = status_bytes("VmHWM")
            rows.append(row)
            print(json.dumps(row), f"free: {free_ram_bytes() / GB:.1f} GB", flush=True)
            del placement
    return rows


SHARD_BYTES = 4_000_000_000


def write_checkpoint(folder: Path, config: S2VModelConfig) -> int:
    """The DiT in bfloat16 with random weights, in shards as the official one is -> their bytes."""
    from safetensors.torch import save_file

    network = meta_network(DIT, config, loading_of("bfloat16", torch.device("cpu")))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in shapes_of(network):
        if sum(2 * math.prod(one) for _, one in [*shards[-1], (name, shape)]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape))
    files, depth = {}, 3 * config.blocks
    for number, shard in enumerate(shards, 1):
        path = folder / f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {dit_name(name): random_tensor(name, shape, 0, depth, "cpu").bfloat16() for name, shape in shard}
        save_file(weights, path)
        files |= dict.fromkeys(weights, path.name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(official_dit_config(config)))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def config_of(options: argparse.Namespace, kind: str = DIT) -> Any:
    return find_part(embedded(CHECKPOINT), kind).config if options.tiny else RELEASED[kind]


MEASURES = {"forwards": measure_forwards, "stages": measure_stages, "planner": measure_planner, "ram": measure_ram}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURES))
    sides = [(832, 480), (1280, 704)]
    parser.add_argument("--sizes", nargs="+", default=sides, type=lambda size: tuple(map(int, size.split("x"))))
    parser.add_argument("--caps", nargs="+", default=[24.0, 16.0, 12.0, 10.0, 8.0, 6.0], type=float, help="GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warm_ups", type=int, default=1, help="runs before those that count")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--settings", type=int, default=20)
    parser.add_argument("--blocks", type=int, help="of the DiT, at most, for planner (6) and ram (all)")
    parser.add_argument("--ways", nargs="+", choices=("mapped", "packed"), default=["mapped", "packed"], help="for ram")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--folder", type=Path, help="on a disk with 33 GB, for ram; the temporary folder by default")
    parser.add_argument("--tiny", action="store_true", help="the embedded checkpoint's sizes on the CPU")
    parser.add_argument("--commit", default=read_commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny or not torch.cuda.is_available() else "cuda")
    if options.tiny:
        options.sizes = [(64, 64)]
    rows = MEASURES[options.what](options, device)
    facts = {"device": device_name(device), "torch": torch.__version__, "commit": options.commit, "seed": options.seed}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"small_cards_{options.what}.json").write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
