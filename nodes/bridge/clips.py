"""The clips of runs in ComfyUI's output folder: where a run keeps them, and which go when."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...wan_s2v_core.errors import ConfigError, shown
from ...wan_s2v_core.io.clip_folders import delete_leftovers, delete_saved, new_folder, sweep_locks
from ...wan_s2v_core.io.clip_store import EarlierClips, StoredClips, clip_path, clips_in, keeps_clips, read_settings
from ...wan_s2v_core.io.locks import held, lock_of
from ...wan_s2v_core.runs import Run
from ..made import MADE

CLIPS_FOLDER = "wan_s2v_clips"


def clips_root() -> Path:
    return Path(folder_paths.get_output_directory()) / CLIPS_FOLDER


def find_clips(run: Run) -> EarlierClips | None:
    """The longest beginning of a run's video in the output folder."""
    root = clips_root()
    return run.find_earlier(sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else [])


def clips_folder(earlier: EarlierClips | None, clips: int) -> Path:
    """Where the clips of a run are kept: that of a run which made the same video, or ended early and only had clips of
    this one; or a new one. Clips of another video, or that are to be kept, stay what they are.

    Args:
        clips: of the whole video.
    """
    if earlier and earlier.is_all:
        before = read_settings(earlier.folder)
        planned = before.get("clips")
        ended_early = isinstance(planned, int) and clips_in(earlier.folder) < planned
        if not keeps_clips(before) and (ended_early or earlier.clips == clips):
            return earlier.folder
    return new_folder(clips_root())


@contextlib.contextmanager
def clips_begun(run: Run) -> Iterator[None]:
    """Within, a run keeps its clips in a folder in which no other server works meanwhile, after those it begins with.

    Raises:
        ConfigError: if the output folder cannot be written to.
    """
    try:
        clips_root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{shown(clips_root())} cannot be made ({error.strerror}). Make room, or move it.") from error
    earlier = find_clips(run)
    with contextlib.ExitStack() as stack:
        folder = clips_folder(earlier, run.job.clips)
        try:
            stack.enter_context(held(folder))
        except ConfigError:  # another server is at it
            folder = new_folder(clips_root())
            stack.enter_context(held(folder))
        if earlier and not clip_path(earlier.folder, earlier.clips - 1).is_file():  # it has just been deleted there
            earlier, folder = None, new_folder(clips_root())
            stack.enter_context(held(folder))
        run.begin(folder, earlier)
        yield


IN_USE: weakref.WeakSet[StoredClips] = weakref.WeakSet()
"""Clips that ComfyUI has among its cached results: a node behind the sampler may read them."""


def make_room(gigabytes: int, current: Path) -> None:
    """Delete what earlier runs left behind beyond so many GB, oldest first, but nothing in use; 0 deletes nothing."""
    sweep_locks(clips_root())
    if gigabytes:
        forget(delete_leftovers(clips_root(), gigabytes * 1e9, {current, *(clips.folder for clips in IN_USE)}))


def let_go(clips: StoredClips) -> None:
    """The clips have become a file. They stay until the next ones do, so that the same video in another format or under
    another name samples nothing; those of earlier videos go, but for what ComfyUI still has among its results."""
    clips.mark_saved()
    forget(delete_saved(clips_root(), {clips.folder, *(other.folder for other in IN_USE)}))


def forget(folders: list[Path]) -> None:
    """Folders of clips have been deleted."""
    for folder in folders:
        MADE.forget(folder)


@contextlib.contextmanager
def in_use(clips: StoredClips) -> Iterator[None]:
    """Within, no other server deletes the clips."""
    lock = lock_of(clips.folder)
    with contextlib.suppress(OSError):
        lock.acquire()  # where another one reads them too, it is as good
    try:
        yield
    finally:
        lock.release()
