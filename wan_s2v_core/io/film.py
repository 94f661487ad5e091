"""Finished clips become one film with sound, which says where they begin."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from .clip_store import StoredClips
from .video import VideoWriter, preset_of

log = logging.getLogger(__name__)

CLIP_FRAMES_TAG = "clip_frames"
"""The tag of a film with the frames of each of its clips, a list as JSON."""
FRAMES_AT_ONCE = 8
"""Written between two looks at whether to stop."""


def write_film(
    target: Path, clips: StoredClips, tags: dict[str, str] | None, on_frames: Callable[[int], None] | None = None
) -> None:
    """Clip after clip into one file with sound; memory holds one clip. The suffix of `target` says which kind.

    Args:
        tags: of the file, besides the frames of its clips. None: it is to tell nothing.
        on_frames: called with the number of frames written so far; may raise to stop.
    """
    size = (clips.width_px, clips.height_px)
    told = {} if tags is None else {**tags, CLIP_FRAMES_TAG: json.dumps(clips.clip_frames)}
    with VideoWriter(target, *size, clips.fps, clips.recording, preset_of(target), told) as writer:
        for frames in clips:
            for few in frames.split(FRAMES_AT_ONCE):
                writer.write(few)
                if on_frames:
                    on_frames(writer.frames)
    log.info("%s: %d frames", target, clips.frames)
