"""How a stage fits into the room there is: the fastest plan whose predicted peak does, and the next tighter one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..config import AUTO, LOCKED, MemoryLimits, OffloadPlan, S2VModelConfig
from ..errors import OutOfMemory
from ..geometry import PIXELS_PER_LATENT
from ..model.audio_encoder import SPEECH_FEATURE_HZ
from ..model.long_speech import WINDOWS, Windows
from ..model.vae_parts import VaeParts
from .activations import ClipShape, ForwardWay, activation_bytes, gap_bytes
from .block_swap import residents
from .placement import Placement
from .vae_room import PLAIN, VaeWay, VaeWork, peak_bytes, tile_sizes

VAE_BYTES_PER_PIXEL = 23_000
"""Of the VAE in float32, for one latent frame at a time: 22,630 to decode and 17,190 to encode on an H200, the same at
832x480 and 1280x704 and for any number of frames, see benchmarks/README.md."""


def vae_bytes(work: VaeWork) -> tuple[int, int]:
    """Peak memory of encoding or decoding besides the VAE's weights and the caller's own video or latents, and what
    must be free besides.

    For diffusers' own network (`PLAIN`) also besides the decoded video.
    """
    if work.way is PLAIN:
        return VAE_BYTES_PER_PIXEL * work.height_px * work.width_px, 0
    needed = peak_bytes(work)
    return needed, work.way.margin(needed)


VOICE_BYTES_PER_SECOND = 29_000_000
"""Of wav2vec large in float32: 26.3 MB on an H200, most of it in its first convolutions; 28.5 MB for each second of a
window that attends to ten minutes."""
VOICE_BYTES_PER_KEY = 25_000
"""Of wav2vec large in float32, for each frame that a window of a long recording attends to outside itself."""


def voice_bytes(seconds: float, windows: Windows = WINDOWS) -> int:
    """Peak memory of hearing a recording besides the audio encoder's weights. Beyond a window it hardly grows."""
    frames = SPEECH_FEATURE_HZ * seconds
    at_once = VOICE_BYTES_PER_SECOND * min(frames, windows.window) / SPEECH_FEATURE_HZ
    keys = VOICE_BYTES_PER_KEY * min(frames, windows.most_keys) if frames > windows.window else 0
    return round(max(at_once, keys))


TEXT_BYTES = 500_000_000
"""Of umT5-xxl besides its weights: scores and position bias of 64 heads over 512 tokens, in float32."""
CONTEXT_BYTES, MOST_CONTEXT_BYTES = 800_000_000, 1_700_000_000
"""What CUDA and its libraries take of a GPU at first, and with all kernels in a ComfyUI on an H200."""
MARGIN_SHARE, MARGIN_BYTES = 0.04, 200_000_000
"""What is left free of a stage's room: for what lies badly in memory, and for libraries that allocate by themselves."""
TIGHTER = 0.85
"""Of what a plan was predicted to take, so much is the room for the next one when it did not fit."""
RAM_BYTES = 4_000_000_000
"""Of main memory that is left to others when layers are locked there."""
SLICES = (None, 32768, 16384, 8192, 4096)
"""Tokens that the DiT may compute at once, the fastest first."""


@dataclass(frozen=True)
class Room:
    """What a stage may use."""

    device_bytes: int | None = None
    """On the device, weights included; None where that is main memory, of which there is enough."""
    ram_bytes: int | None = None
    """In main memory, for weights that wait there in pieces of their own; None where it is not known."""
    weights: str = AUTO
    """Where they are to wait."""

    @property
    def usable_bytes(self) -> int:
        """On the device, without the margin."""
        assert self.device_bytes is not None
        return max(0, round(self.device_bytes * (1 - MARGIN_SHARE)) - MARGIN_BYTES)


