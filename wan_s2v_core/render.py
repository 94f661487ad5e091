"""From files to a file: a recording, a picture and a prompt become a video with sound."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .conditioning.image import read_picture, to_frames
from .config import DEFAULT_NEGATIVE_PROMPT, JsonConfig, SamplingConfig, VideoConfig
from .errors import ConfigError
from .io.audio import Recording, check_recording, read_recording
from .io.clip_store import ClipStore
from .io.video import VideoWriter, check_target, preset_of, read_frames
from .pipeline import Job, S2VPipeline, usable_device

log = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    precision: str = "float32"
    offload: bool = True
    text_on_cpu: bool = False
    keep_clips: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r} is not known. Use one of: {', '.join(PRECISIONS)}.")
        usable_device(self.device)


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
) -> RenderReport:
    """Make the video.

    Finished clips are kept next to `save_file` until it is complete, and stay there if the run ends early.

    Args:
        on_step: called with clip, number of clips and step (clip and step from 1) after each step; may raise to stop.
    """
    began, target = time.monotonic(), Path(request.save_file)
    check_target(target, preset_of(target))
    settings = {"request": request.to_dict(), "video": video.to_dict(), "sampling": sampling.to_dict()}
    store = ClipStore(clips_folder(target), video.fps, settings)
    recording = read_recording(request.audio, request.audio_start, request.audio_seconds)
    check_recording(recording)
    picture = read_picture(request.image)
    pose = partial(read_frames, request.pose_video, video.fps) if request.pose_video else None
    if pose:
        pose(0, 1)  # a bad file is told before anything is loaded

    pipeline = S2VPipeline(
        request.checkpoint,
        request.device,
        PRECISIONS[request.precision],
        request.offload,
        "cpu" if request.text_on_cpu else None,
    )
    prompts = (request.prompt, request.negative_prompt)
    job = pipeline.prepare(picture, recording.speech(), recording.seconds, prompts, video, pose)
    clips = len(job.plan.clip_frames)

    def tell(clip: int, step: int) -> None:
        if on_step:
            on_step(clip + 1, clips, step)

    for clip in pipeline.generate(job, sampling, tell):
        store.add(to_frames(clip.video[0]), clip.latents, clip.motion_video)
    write_video(target, store, job, recording)
    if not request.keep_clips:
        store.remove()
    height, width = job.size_px
    return RenderReport(
        str(target), job.plan.frames, video.fps, width, height, clips, recording.seconds, time.monotonic() - began
    )


def clips_folder(target: Path) -> Path:
    """Where the finished clips of a video are kept until it is complete."""
    return target.with_name(f"{target.name}.clips")


def write_video(target: Path, store: ClipStore, job: Job, recording: Recording) -> None:
    """Clip after clip into one file with sound; memory holds one clip."""
    height, width = job.size_px
    metadata = {"comment": json.dumps(store.settings, ensure_ascii=False)}
    with VideoWriter(target, width, height, job.video.fps, recording, preset_of(target), metadata) as writer:
        for frames in store:
            writer.write(frames)
    log.info("%s: %d frames", target, job.plan.frames)
