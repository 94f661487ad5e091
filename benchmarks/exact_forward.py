"""One exact second-clip forward of the 14B model at real size: its error, and its time beside ComfyUI's.

    python benchmarks/exact_forward.py [--comfyui DIR] [--sizes 832x480 1280x704] [--out FOLDER]

Random weights. `--comfyui` names a ComfyUI checkout, whose native S2V port then runs on the same weights in turn
with ours. The error is against float32 at the first size, beside the same model under the reference's precision
rules. Needs a CUDA card with 140 GB for the error (`--skip-error` otherwise: 48 GB). Time against the card's ceilings,
other precisions and other parts: `python -m wan_s2v_core bench`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.attach import accelerated  # noqa: E402
from wan_s2v_core.bench.engine import AccelerationPlan, build_short_dit, make_inputs, with_blocks  # noqa: E402
from wan_s2v_core.bench.flops import ForwardShape  # noqa: E402
from wan_s2v_core.bench.measure import interleaved, read_commit, relative_l2  # noqa: E402
from wan_s2v_core.config import S2VModelConfig  # noqa: E402
from wan_s2v_core.model.attention import EXACT_BACKENDS  # noqa: E402
from wan_s2v_core.model.checkpoint import dit_name  # noqa: E402
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer  # noqa: E402
from wan_s2v_core.model.pointwise import Pointwise  # noqa: E402

RUNS, TIMESTEP = 5, 723.0
CARD, EXACT = torch.device("cuda"), AccelerationPlan()


def peak_bytes(call) -> int:
    """Peak of the allocator above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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
        return torch.view_as_real(pairs * torch.view_as_complex(rope.double())[:, None]).flatten(-2).float()


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


def measure_error(config: S2VModelConfig, shape: ForwardShape) -> dict[str, float]:
    """Relative L2 to float32 of our bfloat16 model and of the reference's precision rules, same weights and inputs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    inputs, noise = make_inputs(config, shape, CARD)

    def forward(model):
        return model(noise, TIMESTEP, model.condition(inputs))

    model = build_short_dit(config, "float32", CARD)
    with accelerated(model, EXACT):
        exact = forward(model)
    by_rules = under_reference_rules(model, forward)
    del model
    torch.cuda.empty_cache()
    model = build_short_dit(config, "bfloat16", CARD)
    with accelerated(model, EXACT):
        ours = forward(model)
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


def measure_size(model: S2VTransformer, shape: ForwardShape, comfyui: Path | None) -> dict:
    inputs, noise = make_inputs(model.config, shape, CARD)
    condition = model.condition(inputs)
    calls = {"ours": lambda: model(noise, TIMESTEP, condition)}
    if comfyui:
        calls["comfyui"] = comfyui_forward(comfyui, model, model.config, inputs, noise)
    times = interleaved(calls, RUNS, CARD)
    result = {
        "width": shape.width_px,
        "height": shape.height_px,
        "tokens": shape.tokens(),
        "runs": RUNS,
        "ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "all_ms": {name: [1e3 * seconds for seconds in values] for name, values in times.items()},
        "activation_bytes": {name: peak_bytes(call) for name, call in calls.items()},
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    if comfyui:
        result["ratio_to_comfyui"] = result["ms"]["ours"] / result["ms"]["comfyui"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x704"])
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--skip-error", action="store_true")
    parser.add_argument("--blocks", type=int, default=40, help="fewer for a quick look")
    parser.add_argument("--commit", default=read_commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # ComfyUI reads it
    shapes = [ForwardShape(*map(int, size.split("x"))) for size in options.sizes]
    config = with_blocks(S2VModelConfig(), options.blocks)

    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": options.commit, "cases": []}
    with torch.inference_mode():
        if not options.skip_error:
            report["error"] = measure_error(config, shapes[0])
            print(json.dumps(report["error"]), flush=True)
        model = build_short_dit(config, "bfloat16", CARD)
        with accelerated(model, EXACT):
            for shape in shapes:
                report["cases"].append(measure_size(model, shape, options.comfyui))
                print(json.dumps(report["cases"][-1]), flush=True)
    (options.out / "exact_forward.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