@dataclass(frozen=True)
class Sizes:
    """What the weights of a network take, in bytes."""

    blocks: tuple[int, ...] = ()
    injectors: tuple[int, ...] = ()
    seldom: tuple[int, ...] = ()
    tables: int = 0
    """Stay in main memory where not all layers are on the device."""
    others: int = 0

    @property
    def whole(self) -> int:
        return sum(self.blocks) + sum(self.injectors) + sum(self.seldom) + self.tables + self.others

    @classmethod
    def of(cls, placement: Placement) -> "Sizes":
        """Of a network with the types that its weights have or will have; it may be on the meta device."""
        layers, lists = placement.layers, placement.lists
        parts = [
            tuple(layers[module].bytes for module in part) for part in (lists.blocks, lists.injectors, lists.seldom)
        ]
        tables = sum(place.tensor.nbytes for place in placement.tables.places)
        others = {id(place.tensor): place.tensor.nbytes for place in placement.home.places}
        return cls(*parts, tables, sum(others.values()))

    def on_device(self, plan: OffloadPlan) -> int:
        """What is there under a plan."""
        if plan.resident_layers is None:
            return self.whole
        kept = residents(len(self.blocks), plan)
        stays = [self.blocks[i] for i in kept]
        moving = [tuple(size for i, size in enumerate(self.blocks) if i not in kept)]
        for keeps, layers in ((plan.keeps_injectors, self.injectors), (plan.keeps_seldom, self.seldom)):
            stays += layers if keeps else ()
            moving.append(() if keeps else layers)
        slots = (plan.slots, 1, 1) if plan.slots > 1 else (1,)
        if plan.slots == 1:
            moving = [[size for sizes in moving for size in sizes]]
        turns = sum(min(n, len(sizes)) * max(sizes, default=0) for n, sizes in zip(slots, moving, strict=True))
        return sum(stays) + turns + self.others


@dataclass(frozen=True)
class Planned:
    """A plan and what a stage under it is predicted to take on the device."""

    plan: OffloadPlan = OffloadPlan()  # noqa: RUF009  (frozen)
    weight_bytes: int = 0
    working_bytes: int = 0
    gap_bytes: int = 0
    """What must be free besides."""

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.working_bytes

    @property
    def room_bytes(self) -> int:
        return self.bytes + self.gap_bytes

    def line(self, sizes: Sizes) -> str:
        """The plan as a person reads it."""
        plan, told = self.plan, [f"{self.bytes / 1e9:.1f} GB"]
        if plan.resident_layers is not None:
            told.append(f"{len(residents(len(sizes.blocks), plan))} of {len(sizes.blocks)} layers stay")
        if plan.slice_tokens is not None:
            told.append(f"{plan.slice_tokens} tokens at once")
        if plan.tile_px is not None:
            told.append(f"tiles of {plan.tile_px} px")
        return ", ".join(told)


WHOLE = Planned()
"""The whole network, and no opinion about how much it takes."""


class NoPlanFits(OutOfMemory):
    """No plan is predicted to fit; `tightest` is the one that comes nearest."""

    def __init__(self, reason: str, tightest: Planned):
        super().__init__(reason)
        self.tightest = tightest


Working = Callable[[OffloadPlan], tuple[int, int]]
"""What a stage takes besides weights under a plan, and what must be free besides, in bytes."""
Candidates = Callable[[Sizes], Iterator[OffloadPlan]]
"""Plans from the fastest to the tightest, with no layers that stay or those that are asked for."""
Choose = Callable[[Room, Sizes], Planned]
"""The fastest plan of a stage that fits; raises NoPlanFits if none does."""


def plan_stage(candidates: Candidates, working: Working, room: Room, sizes: Sizes, fills: bool = True) -> Planned:
    """The first of the candidates that fits.

    Args:
        fills: where layers come and go, let as many stay as there is room for.
    Raises:
        NoPlanFits: if none does, with the bytes that the tightest needs.
    """
    least = None
    for plan in candidates(sizes):
        plan = replace(plan, locks=fits_ram(sizes, room))
        planned = Planned(plan, sizes.on_device(plan), *working(plan))
        if room.device_bytes is None:
            return planned
        if planned.room_bytes <= room.usable_bytes:
            return with_residents(planned, room, sizes) if fills and plan.swaps else planned
        least = planned if least is None or planned.room_bytes < least.room_bytes else least
    raise NoPlanFits(
        f"it needs {(least.room_bytes + MARGIN_BYTES) / (1 - MARGIN_SHARE) / 1e9:.1f} GB in its tightest form, "
        f"{room.device_bytes / 1e9:.1f} GB are free",
        least,
    )


def with_residents(planned: Planned, room: Room, sizes: Sizes) -> Planned:
    """As many layers as fit stay on the device."""
    for count in range(len(sizes.blocks), 0, -1):
        plan = replace(planned.plan, resident_layers=count)
        more = replace(planned, plan=plan, weight_bytes=sizes.on_device(plan))
        if more.room_bytes <= room.usable_bytes:
            return more
    return planned


