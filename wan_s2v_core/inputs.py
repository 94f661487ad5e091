"""What a video is made from: a recording, a picture and a driving video are read from files, and encoded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conditioning.bundle import PoseFrames, S2VConditioning, Voice, make_conditioning, size_of_video
from .conditioning.image import read_picture
from .config import SamplingConfig, VideoConfig
from .forecast import JobFacts
from .geometry import ClipGeometry
from .io.audio import Recording, check_recording, read_recording
from .io.digest import digest_of
from .io.encodings import EncodingStore
from .io.video import DrivingVideo
from .model.checkpoint import SPEECH_ENCODER, TEXT_ENCODER
from .networks import CheckpointNetworks
from .pipeline import S2VPipeline

ENCODING_FORMAT = 2
"""To be raised when encoders make something else of the same."""


@dataclass(frozen=True)
class Inputs:
    """The files of a job."""

    recording: Recording
    picture: Tensor
    """H W 3, uint8."""
    pose: PoseFrames | None

    def facts(self, video: VideoConfig, sampling: SamplingConfig) -> JobFacts:
        """What of them decides how much memory a run takes."""
        size, geometry = size_of_video(self.picture, video), ClipGeometry(video.clip_frames)
        return JobFacts(*size, self.recording.seconds, geometry, sampling, self.pose is not None)

    def encoded(self, encoders: "Encoders", prompts: tuple[str, str], video: VideoConfig) -> S2VConditioning:
        """The job.

        Args:
            prompts: the prompt and the negative prompt.
        """
        voice = Voice(self.recording, encoders.features(self.recording))
        return make_conditioning(self.picture, voice, *encoders.texts(prompts), video, self.pose)


def read_inputs(
    audio: str, start_seconds: float, seconds: float | None, image: str, pose_video: str | None, fps: float
) -> Inputs:
    """Read a part of a recording, a picture, and where it is given a driving video for frames at `fps`.

    Raises:
        ConfigError: if a file is missing or cannot be read, or there is no such part.
    """
    recording, picture = read_recording(audio, start_seconds, seconds), read_picture(image)
    return Inputs(recording, picture, DrivingVideo(pose_video, fps) if pose_video else None)


class Encoders:
    """The encoders of a run. What an earlier run made of the same is taken from a folder, where there is one for that.

    Args:
        pipeline: runs them, with networks from a checkpoint.
        kept: the folder.
        folder: for what is heard in a very long recording, as long as it is needed.
    """

    def __init__(self, pipeline: S2VPipeline, kept: str | None, folder: Path):
        self.pipeline, self.folder = pipeline, folder
        self.store = None if kept is None else EncodingStore(Path(kept))

    def features(self, recording: Recording) -> Tensor:
        """What is heard in a recording, A T E at 30 Hz."""

        def make() -> dict[str, Tensor]:
            return {"features": self.pipeline.encode_voice(recording, folder=self.folder).features}

        if self.store is None:
            return make()["features"]
        check_recording(recording)
        key = digest_of(self.encoder_facts(SPEECH_ENCODER), recording.speech())
        return self.store.get("voice", key, make)["features"]

    def texts(self, prompts: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """The prompt and the negative prompt, each 1 L E."""

        def make() -> dict[str, Tensor]:
            return dict(zip(("prompt", "negative_prompt"), self.pipeline.encode_prompts(*prompts), strict=True))

        facts = {**self.encoder_facts(TEXT_ENCODER), "prompts": prompts}
        made = make() if self.store is None else self.store.get("text", digest_of(facts), make)
        return made["prompt"], made["negative_prompt"]

    def encoder_facts(self, kind: str) -> dict[str, Any]:
        """All that shapes what an encoder makes besides what it is given, as JSON."""
        networks: CheckpointNetworks = self.pipeline.networks
        return {
            "format": ENCODING_FORMAT,
            "torch": torch.__version__,
            "device": networks.device_of(kind).type,
            "dtype": str(networks.loading.dtype(kind)),
            "in_8_bits": kind == TEXT_ENCODER and networks.loading.text_in_8_bits,
            "files": networks.checkpoint.stamps(kind),
        }
