"""Where the clips of a finished video begin, from what the file says."""

import json
from dataclasses import dataclass
from typing import Any

from ..config import VideoConfig
from ..errors import ConfigError
from ..geometry import FIRST_CLIP_SKIP, ClipGeometry
from ..io.film import CLIP_FRAMES_TAG

COMFYUI_TAG = "prompt"
"""Of files that nodes of ComfyUI write: the whole graph."""
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
    found = _from_lengths(_json(tags.get(CLIP_FRAMES_TAG))) or _from_comfyui(_json(tags.get(COMFYUI_TAG)))
    if clip_frames is None:
        return found
    if clip_frames < 2:
        raise ConfigError(f"clip_frames={clip_frames} is no length of a clip. Use 2 or more; the model makes 80.")
    skipped = found.skipped if found else 0
    return ClipLengths(clip_frames, min(skipped, clip_frames - 1))


def _json(text: str | None) -> Any:
    """Other programs put anything into these tags."""
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _from_lengths(lengths: Any) -> ClipLengths | None:
    """Of clips of which the first may lack its beginning, and the last its end."""
    if not isinstance(lengths, list) or not lengths:
        return None
    if not all(isinstance(frames, int) and not isinstance(frames, bool) and frames > 0 for frames in lengths):
        return None
    return ClipLengths(max(lengths), max(lengths) - lengths[0])


def _from_comfyui(prompt: Any) -> ClipLengths | None:
    nodes = [node for node in prompt.values() if isinstance(node, dict)] if isinstance(prompt, dict) else []
    ours = [node.get("inputs") for node in nodes if str(node.get("class_type", "")).startswith(NODES)]
    found = [_lengths(inputs) for inputs in ours if isinstance(inputs, dict)]
    return next((lengths for lengths in found if lengths), None)


def _lengths(inputs: dict[str, Any]) -> ClipLengths | None:
    """Values that come from another node are links, lists, and say nothing here."""
    frames = inputs.get("clip_frames")
    if not isinstance(frames, int) or isinstance(frames, bool):
        return None
    try:
        geometry = ClipGeometry(frames, VideoConfig.motion_frames)
    except ConfigError:
        return None
    return ClipLengths(geometry.clip_frames, 0 if inputs.get("start_from_picture") else FIRST_CLIP_SKIP)
