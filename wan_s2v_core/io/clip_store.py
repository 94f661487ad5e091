"""Finished clips in a folder of their own, so that nothing already made is lost when a run ends early."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from .audio import SHORTEST_SPEECH_SAMPLES, SPEECH_HZ, Recording
from .video import VideoWriter, read_frames

LOSSLESS = "lossless-mkv"


@dataclass(frozen=True, eq=False)
class StoredClips:
    """The finished clips of one video on disk: lossless films with their stretch of sound, latents and settings."""

    folder: Path
    fps: float
    width_px: int
    height_px: int
    recording: Recording
    settings: dict[str, Any]
    clip_frames: tuple[int, ...]
    """Frames that each clip adds to the video."""

    @property
    def frames(self) -> int:
        return sum(self.clip_frames)

    def path(self, index: int, suffix: str = ".mkv") -> Path:
        return self.folder / f"clip_{index:04d}{suffix}"

    def __iter__(self) -> Iterator[Tensor]:
        """The pictures of clip after clip, T H W 3 uint8.

        Raises:
            ConfigError: if a clip is no longer there.
        """
        for index, frames in enumerate(self.clip_frames):
            if not self.path(index).is_file():
                raise ConfigError(
                    f"{self.path(index)} is no longer there: the clips were deleted. Sample again; "
                    "a changed seed makes ComfyUI do so."
                )
            found = read_frames(self.path(index), self.fps, 0, frames)
            if len(found) != frames:
                raise ConfigError(
                    f"{self.path(index)} holds {len(found)} of {frames} frames: it is damaged. Sample again; "
                    "a changed seed makes ComfyUI do so."
                )
            yield found

    def remove(self) -> None:
        """Delete the folder, when its clips have become a video."""
        shutil.rmtree(self.folder)


class ClipStore:
    """Keeps clip after clip as it is finished.

    Args:
        folder: made with the first clip; one that is there already is refused, since it may hold somebody's work.
        recording: the sound of the whole video.
        settings: anything JSON, kept as `settings.json`.
    Raises:
        ConfigError: if the folder is there.
    """

    def __init__(self, folder: Path, fps: float, recording: Recording, settings: dict[str, Any]):
        if folder.exists():
            raise ConfigError(
                f"{folder} is there already, with clips of an earlier run that did not end. Move or delete it."
            )
        self.folder, self.fps, self.recording, self.settings = folder, fps, recording, settings
        self.clip_frames: list[int] = []
        self.size_px = (0, 0)
        self.is_begun = False

    @property
    def stored(self) -> StoredClips:
        """What has been kept so far."""
        height, width = self.size_px
        frames = tuple(self.clip_frames)
        return StoredClips(self.folder, self.fps, width, height, self.recording, self.settings, frames)

    def add(self, frames: Tensor, latents: Tensor, motion_video: Tensor) -> None:
        """Keep one more clip.

        Args:
            frames: T H W 3, uint8.
            latents: B C F h w, kept for every clip.
            motion_video: B 3 T H W, the frames that the next clip starts from; only the newest are kept.
        Raises:
            ConfigError: if the disk does not take it.
        """
        index, self.size_px = len(self.clip_frames), tuple(frames.shape[1:3])
        stored, sound = self.stored, self._sound(sum(self.clip_frames), len(frames))
        height, width = self.size_px
        try:
            if not index:
                self._begin()
            with VideoWriter(stored.path(index), width, height, self.fps, sound, LOSSLESS) as writer:
                writer.write(frames)
            save_file({"latents": latents.contiguous().cpu()}, stored.path(index, ".safetensors"))
            save_file({"motion_video": motion_video.contiguous().cpu()}, self.folder / "motion.safetensors")
        except (OSError, SafetensorError, ConfigError) as error:
            if not index and self.is_begun:  # a folder without a clip would only be in the way of the next run
                shutil.rmtree(self.folder, ignore_errors=True)
                self.is_begun = False
            raise ConfigError(
                f"clip {index + 1} cannot be kept in {self.folder} ({str(error).rstrip('.')}). "
                f"Free some space or save elsewhere; finished clips there: {index}."
            ) from error
        self.clip_frames.append(len(frames))

    def _sound(self, start: int, frames: int) -> Recording:
        """The stretch of sound that belongs to some frames, silence past the end."""
        samples, rate = self.recording.samples, self.recording.rate_hz
        first, stop = (round(frame / self.fps * rate) for frame in (start, start + frames))
        shortest = -(-SHORTEST_SPEECH_SAMPLES * rate // SPEECH_HZ)
        own = samples[:, first:stop]
        return Recording(F.pad(own, (0, max(stop - first, shortest) - own.shape[1])), rate)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True)
        self.is_begun = True
        text = json.dumps(self.settings, ensure_ascii=False, indent=1)
        (self.folder / "settings.json").write_text(text, encoding="utf-8")
