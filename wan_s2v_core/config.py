"""Settings as frozen dataclasses that survive JSON. Importable without torch; defaults have their home here."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

from .errors import ConfigError, shown

T = TypeVar("T", bound="JsonConfig")


@dataclass(frozen=True)
class JsonConfig:
    """Base of every config: `to_dict` and `from_dict` are inverse, so a recipe can travel to a worker as JSON."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls: type[T], values: dict[str, Any]) -> T:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"{cls.__name__} has no setting {', '.join(unknown)}. It has: {', '.join(sorted(known))}."
            )
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@dataclass(frozen=True)
class ModelRecipe(JsonConfig):
    """Where a network comes from: which part of the model, and the file or folder that holds it."""

    kind: str
    path: str


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ConfigError if a setting, which may come from anybody's JSON, is none of the words it may be."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{name}={shown(repr(value))} is not known. Use one of: {', '.join(known)}.")


def check_range(name: str, value: Any, least: float, most: float, advice: str) -> None:
    """Raises ConfigError if a number is not one, or lies outside; the message names the end that it passed."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value != value:
        raise ConfigError(f"{name}={shown(value)} is no number. {advice}")
    if not least <= value <= most:
        side, end = ("below", least) if value < least else ("above", most)
        raise ConfigError(f"{name}={shown(value)} is {side} {end}. {advice}")


UNWEIGHTED = "none"
GATE_RANGES = ("chosen", "all", UNWEIGHTED)
OVERFLOWS = ("spill", "drop")

MOST_EXPERTS = 4096
MOST_TOKENS = 10**9
"""More than any video has."""
UNUSED = -1
"""In `injected_blocks`: an injector that is in the checkpoint but serves no block."""


@dataclass(frozen=True)
class S2VModelConfig(JsonConfig):
    """Sizes and switches of the S2V DiT. The defaults are the released 14B model.

    `injected_blocks[i]` is the block after which injector `i` adds the voice, or UNUSED. `packs_motion` chooses
    between the packed motion tokens of the released model and plain ones, one token per patch of every motion frame.
    `num_experts` = 0 is a dense model. Otherwise every feed-forward is that many experts, each `feed_forward_width`
    wide, of which a token sees `top_k`; the gate's softmax runs over the chosen experts or over all of them (which
    a gate needs to learn with `top_k` = 1: a softmax over one is always 1). Without a softmax every chosen expert
    counts in full, as parts of one layer do, and all of them share one output bias.
    """

    width: int = 5120
    feed_forward_width: int = 13824
    heads: int = 40
    blocks: int = 40
    latent_channels: int = 16
    pose_channels: int = 16
    text_width: int = 4096
    text_tokens: int = 512
    time_width: int = 256
    audio_width: int = 1024
    audio_layers: int = 25
    audio_tokens: int = 4
    injected_blocks: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    modulates_audio: bool = True
    packs_motion: bool = True
    zero_timestep: bool = True
    eps: float = 1e-6
    num_experts: int = 0
    top_k: int = 1
    gate_over: str = "chosen"
    gate_probes: int = 0
    """Neurons of each expert whose activations the gate looks at; 0: it looks at the token itself."""

    def __post_init__(self):
        check_choice("gate_over", self.gate_over, GATE_RANGES)
        if self.num_experts:
            check_top_k(self.top_k, self.num_experts)
        if self.heads < 1 or self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(
                f"width={self.width} with heads={self.heads} gives no even head size. "
                "Use a width that is an even multiple of heads (the 14B model: 5120 and 40)."
            )
        if self.width % 4:
            raise ConfigError(
                f"width={self.width} is not a multiple of 4, which the audio encoder needs. Change width."
            )
        used = [block for block in self.injected_blocks if block != UNUSED]
        if len(used) != len(set(used)) or not all(0 <= block < self.blocks for block in used):
            raise ConfigError(
                f"injected_blocks={list(self.injected_blocks)} must be different numbers below blocks={self.blocks}. "
                "Take them from the checkpoint's config.json (audio_inject_layers)."
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises ConfigError if a token cannot see that many of the experts."""
    if not 0 < top_k <= num_experts:
        raise ConfigError(
            f"top_k={top_k} with {num_experts} experts. Use 1 to {num_experts}; {num_experts} is all of them."
        )


