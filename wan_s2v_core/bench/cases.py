"""What is measured: the cases of a request, what each of them needs, and the form of a result."""

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from ..clip_denoiser import clip_shape
from ..config import AccelerationPlan, JsonConfig, S2VModelConfig, SamplingConfig
from ..errors import ConfigError
from ..geometry import ClipGeometry
from ..memory.activations import activation_bytes
from ..memory.budget import vae_bytes
from ..memory.vae_room import VaeWork
from ..model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from ..prepare import AUTO, usable_device
from ..sampling.guidance import needed_branches
from .engine import (
    DEMO_MODEL,
    MOTION_FRAMES,
    RELEASED,
    ModelSource,
    attention_label,
    loading_of,
    precision_name,
    resolve,
    weight_bytes,
    with_blocks,
)
from .flops import ForwardShape, forward_flop, shape_of_tokens
from .measure import SPLIT

FORWARD, ARTICLE, VIDEO_VAE, ENCODERS, LOAD, GROWTH = "forward", "article", "vae", "encoders", "load", "growth"
GROUPS = (FORWARD, ARTICLE, VIDEO_VAE, ENCODERS, LOAD, GROWTH)
OF_THE_DIT = (FORWARD, ARTICLE, GROWTH)
ALL = "all"
QUICK = (FORWARD, VIDEO_VAE, ENCODERS)
SIZES = {DEMO_MODEL: ("64x64",)}
REAL_SIZES = ("832x480", "1280x704")
GROWTH_TOKENS = {DEMO_MODEL: (200, 4_000)}
REAL_GROWTH_TOKENS = (5_000, 300_000)
GROWTH_POINTS, GROWTH_BLOCKS = 9, 2
"""A forward costs the same in every block: two of them tell how it grows, and 300,000 tokens stay affordable."""
CASE_KEYS = (
    *("case", "width", "height", "frames", "steps", "guidance", "precision", "attention_backend", "weights"),
    *("seconds_total", "seconds_per_forward", "peak_bytes", "tflops", "ceiling_share", "split", "gpu", "torch"),
    "commit",
)
"""What every case in the JSON has. Besides: estimated, error, details."""
SAME = (*CASE_KEYS[:9], "estimated")
"""What two results have in common that may be compared."""


@dataclass(frozen=True)
class Way(JsonConfig):
    """How the DiT runs."""

    precision: str = AUTO
    attention: str = AUTO
    keep: float = 1.0

    @property
    def plan(self) -> AccelerationPlan:
        return AccelerationPlan(attention=self.attention, sparse_keep=self.keep)


def parse_way(text: str) -> Way:
    """PRECISION[:ATTENTION[:KEEP]], such as float8:auto:0.5.

    Raises:
        ConfigError: if it is none.
    """
    parts = text.split(":")
    try:
        keep = float(parts[2]) if len(parts) > 2 else 1.0
        if len(parts) > 3 or not 0 < keep <= 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--way {text} is none. Write PRECISION[:ATTENTION[:KEEP]], KEEP above 0 up to 1, such as bfloat16 or "
            "float8:auto:0.5."
        ) from None
    return Way(parts[0], *parts[1:2], keep=keep)


def parse_sides(text: str) -> tuple[int, int]:
    """832x480 -> width and height."""
    words = text.lower().replace("*", "x").split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) >= 64 and int(word) % 16 == 0 for word in words):
        raise ConfigError(f"--sizes {text}: sides must be multiples of 16 from 64 on. Write them as 832x480.")
    return int(words[0]), int(words[1])


