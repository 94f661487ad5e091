"""The command line: `python -m wan_s2v_core COMMAND`.

Results go to stdout (with `--json` exactly one JSON value), logs to stderr. Exit 0: fine; 1: a check failed; 2: wrong
usage or unreadable input; 130: stopped by the user.
"""

import argparse
import io
import json
import logging
import math
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import ALWAYS, AUTO, REFERENCE_PRESET, preset_lines
from .errors import ConfigError, WanS2VError, shown
from .libraries import library_problem

if TYPE_CHECKING:
    from .bench.cases import BenchRequest
    from .config import AccelerationPlan, ExpertRouting, MemoryLimits, SamplingConfig, VideoConfig
    from .render import RenderRequest

log = logging.getLogger(__name__)

FINE, CHECK_FAILED, UNUSABLE, STOPPED = 0, 1, 2, 130
NEW_SEED = -1
MOST_DIGITS = 20
LONGEST_MESSAGE = 300


def run_verify(options: argparse.Namespace) -> int:
    from .verify import verify

    results = verify(options.folder, options.device)
    passed = sum(result.passed for result in results)
    failed = len(results) - passed
    if options.json:
        cases = [result.to_dict() for result in results]
        print(
            json.dumps(
                {"device": options.device, "dtype": "float32", "cases": cases, "passed": passed, "failed": failed}
            )
        )
    else:
        for result in results:
            print(result.line())
        print(f"{passed} passed, {failed} failed")
    return CHECK_FAILED if failed else FINE


def run_inspect(options: argparse.Namespace) -> int:
    from .inspection import inspect_path, is_complete, render

    report = inspect_path(options.path)
    print(json.dumps(report) if options.json else render(report))
    return FINE if is_complete(report) else CHECK_FAILED


def run_generate(options: argparse.Namespace) -> int:
    from .assets import PORTRAIT, embedded
    from .config import AccelerationPlan, ExpertRouting, MemoryLimits, VideoConfig
    from .io.video_clips import earlier_seed
    from .render import RenderRequest, forecast_render

    for flag, needs in NOT_YET.items():
        if getattr(options, flag) and (flag, options.ulysses_size) != ("ulysses_size", 1):  # one card is what there is
            raise ConfigError(f"--{flag} is not included: it comes with {needs}. Leave it out.")
    if options.image is None:
        log.warning("no --image is given: the portrait that comes with the pack is used")
    request = RenderRequest(
        checkpoint=options.ckpt_dir,
        audio=options.audio,
        image=options.image or str(embedded(PORTRAIT)),
        save_file=options.save_file or time.strftime("s2v_%Y%m%d_%H%M%S.mp4"),
        prompt=readable(options.prompt),
        pose_video=options.pose_video,
        audio_start=options.audio_start,
        audio_seconds=options.audio_seconds,
        device=options.device or best_device(),
        precision=options.precision or ("bfloat16" if options.convert_model_dtype else "auto"),
        offload=ALWAYS if options.offload_model else AUTO,
        text_on_cpu=options.t5_cpu,
        text_precision=options.t5_precision,
        keep_clips=options.keep_clips,
        noise_expert=options.noise_expert,
        cache_dir=options.cache_dir,
        metadata=not options.no_metadata,
        **({} if options.negative_prompt is None else {"negative_prompt": readable(options.negative_prompt)}),
    )
    video = VideoConfig(
        max_area=parse_size(options.size),
        fps=options.fps,
        clip_frames=options.infer_frames,
        fit=options.fit,
        timing=options.timing,
        clip_plan=options.clip_plan,
        starts_from_reference=options.start_from_ref,
        clips=options.num_clip,
        hears_past=options.hear_past,
    )
    if options.base_seed < NEW_SEED:
        raise ConfigError(f"--base_seed {options.base_seed} is below {NEW_SEED}, which draws a new one. Use 0 or more.")
    seed = earlier_seed(Path(request.save_file)) if options.base_seed == NEW_SEED else options.base_seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    sampling = sampling_of(options, seed)
    routing = ExpertRouting(
        top_k=options.moe_top_k,
        expert_capacity=options.moe_expert_capacity,
        overflow=options.moe_overflow,
        gate_dropout=options.moe_gate_dropout,
        gate_dropout_seed=sampling.seed if options.moe_gate_dropout else None,
    )
    acceleration = AccelerationPlan(
        attention=options.attention,
        sparse_keep=options.sparse_keep,
        sparse_by=options.sparse_by,
        sparse_dense_steps=options.sparse_dense_steps,
        sparse_dense_blocks=options.sparse_dense_blocks,
        fused=options.fused,
        vae=options.vae_precision,
    )
    limits = MemoryLimits(
        options.vram_limit_gb, options.resident_blocks, options.slice_tokens, options.vae_tile, options.weights
    )
    if options.dry_run:
        found = forecast_render(request, video, sampling, acceleration, limits)
        print(json.dumps([stage.to_dict() for stage in found]) if options.json else "\n".join(map(str, found)))
        return CHECK_FAILED if any(stage.error for stage in found) else FINE
    return make_video(request, video, sampling, options.json, routing, acceleration, limits)


