"""Folders of clips, one for each run, and those that runs left behind: cancelled ones, and videos never saved."""

import logging
import re
import secrets
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .clip_store import SETTINGS, read_settings

log = logging.getLogger(__name__)

OUR_FOLDER = re.compile(r"\d{8}_\d{6}_[0-9a-f]{6}")
OUR_FILE = re.compile(
    rf"clip_\d{{4}}\.(mkv|safetensors)|motion\.safetensors|{re.escape(SETTINGS)}|\.(clip_\d{{4}}|motion|settings)\..*part"
)
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
    except OSError:  # gone meanwhile, or not ours to read
        return None
    is_ours = all(OUR_FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink() for path in entries)
    if not is_ours or read_settings(folder).get("keep_clips") is not False:
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
            shutil.rmtree(leftover.folder, ignore_errors=True)
            deleted.append(leftover.folder)
    if deleted:
        log.info(
            "deleted clips that %d earlier runs left in %s, as they took over %.1f GB",
            len(deleted),
            root,
            limit_bytes / 1e9,
        )
    return deleted
