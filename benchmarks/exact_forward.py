"""One exact second-clip forward of the 14B model at real size: time, memory and error, beside its peer and ceilings.

    python benchmarks/exact_forward.py [--comfyui DIR] [--sizes 832x480 1280x704] [--out FOLDER]

Random weights. `--comfyui` names a ComfyUI checkout, whose native S2V port then runs on the same weights in turn
with ours. The error is against float32 at the first size, beside the same model under the reference's precision
rules. Needs a CUDA card with 140 GB for the error (`--skip-error` otherwise: 48 GB).
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.bench.random_weights import fill_random  # noqa: E402
from wan_s2v_core.config import S2VModelConfig  # noqa: E402
from wan_s2v_core.model.attention import EXACT_BACKENDS, sdpa  # noqa: E402
from wan_s2v_core.model.block import Pointwise  # noqa: E402
from wan_s2v_core.model.checkpoint import dit_name  # noqa: E402
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer  # noqa: E402

RUNS, TIMESTEP, SEED = 5, 723.0, 7
LATENT_FRAMES, MOTION_LATENTS, MOTION_FRAMES = 20, 19, 73


def make_inputs(config: S2VModelConfig, width_px: int, height_px: int) -> tuple[ClipInputs, torch.Tensor]:
    """Random inputs of a second clip, and its noise."""
    generator = torch.Generator("cuda").manual_seed(SEED)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16().float()

    h, w = height_px // 8, width_px // 8
    inputs = ClipInputs(
        reference_latents=normal(1, 16, 1, h, w),
        motion_latents=normal(1, 16, MOTION_LATENTS, h, w),
        pose_latents=normal(1, 16, LATENT_FRAMES, h, w),
        audio=normal(1, config.audio_layers, config.audio_width, 4 * LATENT_FRAMES),
        text=normal(1, 100, config.text_width),
        motion_frames=MOTION_FRAMES,
    )
    return inputs, normal(1, 16, LATENT_FRAMES, h, w)


def milliseconds(call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def interleaved(calls: dict, runs: int = RUNS) -> dict[str, list[float]]:
    """Each call in turn, `runs` times after one warm-up."""
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    times = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return times


def peak_bytes(call) -> int:
    """Peak of the allocator above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(config: S2VModelConfig, tokens: int) -> dict[str, float]:
    """TFLOP/s of this card at this size: the products of a block, and exact attention."""
    e, f = config.width, config.feed_forward_width
    rates = {}
    for name, (inner, outer) in {"square": (e, e), "up": (e, f), "down": (f, e)}.items():
        a = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
        ms = statistics.median(interleaved({name: lambda a=a, b=b: F.linear(a, b)}, 10)[name])
        rates[f"gemm_{name}"] = 2 * tokens * inner * outer / ms / 1e9
        del a, b
    q, k, v = (
        torch.randn(1, tokens, config.heads, config.head_width, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    ms = statistics.median(interleaved({"attention": lambda: sdpa(q, k, v, None)})["attention"])
    rates["attention"] = 4 * tokens**2 * e / ms / 1e9
    return rates


def profile(call) -> dict[str, float]:
    """Milliseconds of one call by kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    split, top = {"attention": 0.0, "linears": 0.0, "other": 0.0}, {}
    for event in record.key_averages():
        name, ms = event.key, event.self_device_time_total / 1e3
        low = name.lower()
        is_attention = any(part in low for part in ("sdpa", "flash", "fmha", "attention"))
        kind = "attention" if is_attention else "linears" if "gemm" in low or "nvjet" in low else "other"
        split[kind] += ms
        top[name[:110]] = ms
    return split | {"top": dict(sorted(top.items(), key=lambda item: -item[1])[:12])}


class ReferenceRMSNorm(torch.nn.Module):
    """Statistics in float32, rounded to bfloat16, then times the bfloat16 weight."""

    def __init__(self, plain: torch.nn.RMSNorm):
        super().__init__()
        self.weight, self.eps = plain.weight, plain.eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight.bfloat16()


class ReferencePointwise(Pointwise):
    """Rotation in float64, result float32; the rest is as here."""

    @staticmethod
    def rotate(x, rope):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rope[:, None].to(torch.complex128)).flatten(-2).float()


def under_reference_rules(model: S2VTransformer, forward):
    """Run `forward` on a float32 model as the reference runs: bfloat16 autocast with its float32 islands."""

    def island(function):
        def run(*arguments, **keywords):
            with torch.autocast("cuda", enabled=False):
                return function(*arguments, **keywords)

        return run

    def rounded(_, arguments):
        return (arguments[0].bfloat16().float(), *arguments[1:])

    model.audio_encoder.forward = island(model.audio_encoder.forward)
    model.head.forward = island(model.head.forward)
    model.embed_time = island(model.embed_time)
    model.stack.register_forward_pre_hook(rounded)
    for block in model.stack.blocks:
        block.pointwise = ReferencePointwise()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.RMSNorm):
                setattr(module, name, ReferenceRMSNorm(child))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return forward(model)


def relative_l2(value, reference) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def measure_error(config: S2VModelConfig, width_px: int, height_px: int) -> dict[str, float]:
    """Relative L2 to float32 of our bfloat16 model and of the reference's precision rules, same weights and inputs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    inputs, noise = make_inputs(config, width_px, height_px)

    def forward(model):
        return model(noise, TIMESTEP, model.condition(inputs))

    def build(dtype):
        with torch.device("meta"):
            model = S2VTransformer(config)
        fill_random(model, SEED, dtype, "cuda")
        return model

    model = build(torch.float32)
    exact = forward(model)
    by_rules = under_reference_rules(model, forward)
    del model
    torch.cuda.empty_cache()
    ours = forward(build(torch.bfloat16))
    errors = {"ours": relative_l2(ours, exact), "reference_rules": relative_l2(by_rules, exact)}
    return errors | {"ratio": errors["ours"] / errors["reference_rules"], "output_std": float(exact.std())}


def comfyui_forward(checkout: Path, model: S2VTransformer, config: S2VModelConfig, inputs: ClipInputs, noise):
    """ComfyUI's native port on the very same weights, in its usual bfloat16, with cuDNN attention as here."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    import comfy.ops
    from comfy.ldm.wan.model import WanModel_S2V

    with torch.device("meta"):
        port = WanModel_S2V(
            dim=config.width, ffn_dim=config.feed_forward_width, num_heads=config.heads, num_layers=config.blocks,
            dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
    weights = {dit_name(name): tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    weights |= {name: weights[name].float() for name in ("patch_embedding.weight", "patch_embedding.bias")}
    port.load_state_dict(weights, assign=True)
    to = torch.bfloat16
    context = F.pad(inputs.text, (0, 0, 0, config.text_tokens - inputs.text.shape[1])).to(to)
    keywords = {
        "audio_embed": inputs.audio.to(to),
        "reference_latent": inputs.reference_latents.to(to),
        "control_video": inputs.pose_latents.to(to),
        "reference_motion": inputs.motion_latents.to(to),
    }
    timestep = torch.tensor([TIMESTEP], device="cuda")

    def forward():
        with sdpa_kernel(EXACT_BACKENDS, set_priority=True):  # ComfyUI sets it on Windows only; without, it is slower
            return port(noise.to(to), timestep, context, **keywords)

    return forward


def measure_size(model: S2VTransformer, width_px: int, height_px: int, comfyui: Path | None) -> dict:
    config = model.config
    inputs, noise = make_inputs(config, width_px, height_px)
    condition = model.condition(inputs)
    tokens = condition.rope.shape[0]
    noisy_tokens = condition.frame_index.shape[0]
    calls = {"ours": lambda: model(noise, TIMESTEP, condition)}
    if comfyui:
        calls["comfyui"] = comfyui_forward(comfyui, model, config, inputs, noise)
    times = interleaved(calls)
    e, f, text = config.width, config.feed_forward_width, config.text_tokens
    attention_flop = config.blocks * 4 * tokens**2 * e
    cross_flop = config.blocks * 4 * tokens * text * e
    linear_flop = config.blocks * tokens * (12 * e * e + 4 * e * f)
    linear_flop += len(config.injected_blocks) * noisy_tokens * 4 * e * e
    rates = ceilings(config, tokens)
    square, up = 12 * e * e, 2 * e * f
    seconds_per_flop = square / rates["gemm_square"] + up / rates["gemm_up"] + up / rates["gemm_down"]
    mean_gemm = (square + 2 * up) / seconds_per_flop
    floor = ((attention_flop + cross_flop) / rates["attention"] + linear_flop / mean_gemm) / 1e9
    result = {
        "width": width_px, "height": height_px, "tokens": tokens, "runs": RUNS,
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "all_ms": times,
        "condition_ms": statistics.median(interleaved({"c": lambda: model.condition(inputs)}, 3)["c"]),
        "activation_bytes": {name: peak_bytes(call) for name, call in calls.items()},
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "attention_flop": attention_flop + cross_flop, "linear_flop": linear_flop,
        "ceiling_tflops": rates, "ceiling_ms": floor,
        "profile_ms": profile(calls["ours"]),
    }  # fmt: skip
    result["ceiling_share"] = floor / result["ms"]["ours"]
    if comfyui:
        result["ratio_to_comfyui"] = result["ms"]["ours"] / result["ms"]["comfyui"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x704"])
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--skip-error", action="store_true")
    parser.add_argument("--blocks", type=int, default=40, help="fewer for a quick look")
    parser.add_argument("--commit", default=commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # ComfyUI reads it
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    config = S2VModelConfig()
    if options.blocks != config.blocks:
        kept = tuple(block for block in config.injected_blocks if block < options.blocks)
        config = replace(config, blocks=options.blocks, injected_blocks=kept)

    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": options.commit, "cases": []}
    with torch.inference_mode():
        if not options.skip_error:
            report["error"] = measure_error(config, *sizes[0])
            print(json.dumps(report["error"]), flush=True)
        with torch.device("meta"):
            model = S2VTransformer(config)
        fill_random(model, SEED, torch.bfloat16, "cuda")
        for size in sizes:
            report["cases"].append(measure_size(model, *size, options.comfyui))
            print(json.dumps(report["cases"][-1]), flush=True)
    (options.out / "exact_forward.json").write_text(json.dumps(report, indent=1))


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
