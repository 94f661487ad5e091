"""Finished clips as small films, which the page plays while later clips are made."""

import contextlib
import logging
import shutil
from pathlib import Path

import folder_paths
from torch import Tensor

from ..wan_s2v_core.io.clip_store import ClipStore, clip_path, sound_of
from ..wan_s2v_core.io.small_film import write_small_film
from .bridge.clips import CLIPS_FOLDER
from .bridge.messages import CLIP, tell

log = logging.getLogger(__name__)

KEPT_RUNS = 8
"""Films of older runs are deleted; ComfyUI empties its temp folder when it starts."""


class ClipFilms:
    """The films of one run in ComfyUI's temp folder, told to the page as they come. A film that cannot be made is left
    out, with one line in the log: the run goes on.

    Args:
        store: keeps the clips themselves. Films of those it began with may be there from the run that made them.
        clips: of the whole video.
    """

    def __init__(self, node_id: str, store: ClipStore, clips: int):
        self.node_id, self.store, self.clips = node_id, store, clips
        self.root = Path(folder_paths.get_temp_directory()) / CLIPS_FOLDER
        self.folder = self.root / store.folder.name
        self.failed = False
        finished = len(store.clip_frames)
        films = [self._entry(index) for index in range(finished) if self._path(index).is_file()]
        tell(CLIP, node_id, clips=clips, finished=finished, films=films, begins=True)

    def add(self, frames: Tensor) -> None:
        """Make the film of the clip that the store took last: T H W 3 uint8."""
        index, fps = len(self.store.clip_frames) - 1, self.store.fps
        sound = sound_of(self.store.recording, fps, sum(self.store.clip_frames[:-1]), len(frames))
        films = []
        try:
            if not self.failed:
                self._make_folder()
                write_small_film(self._path(index), frames, fps, sound)
                films = [self._entry(index)]
        except Exception as error:  # a film to look at never ends a run of hours, whatever an encoder raises
            self.failed = True
            log.warning("finished clips are not shown in the page (%s); the run goes on", error)
        tell(CLIP, self.node_id, clips=self.clips, finished=index + 1, films=films)

    def _path(self, index: int) -> Path:
        return clip_path(self.folder, index, ".mp4")

    def _entry(self, index: int) -> dict[str, str | int]:
        """What ComfyUI's own /view route needs to know of a film."""
        subfolder = f"{CLIPS_FOLDER}/{self.folder.name}"
        return {"clip": index, "filename": self._path(index).name, "subfolder": subfolder, "type": "temp"}

    def _make_folder(self) -> None:
        if self.folder.is_dir():
            return
        self.folder.mkdir(parents=True)
        runs = sorted((path for path in self.root.iterdir() if path.is_dir()), key=modified_ns, reverse=True)
        for run in runs[KEPT_RUNS:]:
            shutil.rmtree(run, ignore_errors=True)


def modified_ns(path: Path) -> int:
    """0 for what has just been deleted."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0