@dataclass(frozen=True)
class BenchRequest:
    """What to measure, with which networks, and how often."""

    cases: tuple[str, ...] = QUICK
    sizes: tuple[str, ...] = ()
    """Empty for those of the model."""
    ways: tuple[str, ...] = ()
    """PRECISION[:ATTENTION[:KEEP]] each; empty for all combinations of the next three."""
    precisions: tuple[str, ...] = (AUTO,)
    attentions: tuple[str, ...] = (AUTO,)
    keeps: tuple[float, ...] = (1.0,)
    source: ModelSource = field(default_factory=ModelSource)
    device: str = "cuda"
    runs: int = 5
    frames: int = 240
    """Of the article's cases, which clips of `clip_frames` make; the reference cuts the first 3 of them."""
    clip_frames: int = 80
    steps: int = 50
    guidance: float = 4.5
    measured_steps: int = 2
    full: bool = False
    """Run the article's cases from start to end."""
    offload: bool = False
    """In the article's cases, networks wait in main memory."""
    growth_tokens: tuple[int, ...] = ()
    growth_blocks: int = GROWTH_BLOCKS
    memory_gb: float | None = None
    """Of the device, to see what would fit; measured by default."""

    def __post_init__(self):
        known = (*GROUPS, ALL)
        if unknown := [name for name in self.cases if name not in known]:
            raise ConfigError(f"--cases {unknown[0]} is not known. Use one or more of: {', '.join(known)}.")
        for name, least in (("runs", 1), ("steps", 1), ("measured_steps", 2), ("growth_blocks", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: it must be {least} or more.")
        if self.frames < 1 or self.frames % ClipGeometry(self.clip_frames).clip_frames:
            raise ConfigError(
                f"--frames {self.frames} is no number of whole clips of {self.clip_frames} frames. "
                f"Use a multiple of {self.clip_frames}, such as {3 * self.clip_frames}."
            )
        if self.growth_tokens and not 0 < self.growth_tokens[0] < self.growth_tokens[-1]:
            raise ConfigError(f"--growth_tokens {self.growth_tokens} must rise. Write such as 5000 300000.")
        SamplingConfig(steps=self.steps, guidance_scale=self.guidance)
        self.resolved_ways()

    def all_ways(self) -> list[Way]:
        if self.ways:
            return [parse_way(text) for text in self.ways]
        return [Way(*parts) for parts in product(self.precisions, self.attentions, self.keeps)]

    def resolved_ways(self) -> list[tuple[str, AccelerationPlan]]:
        """Precisions and plans with what auto leads to here, none twice.

        Raises:
            BackendUnavailable, ConfigError: if one leads nowhere.
        """
        device, config = usable_device(self.device), self.source.config(DIT)
        asked = [(precision_name(way.precision, device), way.plan) for way in self.all_ways()]
        return list(dict.fromkeys((name, resolve(plan, config, name, device)) for name, plan in asked))

    @property
    def groups(self) -> tuple[str, ...]:
        return GROUPS if ALL in self.cases else tuple(name for name in GROUPS if name in self.cases)

    @property
    def all_sizes(self) -> list[tuple[int, int]]:
        texts = self.sizes or (REAL_SIZES if self.source.checkpoint else SIZES.get(self.source.model, REAL_SIZES))
        return [parse_sides(text) for text in texts]


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    group: str
    name: str
    width: int
    height: int
    frames: int
    precision: str
    plan: AccelerationPlan
    steps: int = 1
    guidance: float = 1.0
    clip_frames: int = 80
    tokens_wanted: int | None = None

    @property
    def clips(self) -> int:
        return self.frames // self.clip_frames

    @property
    def branches(self) -> int:
        """Forwards of a step."""
        return len(needed_branches(SamplingConfig(guidance_scale=self.guidance)))

    @property
    def network(self) -> str:
        """Kind of the network that is measured."""
        if self.group in (ENCODERS, LOAD):
            return self.name.removeprefix("load ").replace(" ", "_")
        return VAE if self.group == VIDEO_VAE else DIT

    def shape(self, has_motion: bool = True) -> ForwardShape:
        """Of one forward."""
        return ForwardShape(self.width, self.height, ClipGeometry(self.clip_frames).latent_frames, has_motion)

    def label(self) -> str:
        words = [self.name]
        if self.width:
            words.append(f"{self.width}x{self.height}")
        words.append(self.precision)
        if self.group in OF_THE_DIT:
            words.append(attention_label(self.plan))
        return " ".join(words)


def list_cases(request: BenchRequest) -> list[Case]:
    """All cases in the order in which the fewest networks are built; what does not depend on the way comes once."""
    ways = request.resolved_ways()
    made: list[Case] = []
    for precision, plan in ways:
        made += [case for group in request.groups for case in _dit_cases(request, group, precision, plan)]
    precision, plan = ways[0]
    common = {"precision": precision, "plan": plan}
    if VIDEO_VAE in request.groups:
        for size in request.all_sizes:
            made += [Case(VIDEO_VAE, name, *size, frames, **common) for name, frames in vae_cases(request).items()]
    if ENCODERS in request.groups:
        names = {TEXT_ENCODER: 0, SPEECH_ENCODER: request.frames}
        made += [Case(ENCODERS, kind.replace("_", " "), 0, 0, frames, **common) for kind, frames in names.items()]
    if LOAD in request.groups:
        for precision in dict.fromkeys(precision for precision, _ in ways):
            made += [
                Case(LOAD, f"load {kind.replace('_', ' ')}", 0, 0, 0, precision, AccelerationPlan())
                for kind in RELEASED
                if kind == DIT or precision == ways[0][0]
            ]
    return made


def vae_cases(request: BenchRequest) -> dict[str, int]:
    """Frames of the VAE's cases: the past that a clip sees, if a clip is that long, and a clip behind its picture."""
    behind_picture = request.clip_frames + 1
    return {"vae encode": min(MOTION_FRAMES, behind_picture), "vae decode": behind_picture}


def _dit_cases(request: BenchRequest, group: str, precision: str, plan: AccelerationPlan) -> list[Case]:
    common = {"precision": precision, "plan": plan, "clip_frames": request.clip_frames}
    if group == FORWARD:
        return [Case(FORWARD, FORWARD, *size, request.clip_frames, **common) for size in request.all_sizes]
    if group == ARTICLE:
        common |= {"steps": request.steps, "guidance": request.guidance}
        return [Case(ARTICLE, ARTICLE, *size, request.frames, **common) for size in request.all_sizes]
    if group != GROWTH:
        return []
    few, many = request.growth_tokens or GROWTH_TOKENS.get(request.source.model, REAL_GROWTH_TOKENS)
    cases = []
    for tokens in np.geomspace(few, many, GROWTH_POINTS):
        shape = shape_of_tokens(tokens, ClipGeometry(request.clip_frames).latent_frames)
        size = shape.width_px, shape.height_px
        cases.append(Case(GROWTH, GROWTH, *size, request.clip_frames, tokens_wanted=round(tokens), **common))
    return cases


# --- what a case needs -------------------------------------------------------------------------------------------


SURE = 0.9
"""Of what a case is predicted to need, it needs so much for sure."""


@dataclass(frozen=True)
class Needs:
    """What a case is predicted to take."""

    flop: float
    """Of the DiT; 0 without one."""
    weight_bytes: int
    working_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.working_bytes


@dataclass
class NeedsOf:
    """Predicts needs from the sizes of networks, without making any."""

    request: BenchRequest
    _bytes: dict[tuple, int] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        return usable_device(self.request.device)

    @cached_property
    def dit(self) -> S2VModelConfig:
        return self.request.source.config(DIT)

    def __call__(self, case: Case) -> Needs:
        if case.group not in OF_THE_DIT:
            coding = self._coding_bytes(case, case.frames) if case.group == VIDEO_VAE else 0
            return Needs(0, self.weights(case.network, case), coding)
        config = with_blocks(self.dit, self.request.growth_blocks) if case.group == GROWTH else self.dit
        weights = self.weights(DIT, case, config)
        working = self._forward_bytes(case, config)
        if case.group != ARTICLE:
            return Needs(forward_flop(config, case.shape(), case.plan.kept(config.blocks)).total, weights, working)
        decoding = self._coding_bytes(case, MOTION_FRAMES + case.clip_frames)
        if self.request.offload:
            most = max(weights + working, self.weights(VAE, case) + decoding, self.weights(TEXT_ENCODER, case))
            return Needs(article_flop(config, case), weights, most - weights)
        weights += sum(self.weights(kind, case) for kind in (TEXT_ENCODER, SPEECH_ENCODER, VAE))
        return Needs(article_flop(config, case), weights, max(working, decoding))

    def weights(self, kind: str, case: Case, config: Any = None) -> int:
        config = config or self.request.source.config(kind)
        key = (kind, case.precision, str(config))
        if key not in self._bytes:
            self._bytes[key] = weight_bytes(kind, config, loading_of(case.precision, self.device))
        return self._bytes[key]

    def _forward_bytes(self, case: Case, config: S2VModelConfig) -> int:
        shape, branches = case.shape(), case.branches if case.group == ARTICLE else 1
        motion = shape.motion_latents if shape.has_motion else 0
        clip = clip_shape(config, (case.height, case.width), shape.latent_frames, motion, has_pose=True)
        way = loading_of(case.precision, self.device, case.plan).forward_way(config)
        return activation_bytes(config, clip, replace(way, branches=branches))

    def _coding_bytes(self, case: Case, frames: int) -> int:
        """Of the VAE, with the video that goes in or comes out."""
        way = loading_of(case.precision, self.device, case.plan).vae_way
        work = VaeWork(case.height, case.width, frames, decodes="encode" not in case.name, way=way)
        video = 4 * 3 * frames * case.width * case.height
        return sum(vae_bytes(work)) + (0 if work.decodes and way else video)


def article_flop(config: S2VModelConfig, case: Case) -> float:
    """Of all forwards of a video. Steps that leave nothing out are counted in full."""
    dense = min(case.plan.sparse_dense_steps, case.steps)
    steps = ((dense, 1.0), (case.steps - dense, case.plan.kept(config.blocks)))
    clips = ((1, False), (case.clips - 1, True))
    return case.branches * sum(
        number * count * forward_flop(config, case.shape(has_motion), kept).total
        for number, has_motion in clips
        for count, kept in steps
    )


def what_fits_not(needs: Needs, total_bytes: int, device: torch.device) -> str | None:
    """Why a case has no room on a device of `total_bytes`; None if it has.

    Predictions are on the safe side, so what they exceed by little is tried: it may run out of memory and say so.
    """
    if needs.bytes * SURE <= total_bytes:
        return None
    gb = 1e9
    return (
        f"it needs about {needs.bytes / gb:.1f} GB ({needs.weight_bytes / gb:.1f} GB weights, "
        f"{needs.working_bytes / gb:.1f} GB besides), {device} has {total_bytes / gb:.1f} GB. Choose a precision of "
        "fewer bits such as float8-weights, smaller --sizes, or a card with more memory."
    )


@dataclass
class Result:
    """One measured case; None where something is not known."""

    seconds_total: float | None = None
    seconds_per_forward: float | None = None
    peak_bytes: int | None = None
    tflops: float | None = None
    ceiling_share: float | None = None
    split: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(SPLIT))
    estimated: bool = False
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_entry(self, case: Case, facts: dict[str, str]) -> dict[str, Any]:
        """As in the JSON. `facts`: weights, gpu, torch and commit.

        Networks besides the DiT have a type of their own, which is their precision.
        """
        own = asdict(self) | {
            "case": case.name,
            "width": case.width,
            "height": case.height,
            "frames": case.frames,
            "steps": case.steps,
            "guidance": case.guidance,
            "precision": self.details.get("dtype", case.precision),
            "attention_backend": attention_label(case.plan) if case.group in OF_THE_DIT else None,
        }
        own |= facts
        return {name: own[name] for name in (*CASE_KEYS, "estimated", "error", "details")}
