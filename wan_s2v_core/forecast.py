"""What each stage of a run will take, before it: the plans that the stages would make now."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .clip_denoiser import clip_shape, sampling_plan
from .config import SamplingConfig
from .errors import WanS2VError
from .geometry import ClipGeometry, frames_of
from .memory.budget import TEXT_BYTES, Choose, NoPlanFits, vae_plan, voice_bytes, whole
from .memory.vae_room import VaeWork
from .model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .networks import RunNetworks


@dataclass(frozen=True)
class JobFacts:
    """What of a video decides how much memory its stages take."""

    height_px: int
    width_px: int
    seconds: float
    """Of the recording."""
    geometry: ClipGeometry
    sampling: SamplingConfig
    has_pose: bool = False


@dataclass(frozen=True)
class StageForecast:
    """One stage. `line` is the plan in words; the last four say the same, None where the plan has no such thing."""

    stage: str
    line: str
    peak_bytes: int | None
    """On the device, weights included; None where that is main memory."""
    room_bytes: int | None
    error: str | None = None
    """Why there may be no room for it."""
    layers_stay: int | None = None
    """Of `layers`, those that stay on the device; the others come and go."""
    layers: int | None = None
    slice_tokens: int | None = None
    tile_px: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.stage}: {' '.join(filter(None, (self.line, self.error and f'({self.error})')))}"


def stages(networks: RunNetworks, job: JobFacts) -> Iterator[tuple[str, str, Choose]]:
    """Name, network and plans of each stage; those that a run has no network for are left out."""
    geometry, limits = job.geometry, networks.limits
    size = job.height_px, job.width_px
    shown = frames_of(geometry.motion_latent_frames + geometry.latent_frames)
    past = VaeWork(*size, geometry.motion_frames, decodes=False)
    clip = VaeWork(*size, shown, decodes=True, keep_frames=geometry.clip_frames)
    yield "voice", SPEECH_ENCODER, whole(voice_bytes(job.seconds))
    yield "text", TEXT_ENCODER, whole(TEXT_BYTES)
    yield "VAE encode", VAE, vae_plan(past, networks.loading.vae_way, limits)
    if DIT in networks.checkpoint.paths:
        shape = clip_shape(
            networks.dit_config(), size, geometry.latent_frames, geometry.motion_latent_frames, job.has_pose
        )
        yield "sampling", DIT, sampling_plan(networks, shape, job.sampling)
    yield "VAE decode", VAE, vae_plan(clip, networks.loading.vae_way, limits)


def forecast(networks: RunNetworks, job: JobFacts) -> list[StageForecast]:
    """The stages of a run with these networks, as they would be planned now. Nothing is loaded."""
    found = []
    for name, kind, choose in stages(networks, job):
        if kind in networks.checkpoint.paths:
            found.append(forecast_stage(networks, name, kind, choose))
    return found


def forecast_stage(networks: RunNetworks, name: str, kind: str, choose: Choose) -> StageForecast:
    room, doubt = networks.room(kind), None
    if room.device_bytes is None:
        return StageForecast(name, "in main memory, at full speed", None, None)
    try:
        sizes = networks.sizes(kind)
    except WanS2VError as error:
        return StageForecast(name, "", None, room.device_bytes, str(error))
    try:
        planned = choose(room, sizes)
    except NoPlanFits as error:
        planned, doubt = error.tightest, str(error)
    plan = planned.plan
    parts = {"slice_tokens": plan.slice_tokens, "tile_px": plan.tile_px}
    if plan.swaps:
        parts |= {"layers_stay": min(plan.resident_layers, len(sizes.blocks)), "layers": len(sizes.blocks)}
    return StageForecast(name, planned.line(sizes), planned.bytes, room.device_bytes, doubt, **parts)