@dataclass(frozen=True)
class ExpertRouting(JsonConfig):
    """How the tokens of a run are shared out among the experts of a feed-forward.

    `overflow` says what happens to the tokens of an expert beyond `expert_capacity`. spill: they follow in further
    rounds, so the result stays what it is and capacity bounds memory. drop: in token order, they skip that expert;
    faster and lossy. Capacity counts the tokens at hand: per rank when a sequence is split.
    """

    top_k: int | None = None
    """Experts that a token sees; None for what the checkpoint says."""
    expert_capacity: int | None = None
    """Tokens that an expert takes at once; None for all."""
    overflow: str = "spill"
    gate_dropout: float = 0.0
    """Probability that an expert is hidden from a token's choice while training. The best one never is."""
    gate_dropout_seed: int | None = None
    """A seed drops in inference too, the same choices in every step; this lowers fidelity. None drops nothing."""

    def __post_init__(self):
        check_choice("overflow", self.overflow, OVERFLOWS)
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: a token sees at least one expert. Leave it out for all it may see.")
        if self.expert_capacity is not None and self.expert_capacity < 1:
            raise ConfigError(
                f"expert_capacity={self.expert_capacity}: it must be 1 or more. Leave it out for no limit."
            )
        if self.overflow == "drop" and self.expert_capacity is None:
            raise ConfigError("overflow='drop' without expert_capacity drops nothing. Give a capacity, or use spill.")
        check_range("top_k", self.top_k or 1, 1, MOST_EXPERTS, "Leave it out for all it may see.")
        check_range("expert_capacity", self.expert_capacity or 1, 1, MOST_TOKENS, "Leave it out for no limit.")
        if not 0 <= self.gate_dropout < 1:
            raise ConfigError(f"gate_dropout={self.gate_dropout} is outside 0 to 1. Use such as 0.1, or 0 for none.")


AUTO, ALWAYS = "auto", "always"
OFFLOADS = (AUTO, ALWAYS)
"""When networks leave the GPU: when another one, or ComfyUI, needs their room; or behind each stage."""
SPARSE_BY_SCORES, SPARSE_BY_DISTANCE = "scores", "distance"
SPARSE_CHOICES = (SPARSE_BY_SCORES, SPARSE_BY_DISTANCE)
VAE_WAYS = (AUTO, "bfloat16", "float32")


@dataclass(frozen=True)
class AccelerationPlan(JsonConfig):
    """How networks are made faster, from outside; the defaults change results by rounding alone.

    `attention` names a backend of acceleration/attention/registry.py; auto is the fastest exact one, auto8 the fastest
    in 8 bits. `sparse_keep` below 1 lets a tile of 128 queries look at that share of the tiles of keys, chosen by
    `sparse_by`; this is lossy. `vae`: auto is bfloat16 on a card, with kernels of our own, and float32 on a CPU.
    """

    attention: str = AUTO
    sparse_keep: float = 1.0
    sparse_by: str = SPARSE_BY_SCORES
    sparse_dense_steps: int = 2
    """Steps at the start of a clip that look at everything: they decide what is where."""
    sparse_dense_blocks: int = 1
    """Blocks at the start of the DiT that do."""
    fused: bool = True
    """Whether the steps between products are fused kernels, where there is a card and Triton."""
    vae: str = AUTO

    def __post_init__(self):
        check_choice("sparse_by", self.sparse_by, SPARSE_CHOICES)
        check_choice("vae", self.vae, VAE_WAYS)
        if not 0 < self.sparse_keep <= 1:
            raise ConfigError(
                f"sparse_keep={self.sparse_keep}: the share of attention that is kept lies between 0 and 1. Use such "
                "as 0.5, or 1 for all of it."
            )
        for name in ("sparse_dense_steps", "sparse_dense_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more. Use such as 2, or 0 for none.")
            check_range(name, getattr(self, name), 0, MOST_TOKENS, "Use such as 2, or 0 for none.")

    def kept(self, blocks: int) -> float:
        """The share of attention that a sparse step computes, over all blocks."""
        dense = min(self.sparse_dense_blocks, blocks)
        return (dense + (blocks - dense) * self.sparse_keep) / blocks