def fits_ram(sizes: Sizes, room: Room) -> bool:
    """Whether the layers of a network may lie in main memory in pieces of their own."""
    if room.weights != AUTO:
        return room.weights == LOCKED
    layers = sum(sizes.blocks) + sum(sizes.injectors) + sum(sizes.seldom)
    return room.ram_bytes is None or layers + RAM_BYTES <= room.ram_bytes


def dit_candidates(limits: MemoryLimits) -> Candidates:
    """Ways to sample. Weights that come and go cost next to nothing where a block computes longer than the next one
    travels, as it does from 480p on; slices cost a few percent; the rest more."""

    def candidates(sizes: Sizes) -> Iterator[OffloadPlan]:
        slices = SLICES if limits.slice_tokens is None else (limits.slice_tokens or None,)
        if limits.resident_blocks is None:
            yield OffloadPlan(slice_tokens=slices[0])
        least = OffloadPlan(resident_layers=limits.resident_blocks or 0)
        for keeps_injectors in (True, False):
            yield replace(least, keeps_injectors=keeps_injectors, slice_tokens=slices[0])
        least = replace(least, keeps_injectors=False)
        for slice_tokens in slices[1:]:
            yield replace(least, slice_tokens=slice_tokens)
        least = replace(least, slice_tokens=slices[-1], keeps_keys_values=False)
        yield least
        yield replace(least, keeps_seldom=False)
        yield replace(least, keeps_seldom=False, slots=1)

    return candidates


def dit_plan(config: S2VModelConfig, shape: ClipShape, way: ForwardWay, limits: MemoryLimits) -> Choose:
    """Ways to sample a clip.

    Args:
        way: how a forward computes, but for what the plan decides.
    """

    def working(plan: OffloadPlan) -> tuple[int, int]:
        made = replace(way, slice_tokens=plan.slice_tokens, keeps_keys_values=plan.keeps_keys_values)
        return activation_bytes(config, shape, made), gap_bytes(config, shape, made)

    fills = limits.resident_blocks is None
    return lambda room, sizes: plan_stage(dit_candidates(limits), working, room, sizes, fills)


LARGE_TILE = 384
"""Side in pixels below which tiles cost more than pixels on their way to main memory."""


def vae_plan(work: VaeWork, way: VaeWay | None, limits: MemoryLimits) -> Choose:
    """Ways to encode or decode a video: whole pictures, large tiles, and any tiles with the pixels in main memory."""
    work = replace(work, way=way)

    def candidates(_: Sizes) -> Iterator[OffloadPlan]:
        if way is PLAIN:
            yield OffloadPlan()
            return
        sides = [side and PIXELS_PER_LATENT * side for side in tile_sizes(*work.latent_size[1:])]
        if limits.tile_px is not None:
            sides = [limits.tile_px or None]
        for holds_pixels in (True, False):
            for side in sides:
                if side is None or side >= LARGE_TILE or not holds_pixels or limits.tile_px:
                    yield OffloadPlan(tile_px=side, holds_pixels=holds_pixels)

    def working(plan: OffloadPlan) -> tuple[int, int]:
        return vae_bytes(replace(work, parts=VaeParts(plan.tile_px, is_apart=not plan.holds_pixels)))

    return lambda room, sizes: plan_stage(candidates, working, room, sizes)


def layer_candidates(sizes: Sizes) -> Iterator[OffloadPlan]:
    """Ways to use a network whose activations are small: whole, or layer by layer."""
    yield OffloadPlan()
    if sizes.blocks:
        yield OffloadPlan(resident_layers=0)
        yield OffloadPlan(resident_layers=0, slots=1)


def whole(working_bytes: int) -> Choose:
    """For a stage that has one way, or several whose layers come and go."""
    return lambda room, sizes: plan_stage(layer_candidates, lambda plan: (working_bytes, 0), room, sizes)


def tighter(room: Room, planned: Planned) -> Room:
    """The room for the next plan, where this one did not fit after all."""
    taken = planned.bytes if room.device_bytes is None else min(room.device_bytes, planned.bytes)
    return replace(room, device_bytes=round(TIGHTER * taken))
