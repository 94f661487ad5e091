"""Folders of clips, one for each run, and those that runs left behind: cancelled ones, and videos never saved."""

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .clip_store import foreign_file, is_saved, keeps_clips, read_settings, remove_clips
from .locks import lock_of

log = logging.getLogger(__name__)

OUR_FOLDER = re.compile(r"\d{8}_\d{6}_[0-9a-f]{6}")
RECENT_SECONDS = 24 * 3600
"""What was touched since then stays: another server may be at work there, or somebody about to go on."""


def new_folder(root: Path) -> Path:
    """A name for the folder of a run; nothing is made."""
    return root / f"{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Leftover:
    """A folder of clips that may go: it is ours in every file, and was not to be kept."""

    folder: Path
    touched: float
    files: dict[tuple[int, int], int]
    """Size by device and number: runs with the same beginning share the files of its clips."""


def leftover_at(folder: Path) -> Leftover | None:
    """None for what is somebody's, or to be kept."""
    try:
        if not OUR_FOLDER.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            return None
        entries = {path: path.lstat() for path in folder.iterdir()}
        touched = max(facts.st_mtime for facts in (folder.lstat(), *entries.values()))
        is_ours = foreign_file(folder) is None
    except OSError:  # gone meanwhile, or not ours to read
        return None
    if not is_ours or keeps_clips(read_settings(folder)):
        return None
    return Leftover(folder, touched, {(facts.st_dev, facts.st_ino): facts.st_size for facts in entries.values()})


def delete_leftovers(root: Path, limit_bytes: float, never: Collection[Path] = ()) -> list[Path]:
    """Delete the oldest folders that runs left in `root` while they take more than `limit_bytes` -> those deleted.

    Args:
        never: folders in use. They and those touched since RECENT_SECONDS count, but stay.
    """
    found = [leftover_at(path) for path in root.iterdir()] if root.is_dir() else []
    taken: dict[tuple[int, int], int] = {}
    deleted: list[Path] = []
    for leftover in sorted(filter(None, found), key=lambda leftover: leftover.touched, reverse=True):
        taken |= leftover.files
        is_recent = leftover.touched > time.time() - RECENT_SECONDS
        if sum(taken.values()) > limit_bytes and not is_recent and leftover.folder not in never:
            deleted += [leftover.folder] if remove_unused(leftover.folder) else []
    if deleted:
        log.info(
            "deleted clips that %d earlier runs left in %s, as they took over %.1f GB",
            len(deleted),
            root,
            limit_bytes / 1e9,
        )
    return deleted


def sweep_locks(root: Path) -> None:
    """Remove the locks that killed runs left beside their folders."""
    for path in root.glob(".*.lock") if root.is_dir() else ():
        folder = path.with_name(path.name[1:].removesuffix(".lock"))
        lock = lock_of(folder)
        with contextlib.suppress(OSError):
            if OUR_FOLDER.fullmatch(folder.name) and lock.acquire(creates=False):
                lock.release(removes=lock.is_sure)


def delete_saved(root: Path, never: Collection[Path] = ()) -> list[Path]:
    """Delete the folders in `root` whose clips have become a video -> those deleted.

    Args:
        never: folders in use.
    """
    found = [leftover_at(path) for path in root.iterdir()] if root.is_dir() else []
    folders = [leftover.folder for leftover in found if leftover and is_saved(leftover.folder)]
    return [folder for folder in folders if folder not in never and remove_unused(folder)]


def remove_unused(folder: Path) -> bool:
    """Delete a folder of clips unless a run is at work there -> whether it did."""
    lock = lock_of(folder)
    try:
        if not lock.acquire():
            return False
    except OSError:
        return False
    try:
        remove_clips(folder)
    finally:
        lock.release()
    return not folder.exists()
