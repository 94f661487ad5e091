"""The folder beside a video in which its finished clips are kept until it is complete."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from ..config import ExpertRouting, SamplingConfig
from .clip_store import EarlierClips, check_ours, check_unused, is_saved, recorded_settings

log = logging.getLogger(__name__)


def clips_folder(target: Path) -> Path:
    """Where the finished clips of a video are kept until it is complete."""
    return target.with_name(f"{target.name}.clips")


def check_earlier(folder: Path, sampling: SamplingConfig, routing: ExpertRouting) -> None:
    """Tell early, before networks are loaded, that the clips in the way are not the beginning of this video.

    Raises:
        ConfigError: if there are any that this run cannot go on from, as far as the settings of the first show.
    """
    check_ours(folder)
    before = recorded_settings(folder)
    asked = json.loads(json.dumps({"sampling": sampling.to_dict(), "routing": routing.to_dict()}))
    if before and any(before.get(name) != value for name, value in asked.items()):
        check_unused(folder)


def earlier_seed(target: Path) -> int | None:
    """The seed of a run for `target` that did not end."""
    folder = clips_folder(target)
    sampling = {} if is_saved(folder) else recorded_settings(folder).get("sampling")
    seed = sampling.get("seed") if isinstance(sampling, dict) else None
    return seed if isinstance(seed, int) else None


def set_apart(earlier: EarlierClips) -> EarlierClips:
    """Clips of another video behind those that are gone on with are nobody's to overwrite: their folder is renamed."""
    if earlier.is_all:
        return earlier
    number = 1
    while (aside := folder_set_apart(earlier.folder, number)).exists():
        number += 1
    earlier.folder.rename(aside)
    log.warning("later clips there are of another video: they are now in %s", aside)
    return replace(earlier, folder=aside)


def folder_set_apart(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}")


def folders_set_apart(folder: Path) -> list[Path]:
    """Those that `set_apart` made of a folder: a run that was killed then has its clips there."""
    found: list[Path] = []
    while (aside := folder_set_apart(folder, len(found) + 1)).is_dir():
        found.append(aside)
    return found