MOST_GB = 1e6
LOCKED, MAPPED = "locked", "mapped"
WEIGHT_PLACES = (AUTO, LOCKED, MAPPED)
MEMORY_PROFILES = {
    "8 GB": 8.0,
    "10 GB": 10.0,
    "12 GB": 12.0,
    "16 GB": 16.0,
    "24 GB": 24.0,
    "48 GB": 48.0,
    "80 GB": 80.0,
}
"""Sizes of cards, by the names that nodes offer them under."""


@dataclass(frozen=True)
class MemoryLimits(JsonConfig):
    """What a run may use of a card, and what of that is decided by hand. What is None is decided by measuring."""

    vram_limit_gb: float | None = None
    """As if the card had so many GB, of 1e9 bytes."""
    resident_blocks: int | None = None
    """Blocks of the DiT that stay on the card."""
    slice_tokens: int | None = None
    """Tokens that the DiT computes at once; 0: all."""
    tile_px: int | None = None
    """Side of the VAE's tiles; 0: whole pictures."""
    weights: str = AUTO
    """Where weights wait that come and go: locked in main memory, mapped from their file, or auto by what is free."""

    def __post_init__(self):
        check_choice("weights", self.weights, WEIGHT_PLACES)
        if self.vram_limit_gb is not None and not 0 < self.vram_limit_gb <= MOST_GB:
            raise ConfigError(
                f"vram_limit_gb={shown(self.vram_limit_gb)} must be above 0, {MOST_GB:g} at most. Use the size of a "
                "card, such as 8 or 12, or leave it out to measure what is free."
            )
        for name in ("resident_blocks", "slice_tokens", "tile_px"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name}={shown(value)} must be 0 or more. Leave it out to let it be decided.")
            check_range(name, value or 0, 0, MOST_TOKENS, "Leave it out to let it be decided.")
        if self.tile_px and self.tile_px % 8:
            raise ConfigError(
                f"tile_px={self.tile_px} is not a multiple of 8. Use such as 384, or 0 for whole pictures."
            )


@dataclass(frozen=True)
class OffloadPlan(JsonConfig):
    """How a network is on the card for its stage: what of it waits in main memory, and how much is computed at once.

    Results are the same under every plan, up to rounding where `slice_tokens` or `tile_px` cut a stage into parts. The
    default is the whole network and everything at once. Made by `memory.budget`.
    """

    resident_layers: int | None = None
    """Blocks or layers that stay on the card; the others take turns there. None: the whole network stays."""
    slots: int = 2
    """Blocks that are there for a turn: 2 fetch the next while one computes; 1 is one layer of any kind at a time."""
    keeps_injectors: bool = True
    """Whether the DiT's audio injectors stay, where not all of its blocks do."""
    keeps_seldom: bool = True
    """Whether what the DiT uses once a clip or step stays: embeddings and the voice's encoder."""
    slice_tokens: int | None = None
    """Tokens that the DiT computes at once; None: all."""
    keeps_keys_values: bool = True
    """Whether keys and values of text and voice stay from step to step."""
    tile_px: int | None = None
    """Side of the tiles in which the VAE computes; None: whole pictures."""
    holds_pixels: bool = True
    """Whether decoded pictures stay on the card until the clip is done."""
    locks: bool = True
    """Whether layers wait in locked memory, from which they travel fastest; or where the checkpoint is mapped."""

    def __post_init__(self):
        if self.resident_layers is not None and self.resident_layers < 0:
            raise ConfigError(f"resident_layers={self.resident_layers} must be 0 or more. Leave it out for all.")
        if self.slots not in (1, 2):
            raise ConfigError(
                f"slots={self.slots}: 2 fetch a layer while another computes, 1 does not. Use one of them."
            )

    @property
    def swaps(self) -> bool:
        return self.resident_layers is not None


SOLVERS = ("unipc", "dpm++", "euler")
SPACINGS = ("flow", "karras")
NOISES = ("cpu", "reference")
MOST_STEPS, LARGEST_SHIFT, LARGEST_GUIDANCE = 1000, 100.0, 100.0
TRAIN_TIMESTEPS, LEAST_TIMESTEP = 1000, 0.01
"""The timestep of pure noise, and the least one and distance of two: noise levels have to differ as 32-bit floats."""
LARGEST_SEED = 2**64 - 1
"""ComfyUI's."""
NOISE_BOUNDARY = 0.9
"""Where pairs of models change over unless it is said, as the picture-to-video pair of Wan2.2 does."""


