"""Runs every case of a folder of golden tensors and compares with what the reference implementation gave.

A case is `NAME.safetensors` with a sidecar `NAME.json` that has an `id`; the sidecar says sizes, settings and which
weights belong to it. A case that cannot be run has failed.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .clip_denoiser import sample_clip
from .conditioning.audio import audio_embeddings, frame_indices, resample_features
from .config import SamplingConfig
from .errors import CheckpointError, ConfigError, WanS2VError
from .geometry import ClipGeometry
from .io.outside import read_json
from .io.weights import Weights, open_weights
from .model.audio_encoder import normalize_waveform
from .model.dit import ClipInputs, S2VTransformer
from .model.loading import describe, fill, find_part, load_audio_encoder, load_transformer, load_vae
from .prepare import usable_device
from .sampling.clips import generate_clips
from .sampling.solvers import SolverState, make_solver

METRICS = REL_L2, MAX_ABS, EXACT = "rel_l2", "max_abs", "exact"
BOUNDS_FILE = "thresholds.json"
BOUNDS: dict[str, dict[str, dict[str, float | bool]]] = {
    "dit_forward": {
        "output": {REL_L2: 2e-6},
        "tap.audio_global_full": {REL_L2: 1e-5},
        "tap.audio_local_full": {REL_L2: 1e-5},
        "tap.tokens_in": {REL_L2: 1e-6},
        "tap.rope_cos": {MAX_ABS: 1e-6},
        "tap.rope_sin": {MAX_ABS: 1e-6},
        "tap.block0_pre_audio": {REL_L2: 2e-6},
        "tap.block0_post_audio": {REL_L2: 2e-6},
    },
    "sampler": {"timesteps": {EXACT: True}, "sigmas": {MAX_ABS: 1e-6}, "traj": {MAX_ABS: 2e-6}},
    "audio": {
        "input_values": {MAX_ABS: 1e-5},
        "hidden_states": {MAX_ABS: 5e-5},
        "feat_30fps": {MAX_ABS: 5e-5},
        "indices": {EXACT: True},
        "buckets_from_stored_features": {MAX_ABS: 1e-6},
    },
    "vae": {"encode": {MAX_ABS: 1e-5}, "decode": {MAX_ABS: 1e-5}},
    "t5": {"output": {MAX_ABS: 2e-5}},
    "pipeline": {"clipR.latents": {REL_L2: 2e-5}, "out.video": {MAX_ABS: 1e-4}},
    "dit_weights": {"keys": {EXACT: True}},
    "vae_weights": {"keys": {EXACT: True}},
}
"""Limits in float32 on the CPU where the folder has no thresholds.json of its own."""


@dataclass(frozen=True)
class Result:
    """One measured quantity of one case."""

    case: str
    id: str
    quantity: str
    metric: str
    error: float | None
    bound: float
    passed: bool
    reason: str = ""

    def line(self) -> str:
        """For people: verdict, what, how far, and why if it failed."""
        verdict, error = "ok  " if self.passed else "FAIL", "-" if self.error is None else f"{self.error:.2e}"
        text = f"{verdict} {self.case} {self.quantity}: {self.metric} {error} (limit {self.bound:.0e})"
        return f"{text}; {self.reason}" if self.reason else text

    def to_dict(self) -> dict:
        values = asdict(self)
        values["pass"] = values.pop("passed")
        if not self.reason:
            del values["reason"]
        return values


@dataclass(frozen=True)
class Case:
    """A sidecar and its tensors."""

    path: Path
    sidecar: dict
    tensors: Weights
    device: torch.device

    def __contains__(self, name: str) -> bool:
        return name in self.tensors.entries

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise CheckpointError(f"{self.path.name} has no tensor {name}. The case is incomplete: copy it again.")
        return self.tensors.entries[name].read().to(self.device)

    def find(self, pattern: str) -> list[str]:
        """What stands in the group of `pattern` in the names of all tensors that match it, each once."""
        found = (re.fullmatch(pattern, name) for name in self.tensors.entries)
        return sorted({match[1] for match in found if match}, key=lambda text: (len(text), text))

    def beside(self, key: str) -> Path:
        """The file or folder next to this case that the sidecar names under `key`."""
        return self.path.parent / self.sidecar[key]


Measured = Iterator[tuple[str, str, Tensor, Tensor]]
"""(rule in the bounds, quantity as reported, value, reference)."""


def compare(metric: str, value: Tensor, reference: Tensor) -> float:
    """Distance of two tensors; NaN where shapes differ."""
    if value.shape != reference.shape:
        return float("nan")
    value, reference = value.cpu(), reference.cpu()
    if metric == EXACT:
        return float((value != reference).sum())
    difference = value.double() - reference.double()
    if metric == MAX_ABS:
        return float(difference.abs().max())
    return float(difference.norm() / reference.double().norm().clamp(min=1e-30))


def load_dit(case: Case, key: str = "weights_file") -> S2VTransformer:
    return load_transformer(case.beside(key), torch.float32, case.device)


def run_dit_forward(case: Case) -> Measured:
    model, settings = load_dit(case), case.sidecar["forward_kwargs"]
    motion = None if settings.get("drop_motion_frames") else case["in.motion_latents"]
    inputs = ClipInputs(
        reference_latents=case["in.ref_latents"],
        motion_latents=motion,
        pose_latents=case["in.cond_states"],
        audio=case["in.audio_input"],
        text=case["in.context"][None],
        motion_frames=settings["motion_frames"][0],
    )
    taps: dict[str, Tensor] = {}

    def tap(module: torch.nn.Module, names: tuple[str, ...]) -> None:
        def keep(_, __, outputs):
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            # Copies: what comes next may write over the stream of tokens (seams.Stack).
            taps.update({name: None if t is None else t.clone() for name, t in zip(names, outputs, strict=False)})

        module.register_forward_hook(keep)

    model.stack.register_forward_pre_hook(lambda _, arguments: taps.update({"tap.tokens_in": arguments[0].clone()}))
    tap(model.audio_encoder, ("tap.audio_local_full", "tap.audio_global_full"))
    tap(model.stack.blocks[0], ("tap.block0_pre_audio",))
    injected = 0 in model.config.injected_blocks
    tap(model.stack.injectors[0] if injected else model.stack.blocks[0], ("tap.block0_post_audio",))

    condition = model.condition(inputs)
    output = model(case["in.noise_latent"], float(case["in.t"].item()), condition)
    taps |= {"output": output[0], "tap.rope_cos": condition.rope[..., 0], "tap.rope_sin": condition.rope[..., 1]}
    if (vectors := taps["tap.audio_global_full"]) is not None:
        taps["tap.audio_global_full"] = vectors[:, :, None]
    for name in BOUNDS["dit_forward"]:
        if taps[name] is not None:  # models without audio modulation have no global path
            yield name, name, taps[name], case[name]


def run_sampler(case: Case) -> Measured:
    for name in sorted({*case.find(r"(.+)\.(?:timesteps|sigmas|traj|model_out)"), *case.sidecar["runs"]}):
        run = case.sidecar["runs"][name]
        config = SamplingConfig(steps=run["steps"], shift=run["shift"], solver=run["solver"])
        solver = make_solver(config)
        schedule = solver.schedule
        yield "timesteps", f"{name}.timesteps", torch.tensor(schedule.timesteps).long(), case[f"{name}.timesteps"]
        yield "sigmas", f"{name}.sigmas", torch.tensor(schedule.sigmas), case[f"{name}.sigmas"]
        states = [SolverState(case[f"{name}.traj"][0])]
        for velocity in case[f"{name}.model_out"]:
            states.append(solver.step(states[-1], velocity))
        yield "traj", f"{name}.traj", torch.stack([state.latents for state in states]), case[f"{name}.traj"]


def run_audio(case: Case) -> Measured:
    encoder, facts = load_audio_encoder(case.beside("model_folder"), device=case.device), case.sidecar
    waveform, stored = case["waveform"], case["feat_30fps"]
    yield "input_values", "input_values", normalize_waveform(waveform)[None], case["input_values"]
    states = encoder.hidden_states(waveform)
    yield "hidden_states", "hidden_states", states, case["hidden_states"]
    features = resample_features(states, facts["wav2vec_rate"], facts["video_rate"])
    yield "feat_30fps", "feat_30fps", features, stored
    for name in sorted({*case.find(r"(.+)\.(?:bucket|indices)"), *facts["combos"]}):
        combo = facts["combos"][name]
        frames, fps = combo["batch_frames"], combo["fps"]
        indices = frame_indices(stored.shape[1], combo["num_repeat"] * frames, fps, facts["video_rate"])
        yield "indices", f"{name}.indices", torch.from_numpy(indices), case[f"{name}.indices"]
        bucket = audio_embeddings(stored, combo["num_repeat"], frames, fps, combo["m"], facts["video_rate"])
        yield "buckets_from_stored_features", f"{name}.bucket", bucket, case[f"{name}.bucket"]


def run_vae(case: Case) -> Measured:
    vae = load_vae(case.beside("weights_file"), device=case.device)
    for name in case.find(r"(encode\d+)\..+"):
        yield "encode", name, vae.encode(case[f"{name}.video"]), case[f"{name}.latent"]
    for name in case.find(r"(decode\d+)\..+"):
        yield "decode", name, vae.decode(case[f"{name}.latent"]), case[f"{name}.video"]


def run_t5(case: Case) -> Measured:
    prefix, entries = "weights.", case.tensors.entries
    inside = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    part = describe(replace(case.tensors, entries=inside))
    encoder = part.build()
    fill(encoder, part, torch.float32, case.device)
    hidden, mask = encoder.encode_ids(case["in.ids"], case["in.mask"]), case["in.mask"].bool()
    yield "output", "hidden_full", hidden, case["out.hidden_full"]
    for index in range(max(len(hidden), len(case.find(r"out\.(context\d+)")))):
        yield "output", f"context{index}", hidden[index][mask[index]], case[f"out.context{index}"]


def run_pipeline(case: Case) -> Measured:
    settings = case.sidecar["generate_kwargs"]
    model, vae = load_dit(case), load_vae(case.beside("vae_weights_file"), device=case.device)
    geometry = ClipGeometry(settings["infer_frames"], case.sidecar["motion_frames"])
    config = SamplingConfig(
        steps=settings["sampling_steps"],
        shift=settings["shift"],
        solver=settings["sample_solver"],
        guidance_scale=max(1.0, settings["guide_scale"]),  # the reference turns guidance off at 1 and below
    )
    voice = case["in.audio_bucket"].split(geometry.clip_frames, dim=-1)

    def sample(task):
        inputs = ClipInputs(
            reference_latents=task.reference_latents,
            motion_latents=task.motion_latents,
            pose_latents=case[f"clip{task.index}.cond_states"],
            audio=voice[task.index],
            text=case["in.context"][None],
            motion_frames=geometry.motion_frames,
        )
        return sample_clip(model, inputs, case["in.context_null"][None], task.noise, config)

    noises = (case[f"{name}.noise"][None] for name in case.find(r"(clip\d+)\..+"))
    starts = settings.get("init_first_frame", False)
    videos = []
    reference, past = case["in.ref_pixels"], geometry.motion_frames
    for clip in generate_clips(sample, vae.encode, vae.decode, reference, past, noises, starts):
        videos.append(clip.video[0])
        name = f"clip{clip.index}.latents"
        stored = case[name]
        yield "clipR.latents", name, clip.latents if stored.ndim == clip.latents.ndim else clip.latents[0], stored
    yield "out.video", "out.video", torch.cat(videos, dim=1), case["out.video"]


def run_weights(case: Case) -> Measured:
    part = find_part(case.path)
    report = part.compare(part.build())
    strangers = len(report.missing) + len(report.unexpected) + len(report.wrong_shape)
    yield "keys", "keys", torch.tensor(report.matched + strangers), torch.tensor(report.wanted + 2 * strangers)


RUNNERS: dict[str, Callable[[Case], Measured]] = {
    "dit_forward": run_dit_forward,
    "dit_weights": run_weights,
    "sampler": run_sampler,
    "audio": run_audio,
    "vae": run_vae,
    "vae_weights": run_weights,
    "t5": run_t5,
    "pipeline": run_pipeline,
}


def read_bounds(folder: Path, root: Path) -> dict:
    """The nearest thresholds.json from `folder` up to `root`, over the built-in limits."""
    for parent in (folder, *folder.parents):
        if (parent / BOUNDS_FILE).is_file():
            own = read_json(parent / BOUNDS_FILE)
            return {kind: rules | own.get(kind, {}) for kind, rules in BOUNDS.items()}
        if parent == root:
            break
    return BOUNDS


def failure(name: str, kind: str, reason: str) -> Result:
    return Result(name, kind, "run", EXACT, None, 0.0, False, reason)


CANNOT_RUN = (
    WanS2VError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, RuntimeError,
    OSError, ImportError,
)  # fmt: skip
"""What a damaged or foreign case can raise anywhere on its way: reported as its failure."""


def run_case(path: Path, root: Path, device: torch.device) -> Iterator[Result]:
    """All quantities of one case, or one failure that says why it could not be run."""
    name, kind, measured = path.relative_to(root).with_suffix("").as_posix(), "?", 0
    try:
        sidecar = read_json(path.with_suffix(".json"))
        kind = sidecar.get("id", "?")
        if kind not in RUNNERS:
            yield failure(name, kind, f"the id {kind!r} is not known; known are {', '.join(RUNNERS)}")
            return
        case = Case(path, sidecar, open_weights(path), device)
        for promised in sidecar.get("tensors", {}):
            case[promised]
        rules = read_bounds(path.parent, root)[kind]
        with torch.inference_mode():
            for rule, quantity, value, reference in RUNNERS[kind](case):
                for metric, bound in known_limits(rules[rule]):
                    yield judge(name, kind, quantity, metric, bound, value, reference)
                    measured += 1
        if not measured:
            yield failure(name, kind, "the case holds nothing to compare")
    except CANNOT_RUN as error:
        yield failure(name, kind, f"{type(error).__name__}: {error}")


def known_limits(rule: dict) -> list[tuple[str, float]]:
    """Metrics and bounds of a rule such as {"rel_l2": 2e-6}; what else it says is about other conditions."""
    limits = [(metric, 0.0 if metric == EXACT else float(rule[metric])) for metric in METRICS if metric in rule]
    if not limits:
        raise ConfigError(f"{BOUNDS_FILE} has a rule without a known metric: {rule}. Use one of {', '.join(METRICS)}.")
    return limits


def judge(name: str, kind: str, quantity: str, metric: str, bound: float, value: Tensor, reference: Tensor) -> Result:
    """One quantity against one limit."""
    error = compare(metric, value, reference)
    if math.isfinite(error):
        return Result(name, kind, quantity, metric, error, bound, error <= bound)
    reason = f"shape {tuple(value.shape)} against {tuple(reference.shape)}, or not a number"
    return Result(name, kind, quantity, metric, None, bound, False, reason)


def find_cases(root: Path) -> list[Path]:
    """Cases below a folder: all tensors, whatever their sidecar says, and sidecars with an id but without tensors.

    Other JSON files are reference tables, and the weights in a transformers model folder belong to a case elsewhere.
    """
    tensors = {path for path in root.rglob("*.safetensors") if not _in_model_folder(path)}
    return sorted(tensors | {path.with_suffix(".safetensors") for path in root.rglob("*.json") if _has_id(path)})


def _in_model_folder(path: Path) -> bool:
    is_case = path.with_suffix(".json").is_file()
    return path.stem.startswith("model") and not is_case and (path.parent / "config.json").is_file()


def _has_id(path: Path) -> bool:
    try:
        return "id" in read_json(path)
    except WanS2VError:
        return False


def verify(root: Path, device: str = "cpu") -> list[Result]:
    """Run every case below `root`; an empty folder is a failure.

    Raises:
        ConfigError: if `root` is no folder or the device is not there.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder. Give the folder that holds the golden cases.")
    torch_device = usable_device(device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 is meant
        results = [result for path in find_cases(root) for result in run_case(path, root, torch_device)]
    nothing = "no case found: a case is NAME.safetensors with a NAME.json that has an id"
    return results or [failure(str(root), "?", nothing)]
