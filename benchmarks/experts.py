"""Routed experts at real size: time and memory of one feed-forward, and of a whole forward of the split 14B model.

    python benchmarks/experts.py [--tokens 34500 79200] [--size 832x480] [--skip-model] [--out FOLDER]

Random weights: times and memory are real, pictures are not, and tokens choose experts about evenly. A feed-forward is
split into 8 experts and runs with every top_k and capacity beside the dense layer it came from, with one expert after
the other (loop) and with the products of all together (grouped; one by one as well where a share is over LARGE_SHARE).
Then whole forwards, dense and split, in turn. Writes experts.json and experts.md. A quick look at the script itself,
without a card:

    python benchmarks/experts.py --device cpu --width 64 --hidden 128 --blocks 2 --tokens 300 --size 64x64 --runs 1
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.acceleration.experts.grouped import apply_grouped, group_products  # noqa: E402
from wan_s2v_core.acceleration.experts.router import routed as routed_by  # noqa: E402
from wan_s2v_core.acceleration.experts.router import take_load  # noqa: E402
from wan_s2v_core.attach import NO_ROUTING  # noqa: E402
from wan_s2v_core.bench.random_weights import fill_random  # noqa: E402
from wan_s2v_core.config import ExpertRouting, S2VModelConfig  # noqa: E402
from wan_s2v_core.model.block import FeedForward  # noqa: E402
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer  # noqa: E402
from wan_s2v_core.model.experts import ExpertLoad, apply_each  # noqa: E402
from wan_s2v_core.research.split import plan_split, split_feed_forward, split_layer  # noqa: E402

EXPERTS, TIMESTEP, SEED = 8, 723.0, 7
CAPACITIES = (256, 1024, 4096, 16384, None)
MODEL_CASES = ((8, None), (6, None), (4, None), (8, 4096), (4, 4096))
"""(top_k, capacity) of the whole forwards."""
LATENT_FRAMES, MOTION_LATENTS, MOTION_FRAMES = 20, 19, 73
WAYS = {"loop": apply_each, "grouped": apply_grouped}

Call = Callable[[], object]


def milliseconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak of the allocator above what was allocated before; 0 without a card."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(calls: dict[str, Call], runs: int, device: torch.device) -> dict[str, dict]:
    """Each call in turn, `runs` times after one warm-up in which its peak is taken."""
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    return {name: {"ms": statistics.median(times[name]), "all_ms": times[name], "peak": peaks[name]} for name in calls}


def relative_l2(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.float() - exact.float()).norm() / exact.float().norm())


def random_layer(config: S2VModelConfig, dtype: torch.dtype, device: torch.device) -> FeedForward:
    with torch.device("meta"):
        layer = FeedForward(config.width, config.feed_forward_width)
    fill_random(layer, SEED, dtype, device)
    return layer.requires_grad_(False)


def measure_layer(config: S2VModelConfig, tokens: int, runs: int, device: torch.device) -> dict:
    """One feed-forward: dense, and split with every top_k and capacity."""
    dense = random_layer(config, torch.bfloat16, device)
    x = torch.randn(1, tokens, config.width, device=device).bfloat16()
    split = split_layer(dense, EXPERTS)
    routed = split_feed_forward(dense, split)

    def run(way: str, top_k: int, capacity: int | None) -> torch.Tensor:
        routed.apply_experts = WAYS[way]
        routed.routing = ExpertRouting(top_k=top_k, expert_capacity=capacity)
        return routed(x)

    few = x[:, :4096]
    exact = random_layer(config, torch.float32, device)(few.float())
    routed.routing = ExpertRouting()
    errors = {"dense": relative_l2(dense(few), exact), "loop": relative_l2(routed(few), exact)}
    routed.apply_experts = apply_grouped
    errors["grouped"] = relative_l2(routed(few), exact)
    cases = []
    for capacity in CAPACITIES:
        calls: dict[str, Call] = {"dense": lambda: dense(x), "gate": lambda: routed.gate(x[0])}
        calls |= {
            f"{way} {top_k}": lambda way=way, top_k=top_k, capacity=capacity: run(way, top_k, capacity)
            for way in WAYS
            for top_k in range(1, EXPERTS + 1)
        }
        cases.append({"capacity": capacity, "results": measure(calls, runs, device)})
        print(json.dumps({"tokens": tokens, **cases[-1]}), flush=True)
    return {"tokens": tokens, "errors_of_all_experts": errors, "cases": cases}


def clip_inputs(config: S2VModelConfig, size: str, device: torch.device) -> tuple[ClipInputs, torch.Tensor]:
    """Random inputs of a second clip, and its noise."""
    w, h = (int(side) // 8 for side in size.split("x"))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, device=device).bfloat16().float()

    inputs = ClipInputs(
        reference_latents=normal(16, 1, h, w),
        motion_latents=normal(16, MOTION_LATENTS, h, w),
        pose_latents=normal(16, LATENT_FRAMES, h, w),
        audio=normal(config.audio_layers, config.audio_width, 4 * LATENT_FRAMES),
        text=normal(100, config.text_width),
        motion_frames=MOTION_FRAMES,
    )
    return inputs, normal(16, LATENT_FRAMES, h, w)


def measure_model(config: S2VModelConfig, size: str, runs: int, device: torch.device) -> dict:
    """Whole forwards: dense and split, on the same weights. Both sets of feed-forwards are kept: 45 GB in all."""
    with torch.device("meta"):
        model = S2VTransformer(config)
    fill_random(model, SEED, torch.bfloat16, device)
    model.requires_grad_(False)
    inputs, noise = clip_inputs(config, size, device)
    condition = model.condition(inputs)
    blocks = model.stack.blocks
    dense = [block.feed_forward for block in blocks]
    start = time.perf_counter()
    split = plan_split(model, EXPERTS)
    seconds = time.perf_counter() - start
    for block, layer in zip(blocks, split.layers, strict=True):
        block.feed_forward = split_feed_forward(block.feed_forward, layer)
    group_products(model)
    routed = [block.feed_forward for block in blocks]

    loads: list[ExpertLoad] = []

    def forward(layers: list, routing: ExpertRouting = NO_ROUTING) -> torch.Tensor:
        for block, layer in zip(blocks, layers, strict=True):
            block.feed_forward = layer
        with routed_by(routing)(model):
            velocity = model(noise, TIMESTEP, condition)
            loads[:] = [take_load(model)]
        return velocity

    calls: dict[str, Call] = {"dense": lambda: forward(dense)}
    for top_k, capacity in MODEL_CASES:
        routing = ExpertRouting(top_k=top_k, expert_capacity=capacity)
        calls[f"{top_k} {capacity or 'unlimited'}"] = lambda routing=routing: forward(routed, routing)
    expected = forward(dense)
    errors = {name: relative_l2(call(), expected) for name, call in calls.items()}
    forward(routed, ExpertRouting(top_k=4))
    load_top_4 = loads[0]
    return {
        "size": size,
        "tokens": condition.rope.shape[0],
        "split_seconds": seconds,
        "difference_to_dense": errors,
        "load_top_4": load_top_4.to_dict(),
        "results": measure(calls, runs, device),
    }


def markdown(report: dict) -> str:
    """The report as tables: milliseconds, and peak GB over weights and input."""
    lines = [f"{report['gpu']}, torch {report['torch']}, commit {report['commit']}, median of {report['runs']}."]
    for layer in report["layers"]:
        lines += ["", f"One feed-forward, {layer['tokens']:,} tokens, ms (peak GB)", ""]
        lines += ["| capacity | way | dense | " + " | ".join(f"top {k}" for k in range(1, EXPERTS + 1)) + " |"]
        lines += ["|---" * (EXPERTS + 3) + "|"]
        for case in layer["cases"]:
            for way in WAYS:
                cells = ["dense", *(f"{way} {k}" for k in range(1, EXPERTS + 1))]
                found = [case["results"][cell] for cell in cells]
                texts = [f"{one['ms']:.1f} ({one['peak'] / 1e9:.2f})" for one in found]
                lines.append(f"| {case['capacity'] or 'unlimited'} | {way} | " + " | ".join(texts) + " |")
        errors = ", ".join(f"{name} {value:.5f}" for name, value in layer["errors_of_all_experts"].items())
        lines += ["", f"Relative L2 to float32, all experts: {errors}."]
    if model := report.get("model"):
        lines += ["", f"A whole forward at {model['size']}, {model['tokens']:,} tokens", ""]
        lines += ["| top_k, capacity | ms | peak GB | difference to dense |", "|---|---|---|---|"]
        for name, one in model["results"].items():
            difference = model["difference_to_dense"][name]
            lines.append(f"| {name} | {one['ms']:.0f} | {one['peak'] / 1e9:.2f} | {difference:.5f} |")
        lines += ["", f"Finding the groups of all layers took {model['split_seconds']:.1f} s."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[34_500, 79_200])
    parser.add_argument("--size", default="832x480", help="of the whole forwards")
    parser.add_argument("--skip-model", action="store_true", help="no whole forwards")
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--hidden", type=int, default=13824)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(SEED)
    injected = tuple(block for block in S2VModelConfig.injected_blocks if block < options.blocks)
    config = S2VModelConfig(
        width=options.width,
        feed_forward_width=options.hidden,
        heads=max(1, options.width // 128),
        blocks=options.blocks,
        injected_blocks=injected,
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report = {"gpu": name, "torch": torch.__version__, "commit": options.commit, "runs": options.runs}
    with torch.inference_mode():
        report["layers"] = [measure_layer(config, tokens, options.runs, device) for tokens in options.tokens]
        if not options.skip_model:
            report["model"] = measure_model(config, options.size, options.runs, device)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "experts.md").write_text(markdown(report))
    print(markdown(report))


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