@dataclass(frozen=True)
class SamplingConfig(JsonConfig):
    """How a clip is denoised. The defaults are the reference's.

    `guidance_scale` weighs the prompt against the negative prompt; `audio_guidance_scale` weighs the voice against
    silence and follows `guidance_scale` when it is None, which is the reference and the cheapest. `noise`: cpu draws
    float32 numbers that are the same on every device; reference draws bfloat16 ones on the device itself and keeps the
    latents in bfloat16 between steps. `colour_match` pulls the colours of every clip towards those of the picture: 0
    leaves them as they are made, 1 gives each channel the picture's mean and deviation. `noise_boundary`: steps whose
    sigma is below it are a second model's; None for one model. `timesteps`: those of the steps themselves, falling from
    1000 (pure noise), as models for few steps need them; `steps` is then their number, and `shift` is not used.
    """

    steps: int = 40
    shift: float = 3.0
    solver: str = "unipc"
    spacing: str = "flow"
    timesteps: tuple[float, ...] | None = None
    guidance_scale: float = 4.5
    audio_guidance_scale: float | None = None
    seed: int = 0
    noise: str = "cpu"
    colour_match: float = 0.0
    noise_boundary: float | None = None

    def __post_init__(self):
        if self.timesteps is not None:
            check_timesteps(self.timesteps)
            for name, implied in (("steps", len(self.timesteps)), ("spacing", SamplingConfig.spacing)):
                if (given := getattr(self, name)) not in (implied, getattr(SamplingConfig, name)):
                    raise ConfigError(
                        f"{name}={shown(repr(given))} with {len(self.timesteps)} timesteps, which say it themselves. "
                        "Give one of the two."
                    )
                object.__setattr__(self, name, implied)
        check_range("steps", self.steps, 1, MOST_STEPS, "Use 40, or 4 to 8 for a quick look.")
        if not 0 < self.shift <= LARGEST_SHIFT:
            raise ConfigError(
                f"shift={shown(self.shift)} must be above 0, {LARGEST_SHIFT:g} at most. Use 3 at 480p and 5 at 720p."
            )
        check_choice("solver", self.solver, SOLVERS)
        check_choice("spacing", self.spacing, SPACINGS)
        check_choice("noise", self.noise, NOISES)
        check_range("seed", self.seed, 0, LARGEST_SEED, "Use 0 to 2^64 - 1, as in ComfyUI.")
        for name, scale in (("guidance_scale", self.guidance_scale), ("audio_guidance_scale", self.audio_scale)):
            advice = "1 turns guidance off; the reference uses 4.5."
            check_range(name, scale, 1, LARGEST_GUIDANCE, advice)
        if not 0 <= self.colour_match <= 1:
            raise ConfigError(f"colour_match={self.colour_match} is outside 0 to 1. Use 0 for none, 1 for all of it.")
        if self.noise_boundary is not None and not 0 < self.noise_boundary < 1:
            raise ConfigError(
                f"noise_boundary={self.noise_boundary} must lie between 0 and 1. Use such as {NOISE_BOUNDARY}."
            )

    @property
    def audio_scale(self) -> float:
        return self.guidance_scale if self.audio_guidance_scale is None else self.audio_guidance_scale


def check_timesteps(timesteps: tuple[float, ...]) -> None:
    """Raises ConfigError unless these are timesteps that a clip can be denoised at."""
    advice = "Use such as 1000, 750, 500, 250."
    if not isinstance(timesteps, tuple) or not timesteps:
        raise ConfigError(f"timesteps={shown(timesteps)} are no numbers. {advice}")
    for timestep in timesteps:
        check_range("timestep", timestep, LEAST_TIMESTEP, TRAIN_TIMESTEPS, advice)
    for before, after in pairwise(timesteps):
        if before - after < LEAST_TIMESTEP:
            raise ConfigError(
                f"timesteps {before}, {after} do not fall: each must be {LEAST_TIMESTEP} lower or more. {advice}"
            )


