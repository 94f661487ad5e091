"""From files to a file: a recording, a picture and a prompt become a video with sound."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import (
    DEFAULT_NEGATIVE_PROMPT,
    AccelerationPlan,
    ExpertRouting,
    JsonConfig,
    MemoryLimits,
    SamplingConfig,
    VideoConfig,
)
from .errors import ConfigError
from .forecast import StageForecast, forecast
from .inputs import Encoders, Inputs, read_inputs
from .io.clip_store import keeps_clips, read_settings
from .io.film import write_film
from .io.locks import held
from .io.outside import check_path, check_text
from .io.video import check_target, preset_of
from .io.video_clips import check_earlier, clips_folder, folders_set_apart, set_apart
from .networks import CheckpointNetworks, open_checkpoint
from .prepare import AUTO, LoadPlan, plan_loading, usable_device
from .runs import Run

log = logging.getLogger(__name__)

LONGEST_SECONDS = 1e7
"""Of a recording: a third of a year."""
FILES = ("checkpoint", "audio", "image", "save_file", "pose_video", "noise_expert", "cache_dir")
"""Fields of a request that name files and folders."""


@dataclass(frozen=True)
class RenderRequest(JsonConfig):
    """What to make, from which files, and where to compute it.

    `precision` is of the DiT and the text encoder. `audio_start` and `audio_seconds` choose a part of the recording.
    """

    checkpoint: str
    audio: str
    image: str
    save_file: str
    prompt: str = ""
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    pose_video: str | None = None
    audio_start: float = 0.0
    audio_seconds: float | None = None
    device: str = "cpu"
    precision: str = AUTO
    offload: str = AUTO
    text_on_cpu: bool = False
    text_precision: str = AUTO
    keep_clips: bool = False
    noise_expert: str | None = None
    """File or folder of a second DiT, which serves where the noise is below the boundary of the sampling."""
    cache_dir: str | None = None
    """Folder in which encoded voices and prompts are kept for other runs."""
    metadata: bool = True
    """Whether the video says in its comment how it was made."""

    def __post_init__(self):
        for name in FILES:
            if (path := getattr(self, name)) is not None:
                check_path(name, path)
        for name in ("prompt", "negative_prompt"):
            check_text(name, getattr(self, name))
        for name in ("audio_start", "audio_seconds"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= LONGEST_SECONDS:
                raise ConfigError(f"{name}={value:g} is no time in a recording. Give seconds, such as 12.5.")
        self.loading(AccelerationPlan())

    def told(self) -> dict[str, Any]:
        """What may be told of it in files: as `to_dict`, but of files and folders their names alone."""
        names = {name: getattr(self, name) for name in FILES}
        short = {name: path and Path(path).absolute().name for name, path in names.items()}
        return {**self.to_dict(), **short}

    def loading(self, acceleration: AccelerationPlan) -> LoadPlan:
        """How its networks are loaded."""
        device = usable_device(self.device)
        return plan_loading(self.precision, device, acceleration, self.text_precision)

    def inputs(self, fps: float) -> Inputs:
        """What it is made from, read from files; driving videos for frames at `fps`."""
        part = self.audio, self.audio_start, self.audio_seconds
        return read_inputs(*part, self.image, self.pose_video, fps)

    def networks(self, acceleration: AccelerationPlan, limits: MemoryLimits) -> CheckpointNetworks:
        """Found and checked, but not loaded."""
        loading, text_device = self.loading(acceleration), "cpu" if self.text_on_cpu else None
        return open_checkpoint(self.checkpoint, loading, self.offload, text_device, self.noise_expert, limits)


@dataclass(frozen=True)
class RenderReport:
    """What was made."""

    path: str
    frames: int
    fps: float
    width: int
    height: int
    clips: int
    audio_seconds: float
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def render(
    request: RenderRequest,
    video: VideoConfig,
    sampling: SamplingConfig,
    on_step: Callable[[int, int, int], None] | None = None,
    routing: ExpertRouting | None = None,
    acceleration: AccelerationPlan | None = None,
    limits: MemoryLimits | None = None,
) -> RenderReport:
    """Make the video.

    Finished clips are kept next to `save_file` until it is complete, and stay there if the run ends early. The next run
    goes on after those that it would make just so.

    Args:
        on_step: called with clip, number of clips and step (clip and step from 1) after each step; may raise to stop.
        routing: how experts are used; a dense model has none and says so.
        acceleration: how networks are made faster.
        limits: of memory.
    """
    began, target, routing = time.monotonic(), Path(request.save_file), routing or ExpertRouting()
    check_noise_expert(request, sampling)
    check_target(target, preset_of(target))
    with held(folder := clips_folder(target)):
        check_earlier(folder, sampling, routing)
        inputs = request.inputs(video.fps)
        networks = request.networks(acceleration or AccelerationPlan(), limits or MemoryLimits())
        run = Run(networks, sampling, routing, request.keep_clips, request.told())
        encoders = Encoders(run.pipeline, request.cache_dir, target.absolute().parent)
        job = inputs.encoded(encoders, (request.prompt, request.negative_prompt), video)
        height, width = job.size_px
        log.info("%d frames of %dx%d px in %d clips", job.plan.frames, width, height, job.clips)
        run.accept(job)
        begin(run, folder)

        tell = on_step and (lambda task, step, _: on_step(task.index + 1, job.clips, step))
        for _ in run.clips(tell):
            pass
        clips = run.stored
        comment = {"comment": json.dumps(run.settings, ensure_ascii=False)}
        write_film(target, clips, comment if request.metadata else None)
        if not run.keep_clips:
            clips.remove()
    if run.routing:
        log.warning(run.expert_report)
    seconds = time.monotonic() - began
    return RenderReport(str(target), clips.frames, video.fps, width, height, job.clips, job.recording.seconds, seconds)


def begin(run: Run, folder: Path) -> None:
    """Begin a run in the folder of its video, or go on there."""
    earlier = run.find_earlier([folder, *folders_set_apart(folder)])
    if earlier:
        log.warning("going on after clip %d of %d, from %s", earlier.clips, run.job.clips, earlier.folder)
        if earlier.folder == folder:
            run.keep_clips = run.keep_clips or keeps_clips(read_settings(folder))
            earlier = set_apart(earlier)
    run.begin(folder, earlier)


def forecast_render(
    request: RenderRequest,
    video: VideoConfig,
    sampling: SamplingConfig,
    acceleration: AccelerationPlan,
    limits: MemoryLimits,
) -> list[StageForecast]:
    """What the stages of `render` would take now; nothing is loaded or written."""
    networks = request.networks(acceleration, limits)
    return forecast(networks, request.inputs(video.fps).facts(video, sampling))


def check_noise_expert(request: RenderRequest, sampling: SamplingConfig) -> None:
    """Raises ConfigError if there is a boundary without a second model, or a second model without a boundary."""
    if (request.noise_expert is None) != (sampling.noise_boundary is None):
        raise ConfigError(
            f"noise_boundary={sampling.noise_boundary} with noise_expert={request.noise_expert}: a second model and "
            "the noise level where it takes over go together. Give both, or neither."
        )