def sampling_of(options: argparse.Namespace, seed: int) -> "SamplingConfig":
    """The preset, but for what was asked for by a flag of its own."""
    from .config import NOISE_BOUNDARY, sampling_preset

    guidance, boundary = options.sample_guide_scale, options.noise_boundary
    if options.noise_expert and boundary is None:
        boundary = NOISE_BOUNDARY
    steps = options.sample_steps
    if options.timesteps and steps is None:
        steps = len(options.timesteps)
    asked = {
        "steps": steps,
        "shift": options.sample_shift,
        "solver": options.sample_solver,
        "guidance_scale": None if guidance is None else max(1.0, guidance),
    }
    return replace(
        sampling_preset(options.preset),
        **{name: value for name, value in asked.items() if value is not None},
        spacing=options.spacing,
        timesteps=options.timesteps,
        audio_guidance_scale=options.audio_guide_scale,
        seed=seed,
        noise=options.noise,
        colour_match=options.colour_match,
        noise_boundary=boundary,
    )


def run_demo(options: argparse.Namespace) -> int:
    from .assets import CHECKPOINT, DEMO_PROMPT, DEMO_SAMPLING, DEMO_SIDE_PX, PORTRAIT, VOICE, embedded
    from .config import VideoConfig
    from .render import RenderRequest

    request = RenderRequest(
        checkpoint=str(embedded(CHECKPOINT)),
        audio=options.audio or str(embedded(VOICE)),
        image=options.image or str(embedded(PORTRAIT)),
        save_file=options.save_file,
        prompt=DEMO_PROMPT,
        device=best_device(),
    )
    log.warning("the embedded model is tiny and has learned drawn faces alone: no preview of the 14B model's quality")
    return make_video(request, VideoConfig(max_area=DEMO_SIDE_PX**2), DEMO_SAMPLING, options.json)


def make_video(
    request: "RenderRequest",
    video: "VideoConfig",
    sampling: "SamplingConfig",
    as_json: bool,
    routing: "ExpertRouting | None" = None,
    acceleration: "AccelerationPlan | None" = None,
    limits: "MemoryLimits | None" = None,
) -> int:
    from .io.video_clips import clips_folder
    from .render import render

    try:
        report = render(request, video, sampling, None if as_json else show_step, routing, acceleration, limits)
    except KeyboardInterrupt:
        folder = clips_folder(Path(request.save_file))
        print(f"\nfinished clips: {folder if folder.exists() else 'none'}", file=sys.stderr)
        raise
    print(json.dumps(report.to_dict()) if as_json else report.path)
    return FINE


def show_step(clip: int, clips: int, step: int) -> None:
    print(f"\rclip {clip} of {clips}, step {step} ", end="", file=sys.stderr, flush=True)


def run_quality(options: argparse.Namespace) -> int:
    from .bench.quality import QualityRequest, measure

    names = ("video", "audio", "against", "reference", "clip_frames", "lpips_weights")
    report = measure(QualityRequest(**{name: getattr(options, name) for name in names}))
    print(json.dumps(report.to_dict()) if options.json else "\n".join(report.lines()))
    return FINE