REFERENCE_PRESET, HD_PRESET = "reference 480p", "reference 720p"
DEMO = "embedded demo"
"""What the tiny model that comes with the pack is called in menus, and the preset that goes with it."""
PRESETS = {
    REFERENCE_PRESET: SamplingConfig(),
    HD_PRESET: SamplingConfig(shift=5.0),
    "ComfyUI template": SamplingConfig(steps=20, shift=8.0, guidance_scale=6.0),
    "quick look": SamplingConfig(steps=8),
    DEMO: SamplingConfig(steps=10, guidance_scale=1.0),
}
"""Settings that go together, by the names that nodes and the command line offer them under."""
PRESET_FIELDS = ("steps", "shift", "guidance_scale", "solver")
"""What a preset decides."""


def sampling_preset(name: str) -> SamplingConfig:
    """Raises ConfigError if there is no preset of that name."""
    check_choice("preset", name, PRESETS)
    return PRESETS[name]


def preset_lines() -> list[str]:
    """The presets as a person reads them, one a line."""
    return [
        f"{name}: {made.steps} steps, shift {made.shift:g}, guidance {made.guidance_scale:g}, {made.solver}"
        for name, made in PRESETS.items()
    ]


DEFAULT_SIZE, DEMO_SIZE = "480p (832x480)", "demo (256x256)"
VIDEO_SIZES = {
    DEFAULT_SIZE: (832, 480),
    "704p (1024x704)": (1024, 704),
    "720p (1280x704)": (1280, 704),
    DEMO_SIZE: (256, 256),
}
"""Width and height whose product bounds the area, by their names in menus; the picture gives the aspect."""

LARGEST_AREA, MOST_CLIP_FRAMES = 4096 * 4096, 400
PICTURE_FITS = ("crop", "pad", "reference")
TIMINGS = ("aligned", "reference")
CLIP_PLANS = ("audio", "reference")


@dataclass(frozen=True)
class VideoConfig(JsonConfig):
    """What kind of video is made. The defaults differ from the reference in two ways that people complain about.

    `timing`: aligned puts frame 0 at time 0 of the sound; the reference plays its pictures 3 frames ahead.
    `clip_plan`: audio makes as many frames as the sound lasts; the reference makes whole clips, one more than needed
    when the sound ends with a clip. `max_area` bounds the pixels of a frame and the picture gives the aspect, unless
    `exact_size` says height and width. `hears_past`: at a clip's start the voice before it is heard; the reference
    hears the clip's first moment, held.
    """

    max_area: int = 1280 * 720
    fps: float = 16.0
    clip_frames: int = 80
    motion_frames: int = 73
    fit: str = "crop"
    timing: str = "aligned"
    clip_plan: str = "audio"
    starts_from_reference: bool = False
    clips: int | None = None
    """At most this many clips; None for all that the sound needs."""
    exact_size: tuple[int, int] | None = None
    hears_past: bool = False

    def __post_init__(self):
        check_choice("fit", self.fit, PICTURE_FITS)
        check_choice("timing", self.timing, TIMINGS)
        check_choice("clip_plan", self.clip_plan, CLIP_PLANS)
        if not 1 <= self.fps <= 60:
            raise ConfigError(f"fps={self.fps} is outside 1 to 60. The model was trained for 16.")
        if self.clips is not None and self.clips < 1:
            raise ConfigError(f"clips={self.clips}: at least one clip is needed. Leave it out for all of the sound.")
        check_range("clips", self.clips or 1, 1, MOST_TOKENS, "Leave it out for all of the sound.")
        if self.max_area < 64 * 64:
            raise ConfigError(f"max_area={self.max_area} px is less than 64x64. Use 832*480 or more for real pictures.")
        check_range("max_area", self.max_area, 64 * 64, LARGEST_AREA, "Use such as 832*480 or 1280*720.")
        check_range("clip_frames", self.clip_frames, 4, MOST_CLIP_FRAMES, "Use a multiple of 4, such as 80.")
        if self.exact_size and any(side < 64 or side > 4096 or side % 16 for side in self.exact_size):
            height, width = self.exact_size
            raise ConfigError(
                f"size {width}x{height}: sides must be multiples of 16 from 64 to 4096. Use such as 832x480 or 480x832."
            )


DEFAULT_NEGATIVE_PROMPT = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The reference's: blurred, worst quality, shaking hands, subtitles, ugly, extra fingers, static picture, and so on."""
