"""Where the clips of a finished video begin, from the settings that it carries."""

import json
from dataclasses import dataclass
from typing import Any

from ..config import VideoConfig
from ..errors import ConfigError
from ..geometry import FIRST_CLIP_SKIP, ClipGeometry

COMMAND_LINE_TAG, COMFYUI_TAG = "comment", "prompt"
NODES = "WanS2V"
"""What ids of our ComfyUI nodes begin with."""


@dataclass(frozen=True)
class ClipLengths:
    """Frames of a clip, and how many of the first one were cut."""

    frames: int
    skipped: int = 0

    def starts(self, frames: int) -> list[int]:
        """The first frame of each clip of a video of `frames` frames."""
        return [0, *range(self.frames - self.skipped, frames, self.frames)]


def clip_lengths(tags: dict[str, str], clip_frames: int | None) -> ClipLengths | None:
    """From the tags of a video file; `clip_frames` overrules them. None where neither says anything.

    Raises:
        ConfigError: if `clip_frames` is no length.
    """
    found = _from_command_line(_json(tags.get(COMMAND_LINE_TAG))) or _from_comfyui(_json(tags.get(COMFYUI_TAG)))
    if clip_frames is None:
        return found
    if clip_frames < 2:
        raise ConfigError(f"clip_frames={clip_frames} is no length of a clip. Use 2 or more; the model makes 80.")
    skipped = found.skipped if found else 0
    return ClipLengths(clip_frames, min(skipped, clip_frames - 1))


def _json(text: str | None) -> dict[str, Any]:
    """Other programs put anything into these tags."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _from_command_line(settings: dict[str, Any]) -> ClipLengths | None:
    video = settings.get("video")
    return _lengths(video, "starts_from_reference") if isinstance(video, dict) else None


def _from_comfyui(prompt: dict[str, Any]) -> ClipLengths | None:
    nodes = [node for node in prompt.values() if isinstance(node, dict)]
    ours = [node.get("inputs") for node in nodes if str(node.get("class_type", "")).startswith(NODES)]
    found = [_lengths(inputs, "start_from_picture") for inputs in ours if isinstance(inputs, dict)]
    return next((lengths for lengths in found if lengths), None)


def _lengths(settings: dict[str, Any], from_picture: str) -> ClipLengths | None:
    """Values that come from another node are links, lists, and say nothing here."""
    frames = settings.get("clip_frames")
    if not isinstance(frames, int) or isinstance(frames, bool):
        return None
    try:
        geometry = ClipGeometry(frames, VideoConfig.motion_frames)
    except ConfigError:
        return None
    return ClipLengths(geometry.clip_frames, 0 if settings.get(from_picture) else FIRST_CLIP_SKIP)
