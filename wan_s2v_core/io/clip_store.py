"""Finished clips in a folder of their own, so that nothing already made is lost when a run ends early."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from .video import VideoWriter, read_frames

LOSSLESS = "lossless-mkv"


class ClipStore:
    """Pictures losslessly, latents, what the next clip needs, and the settings that made them.

    Args:
        folder: made with the first clip; one that is there already is refused, since it may hold somebody's work.
        settings: anything JSON, kept as `settings.json`.
    Raises:
        ConfigError: if the folder is there.
    """

    def __init__(self, folder: Path, fps: float, settings: dict[str, Any]):
        if folder.exists():
            raise ConfigError(
                f"{folder} is there already, with clips of an earlier run that did not end. Move or delete it."
            )
        self.folder, self.fps, self.settings = folder, fps, settings
        self.frames: list[int] = []

    def path(self, index: int, suffix: str = ".mkv") -> Path:
        return self.folder / f"clip_{index:04d}{suffix}"

    def add(self, frames: Tensor, latents: Tensor, motion_video: Tensor) -> None:
        """Keep one more clip.

        Args:
            frames: T H W 3, uint8.
            latents: B C F h w, kept for every clip.
            motion_video: B 3 T H W, the frames that the next clip starts from; only the newest are kept.
        Raises:
            ConfigError: if the disk does not take it.
        """
        index = len(self.frames)
        height, width = frames.shape[1:3]
        try:
            if not index:
                self._begin()
            with VideoWriter(self.path(index), width, height, self.fps, preset=LOSSLESS) as writer:
                writer.write(frames)
            save_file({"latents": latents.contiguous().cpu()}, self.path(index, ".safetensors"))
            save_file({"motion_video": motion_video.contiguous().cpu()}, self.folder / "motion.safetensors")
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"clip {index + 1} cannot be kept in {self.folder}: {error}. Free some space or save elsewhere; "
                f"{index} finished clips are there."
            ) from error
        self.frames.append(len(frames))

    def _begin(self) -> None:
        self.folder.mkdir()
        text = json.dumps(self.settings, ensure_ascii=False, indent=1)
        (self.folder / "settings.json").write_text(text, encoding="utf-8")

    def __iter__(self) -> Iterator[Tensor]:
        """The pictures of clip after clip, T H W 3 uint8."""
        for index, frames in enumerate(self.frames):
            yield read_frames(self.path(index), self.fps, 0, frames)

    def remove(self) -> None:
        """Delete the folder, when its clips have become a video."""
        shutil.rmtree(self.folder)