def run_bench(options: argparse.Namespace) -> int:
    from .bench.comparison import compare, read_results
    from .bench.prediction import parse_other_card, predict
    from .bench.run import Output, plan_run, run_cases

    request = bench_request(options)
    before = read_results(options.against) if options.against else None
    cards = [parse_other_card(text) for text in options.predict]
    planned = plan_run(request)
    refused = [plan for plan in planned if plan.refusal]
    if options.dry_run:
        told = [plan.to_dict() for plan in planned]
        print(json.dumps(told) if options.json else "\n".join(plan.line() for plan in planned))
        return CHECK_FAILED if refused else FINE
    if len(refused) == len(planned):
        raise ConfigError(f"{refused[0].case.label()}: {refused[0].refusal}")

    output = Output(options.out, shlex.join(["python", "-m", "wan_s2v_core", *options.arguments]))
    entries: list[dict[str, Any]] = []
    try:
        for plan, entry in zip(planned, run_cases(request, planned, options.commit), strict=True):
            entries.append(entry)
            output.save(entries)
            if not options.json:
                seconds = entry["error"] or f"{entry['seconds_total']:.4g} s"
                print(f"{len(entries)} of {len(planned)}: {plan.case.label()}: {seconds}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"\n{len(entries)} of {len(planned)} cases are in {output.folder / 'bench.json'}", file=sys.stderr)
        raise
    against = compare(before, entries) if before is not None else None
    text = output.finish(entries, against, [found for card in cards for found in predict(entries, card)])
    print(json.dumps(entries) if options.json else text)
    is_slower = bool(against and against.regressions)
    return CHECK_FAILED if is_slower or any(entry["error"] for entry in entries) else FINE


def bench_request(options: argparse.Namespace) -> "BenchRequest":
    from .bench.cases import BenchRequest
    from .bench.engine import DEMO_MODEL, ModelSource

    device = options.device or best_device()
    source = ModelSource(options.model, options.ckpt_dir)
    if device == "cpu" and not (options.device or options.dry_run or source.path):
        raise ConfigError(
            "there is no CUDA card here, and the 14B model takes minutes a forward on a CPU. Use "
            f"--model {DEMO_MODEL}, which takes seconds, or --device cpu if you mean it."
        )
    tuples = {"cases": "cases", "sizes": "sizes", "way": "ways", "precision": "precisions", "attention": "attentions"}
    tuples |= {"keep": "keeps", "growth_tokens": "growth_tokens"}
    given = {field: tuple(getattr(options, name)) for name, field in tuples.items() if getattr(options, name)}
    same = ("runs", "frames", "clip_frames", "steps", "guidance", "measured_steps", "full", "offload", "growth_blocks")
    given |= {name: getattr(options, name) for name in same}
    return BenchRequest(source=source, device=device, memory_gb=options.memory_gb, **given)


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_size(text: str) -> int:
    """1280*720 or 1280x720 -> the area it bounds."""
    sides = re.fullmatch(r"([0-9]{1,9})[*xX]([0-9]{1,9})", text.strip())
    if not sides:
        raise ConfigError(f"--size {shown(text)} is no size. Write it as 1280*720 or 832x480.")
    return int(sides[1]) * int(sides[2])


def whole(text: str) -> int:
    """A whole number as a flag gives it; what it may be says the setting that it is for."""
    if not re.fullmatch(r"\s*[+-]?[0-9][0-9_]*\s*", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number")
    if len(text.strip()) > MOST_DIGITS + 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} has more than {MOST_DIGITS} digits")
    return int(text)


def number(text: str) -> float:
    """A number as a flag gives it: neither infinite nor not a number."""
    try:
        value = float(text) if len(text) <= LONGEST_MESSAGE else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Numbers as a flag gives them, with commas between them."""
    try:
        return tuple(number(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)}: write numbers as 1000,750,500,250") from error


def readable(text: str) -> str:
    """Words of the command line where the locale cannot read them, which are UTF-8 nearly everywhere."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def yes_or_no(text: str) -> bool:
    """The reference's flags take True and False as words."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither True nor False")
    return words[text.lower()]


NO_SPEECH_SYNTHESIS = "no version of this pack; bring the voice as a file with --audio"
NOT_YET = {
    "dit_fsdp": "the multi-GPU runner",
    "t5_fsdp": "the multi-GPU runner",
    "ulysses_size": "the multi-GPU runner",
    "enable_tts": NO_SPEECH_SYNTHESIS,
    "tts_prompt_audio": NO_SPEECH_SYNTHESIS,
    "tts_prompt_text": NO_SPEECH_SYNTHESIS,
    "tts_text": NO_SPEECH_SYNTHESIS,
    "use_prompt_extend": "no version of this pack; write the longer prompt yourself",
}


def add_generate(commands, common: argparse.ArgumentParser) -> None:
    """The reference's flags, so that its commands run as they stand, and ours."""
    make = commands.add_parser("generate", parents=[common], help="make a video from a voice, a picture and a prompt")
    make.set_defaults(run=run_generate)
    add = make.add_argument
    add("--task", default="s2v-14B", choices=["s2v-14B"])
    add("--ckpt_dir", required=True, help="folder of Wan2.2-S2V-14B, or one in its layout")
    add("--audio", required=True, help="recording; any format that FFmpeg reads, also the sound of a video")
    add("--image", help="reference picture; a drawn portrait by default")
    add("--prompt", default="", help="what is to be seen")
    add("--negative_prompt", help="what is not; the reference's by default")
    add("--save_file", help="the video; s2v_TIME.mp4 by default")
    add("--size", default="1280*720", help="bound of the area; the picture gives the aspect (default %(default)s)")
    add("--pose_video", help="driving video")
    add("--num_clip", type=whole, help="at most this many clips")
    add("--infer_frames", type=whole, default=80, help="frames of a clip, a multiple of 4 (default %(default)s)")
    presets = "; ".join(preset_lines())
    add("--preset", default=REFERENCE_PRESET, help=f"settings that the next four flags change. {presets}")
    add("--sample_steps", type=whole, help="instead of the preset's")
    add("--sample_shift", type=number, help="3 at 480p, 5 at 720p; instead of the preset's")
    add("--sample_solver", help="unipc, dpm++ or euler; instead of the preset's")
    add("--sample_guide_scale", type=number, help="1 or less: no guidance; instead of the preset's")
    add("--base_seed", type=whole, default=NEW_SEED, help="-1: a new one, or that of a run to go on with")
    add("--dry_run", action="store_true", help="only tell how each stage would fit into the card now; exit 1: not")
    add("--start_from_ref", action="store_true", help="the video begins as the picture")
    add(
        "--offload_model",
        type=yes_or_no,
        default=False,
        metavar="BOOL",
        help="True: each network leaves the GPU after its stage. Otherwise it stays until another needs its room",
    )
    add("--convert_model_dtype", action="store_true", help="bfloat16 also on a CPU")
    add("--t5_cpu", action="store_true", help="text encoder on the CPU")
    add(
        "--audio_guide_scale", type=number, help="guidance of the voice apart from the prompt's; a third forward a step"
    )
    add("--spacing", default="flow", help="of the noise levels: flow or karras")
    add(
        "--timesteps",
        type=numbers,
        metavar="LIST",
        help="those of the steps themselves, such as 1000,750,500,250, for models that were trained for few steps; "
        "instead of a number of steps, shift and spacing",
    )
    add("--audio_start", type=number, default=0.0, help="seconds to leave out at the start of the recording")
    add("--audio_seconds", type=number, help="seconds to use of it")
    add("--fps", type=number, default=16.0, help="the model was trained for 16")
    add("--fit", default="crop", help="picture to frame: crop, pad or reference")
    add("--timing", default="aligned", help="aligned, or reference: pictures 3 frames ahead of the sound")
    add("--clip_plan", default="audio", help="audio: as long as the sound; reference: whole clips")
    add("--device", help="cuda if there is a card, else cpu")
    add(
        "--precision",
        help="bfloat16 (default on a GPU), float16 (default on RTX 20 and older), float32 (default on a CPU), "
        "float8-weights (half the memory), or products in 8 "
        "bits too: float8 (RTX 40, H100 and later) or "
        "int8 (RTX 30, A100 and later)",
    )
    add("--noise", default="cpu", help="cpu: the same on every device; reference: bfloat16, drawn on the device")
    add(
        "--colour_match",
        type=number,
        default=0.0,
        help="0 to 1: give every clip the picture's colours, against drift over many clips (default %(default)s)",
    )
    add("--hear_past", action="store_true", help="a clip hears what was said before it, not its first moment held")
    add("--no_metadata", action="store_true", help="the video does not say in its comment how it was made")
    add("--keep_clips", action="store_true", help="keep the lossless clips, latents and settings next to the video")
    add(
        "--cache_dir",
        metavar="FOLDER",
        help="keep encoded voices (3 MB a second) and prompts there: later runs with the same ones load no encoder",
    )
    for flag in ("dit_fsdp", "t5_fsdp", "enable_tts", "use_prompt_extend"):
        add(f"--{flag}", action="store_true", help=argparse.SUPPRESS)
    add("--ulysses_size", type=number, default=0, help=argparse.SUPPRESS)
    add_experts(make)
    add_noise_experts(make)
    add_memory(make)
    add_speed(make)
    for flag in ("tts_prompt_audio", "tts_prompt_text", "tts_text"):
        add(f"--{flag}", help=argparse.SUPPRESS)


def add_experts(make: argparse.ArgumentParser) -> None:
    """What models with experts take; a dense one says that they do nothing there."""
    experts = make.add_argument_group("experts", "for checkpoints with experts")
    add = experts.add_argument
    add("--moe_top_k", type=whole, help="experts that a token sees; as the checkpoint says by default")
    add("--moe_expert_capacity", type=whole, help="tokens that an expert takes at once (bounds memory); all by default")
    add("--moe_overflow", default="spill", help="beyond capacity: spill into further rounds (exact), or drop")
    add("--moe_gate_dropout", type=number, default=0.0, help="share of expert choices to hide; lowers fidelity")


def add_speed(make: argparse.ArgumentParser) -> None:
    """How networks are made faster."""
    from .config import SPARSE_BY_SCORES, SPARSE_CHOICES, VAE_WAYS, AccelerationPlan

    usual = AccelerationPlan()
    speed = make.add_argument_group("speed", "exact unless said otherwise; see also --precision float8 and int8")
    add = speed.add_argument
    add(
        "--attention",
        default=usual.attention,
        help="auto: the fastest exact one here; auto8: the fastest in 8 bits; or one of flash4, hopper, sdpa, triton "
        "(exact), hopper8, sage, triton8 (8 bits)",
    )
    add(
        "--sparse_keep",
        type=number,
        default=usual.sparse_keep,
        help="share of attention that is computed; lossy below 1 (default %(default)s)",
    )
    add(
        "--sparse_by",
        default=SPARSE_BY_SCORES,
        choices=SPARSE_CHOICES,
        help="what is kept: what queries and keys say, or what is near (default %(default)s)",
    )
    add(
        "--sparse_dense_steps",
        type=whole,
        default=usual.sparse_dense_steps,
        help="first steps of a clip that compute all of it (default %(default)s)",
    )
    add(
        "--sparse_dense_blocks",
        type=whole,
        default=usual.sparse_dense_blocks,
        help="first blocks that do (default %(default)s)",
    )
    add(
        "--fused",
        type=yes_or_no,
        default=True,
        metavar="True|False",
        help="one kernel for each step between products, on a card with Triton (default True)",
    )
    add(
        "--vae_precision",
        default=usual.vae,
        choices=VAE_WAYS,
        help="auto: bfloat16 with kernels of our own on a card, unless --precision is float32",
    )


def add_memory(make: argparse.ArgumentParser) -> None:
    """How a run fits into a card; it is decided by what is free unless these say otherwise."""
    from .config import AUTO, WEIGHT_PLACES

    memory = make.add_argument_group(
        "memory", "decided by what is free; results are the same up to rounding, whatever is chosen here"
    )
    add = memory.add_argument
    add("--vram_limit_gb", type=number, metavar="GB", help="as if the card had so much, such as 8 or 12")
    add(
        "--resident_blocks", type=whole, metavar="N", help="blocks of the DiT that stay on the card; others come and go"
    )
    add("--slice_tokens", type=whole, metavar="N", help="tokens that the DiT computes at once; 0: all")
    add(
        "--t5_precision",
        default=AUTO,
        help="float8-weights: 7.8 instead of 11.4 GB for the text encoder, lossy (default %(default)s)",
    )
    add("--vae_tile", type=whole, metavar="PX", help="side of the VAE's tiles, a multiple of 8; 0: whole pictures")
    add(
        "--weights",
        default=AUTO,
        choices=WEIGHT_PLACES,
        help="where weights wait that come and go: locked in main memory is fastest, mapped from their file takes none "
        "of it (default %(default)s, by what is free)",
    )


def add_noise_experts(make: argparse.ArgumentParser) -> None:
    """What pairs of models take, one for high noise and one for low."""
    from .config import NOISE_BOUNDARY

    pair = make.add_argument_group("noise experts", "for S2V models that were trained as a pair; S2V-14B is one model")
    add = pair.add_argument
    add("--noise_expert", help="file or folder of a second S2V DiT, for the steps of low noise")
    add(
        "--noise_boundary",
        type=number,
        help=f"noise level from which on the model of --ckpt_dir serves, between 0 and 1 (default {NOISE_BOUNDARY})",
    )


def add_quality(commands, common: argparse.ArgumentParser) -> None:
    judge = commands.add_parser(
        "quality", parents=[common], help="measure lip sync, drift, seams and flicker of a video"
    )
    judge.set_defaults(run=run_quality)
    add = judge.add_argument
    add("video", type=Path, help="a video with a talking head")
    add("--audio", type=Path, help="the voice; the video's own sound by default")
    add("--against", type=Path, help="another video of the same size and length: PSNR, SSIM and LPIPS to it")
    add("--reference", type=Path, help="the picture that the face should keep to; the first clip by default")
    add("--clip_frames", type=whole, help="frames of a clip; read from the file by default")
    add("--lpips_weights", type=Path, help="state dict of lpips.LPIPS(net='alex')")


def add_bench(commands, common: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="measure this device: forwards, whole videos, VAE and encoders against what it can do at most",
        description="Without a checkpoint the 14B model has random weights: times are real, pictures are not. "
        "Exit 1: a case failed, or --against found a slower one.",
    )
    bench.set_defaults(run=run_bench)
    add = bench.add_argument
    add("--cases", nargs="+", metavar="CASE", help="forward, article, vae, encoders, load, growth or all; a quick few")
    add("--sizes", nargs="+", metavar="WxH", help="832x480 and 1280x704 by default; 64x64 for the demo")
    add("--precision", nargs="+", metavar="NAME", help="one or more, as for generate")
    add("--attention", nargs="+", metavar="NAME", help="one or more attention backends")
    add("--keep", nargs="+", type=number, metavar="SHARE", help="share of the attention that is computed; 1 is all")
    add(
        "--way",
        nargs="+",
        metavar="P[:A[:K]]",
        help="precision, attention and share together, such as bfloat16 float8:auto:0.5; in place of the three",
    )
    add("--runs", type=whole, default=5, help="of which the median counts (default %(default)s)")
    add("--model", default="14B", help="14B, or demo: the embedded one, for a CPU (default %(default)s)")
    add("--ckpt_dir", help="folder of Wan2.2-S2V-14B, or one in its layout; random weights without")
    add("--device", help="cuda if there is a card")
    add("--memory_gb", type=number, help="with --dry_run: what would fit into so much")
    add("--dry_run", action="store_true", help="list the cases with the work and memory they are predicted to need")
    add("--out", type=Path, default=Path("bench"), help="folder for bench.json, bench.md and the plot (default bench)")
    add("--against", type=Path, metavar="FILE", help="bench.json of an earlier run: what became slower")
    add(
        "--predict",
        nargs="+",
        default=[],
        metavar="CARD",
        help="another card: its bench.json, or measured ceilings such as bf16_tflops=300,attention_tflops=250",
    )
    add("--commit", help="to record, where the checkout has no git history")
    article = bench.add_argument_group(
        "article", "a whole video; estimated from a few steps of a clip without a past and of one with it"
    )
    add = article.add_argument
    add("--frames", type=whole, default=240, help="whole clips (default %(default)s)")
    add("--clip_frames", type=whole, default=80, help="of a clip, here and in forwards (default %(default)s)")
    add("--steps", type=whole, default=50, help="default %(default)s")
    add("--guidance", type=number, default=4.5, help="1: one forward a step instead of two (default %(default)s)")
    add("--measured_steps", type=whole, default=2, help="steps to run of each kind of clip (default %(default)s)")
    add("--full", action="store_true", help="run all of it: an hour at 720p with exact bfloat16")
    add("--offload", action="store_true", help="networks wait in main memory, as generate does by default")
    growth = bench.add_argument_group("growth", "the time of a forward over nine numbers of tokens")
    add = growth.add_argument
    add("--growth_tokens", type=whole, nargs=2, metavar=("FEW", "MANY"), help="5000 300000 by default")
    add("--growth_blocks", type=whole, default=2, help="of the DiT; all cost the same (default %(default)s)")


class Parser(argparse.ArgumentParser):
    """What cannot be parsed is one line, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{shown(message, LONGEST_MESSAGE)}. See {self.prog} --help.")


def common_flags() -> argparse.ArgumentParser:
    """Those of every command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--verbose", action="store_true", help="log what is chosen, on stderr")
    return common


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m wan_s2v_core", description="Wan2.2-S2V: speech to video.")
    commands, common = parser.add_subparsers(required=True, metavar="COMMAND"), common_flags()
    check = commands.add_parser("verify", parents=[common], help="compare with golden tensors of the reference")
    check.add_argument("folder", type=Path, help="folder with golden cases, searched to any depth")
    check.add_argument("--device", default="cpu", help="torch device; the limits are for cpu (default)")
    check.set_defaults(run=run_verify)

    look = commands.add_parser("inspect", parents=[common], help="say what a weights file or folder is")
    look.add_argument("path", type=Path, help="weights file or checkpoint folder")
    look.set_defaults(run=run_inspect)
    add_generate(commands, common)
    add_quality(commands, common)
    add_bench(commands, common)

    show = commands.add_parser("demo", parents=[common], help="run the embedded tiny model on the embedded voice")
    show.add_argument("--audio", help="another recording")
    show.add_argument("--image", help="another picture")
    show.add_argument("--save_file", default="demo.mp4", help="default %(default)s")
    show.set_defaults(run=run_demo)
    return parser


def main(
    arguments: Sequence[str] | None = None,
    rank: str = "0",
    ranks: str = "1",
    stopped: Callable[[], bool] = lambda: False,
    parser: Callable[[], argparse.ArgumentParser] = make_parser,
) -> int:
    """Run a command -> the exit code.

    Args:
        rank, ranks: which of how many processes this is, where torchrun has started several for one command.
        stopped: whether Ctrl-C was pressed. Libraries that it meets while they load may raise something else.
        parser: makes what reads the words; each command sets `run`, options -> exit code.
    """
    given = sys.argv[1:] if arguments is None else [*arguments]
    as_json = "--json" in given
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    try:
        options = parser().parse_args(given)
        options.arguments = given
        logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, stream=sys.stderr)
        if rank != "0":
            print(f"process {rank} of {ranks} has nothing to do: the first one makes the video alone.", file=sys.stderr)
            return FINE
        if ranks != "1":
            log.warning("of %s processes the first makes the video alone: several GPUs for one are not included", ranks)
        if problem := library_problem():
            return give_up(problem, UNUSABLE, as_json)
        return options.run(options)
    except WanS2VError as error:
        if stopped():
            return give_up("stopped.", STOPPED, as_json)
        return give_up(str(error), UNUSABLE, as_json)
    except OSError as error:
        where = shown(error.filename or "a file")
        return give_up(
            f"{where} cannot be used: {error.strerror}. Check the path and its permissions.", UNUSABLE, as_json
        )
    except KeyboardInterrupt:
        return give_up("stopped.", STOPPED, as_json)


def give_up(reason: str, code: int, as_json: bool) -> int:
    print(f"error: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": reason}))
    return code
