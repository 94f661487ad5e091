"""Finished clips in a folder of their own, so that nothing already made is lost when a run ends early.

Each clip is a film and its latents. With the latents stand the clip's key, see `conditioning.keys`, and digests of
both: a later run takes over clips whose keys are its own and whose files are as they were written.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from .audio import SHORTEST_SPEECH_SAMPLES, SPEECH_HZ, Recording
from .digest import digest_of, file_digest
from .video import VideoWriter, read_frames

log = logging.getLogger(__name__)

LOSSLESS = "lossless-mkv"
SETTINGS = "settings.json"
LATENTS, MOTION = "latents", "motion_video"


def clip_path(folder: Path, index: int, suffix: str = ".mkv") -> Path:
    return folder / f"clip_{index:04d}{suffix}"


def motion_path(folder: Path) -> Path:
    """The frames that the clip after the newest starts from."""
    return folder / "motion.safetensors"


def save_checked(path: Path, name: str, tensor: Tensor, facts: dict[str, str]) -> None:
    """Write a tensor with facts about it; the file takes its name when it is whole."""
    tensor = tensor.contiguous().cpu()
    partial = path.with_name(f".{path.name}.part")
    try:
        save_file({name: tensor}, partial, {**facts, "digest": digest_of(None, tensor)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_facts(path: Path) -> dict[str, str]:
    """What was written with a tensor; nothing if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def read_checked(path: Path, name: str) -> Tensor | None:
    """The tensor, or None if the file is missing or no longer what was written."""
    try:
        with safe_open(path, "pt") as file:
            tensor, facts = file.get_tensor(name), file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return tensor if facts.get("digest") == digest_of(None, tensor) else None


def stored_keys(folder: Path) -> list[str]:
    """The keys of the clips in a folder, up to the first without one."""
    keys: list[str] = []
    while key := read_facts(clip_path(folder, len(keys), ".safetensors")).get("key"):
        keys.append(key)
    return keys


def clips_in(folder: Path) -> int:
    """How many clips a folder holds or held, damaged ones included. A film without latents was never finished."""
    return max((int(path.stem[-4:]) + 1 for path in folder.glob("clip_[0-9][0-9][0-9][0-9].safetensors")), default=0)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that clips were made with; none if they cannot be read."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class EarlierClips:
    """The first clips in a folder, which a run would make just so: they need not be made again."""

    folder: Path
    clip_frames: tuple[int, ...]
    size_px: tuple[int, int]
    """Height and width."""
    is_all: bool
    """Whether the folder holds none of another video."""

    @property
    def clips(self) -> int:
        return len(self.clip_frames)


def find_earlier(folders: Iterable[Path], keys: Sequence[str]) -> EarlierClips | None:
    """The longest beginning of a video among `folders`, undamaged; None if none has its first clip.

    Args:
        keys: of the clips of the video; only as many are looked at as a folder could match.
    """
    best: EarlierClips | None = None
    ranked = []
    for folder in folders:
        stored = stored_keys(folder)
        matching = next((i for i, key in enumerate(stored) if i == len(keys) or keys[i] != key), len(stored))
        has_motion = bool(matching) and read_facts(motion_path(folder)).get("key") == stored[matching - 1]
        ranked.append((matching, has_motion, folder, clips_in(folder) == matching))
    for matching, _, folder, is_all in sorted(ranked, key=lambda facts: facts[:2], reverse=True):
        if matching <= (best.clips if best else 0):
            break
        facts = undamaged(folder, matching)
        if len(facts) > (best.clips if best else 0):
            frames = tuple(int(fact["frames"]) for fact in facts)
            best = EarlierClips(folder, frames, (int(facts[0]["height"]), int(facts[0]["width"])), is_all)
    return best


def undamaged(folder: Path, clips: int) -> list[dict[str, str]]:
    """The facts of the first clips, up to one whose film or latents are no longer what was written."""
    facts: list[dict[str, str]] = []
    for index in range(clips):
        latents = clip_path(folder, index, ".safetensors")
        try:
            is_whole = file_digest(clip_path(folder, index)) == read_facts(latents).get("film")
        except OSError:
            is_whole = False
        if not is_whole or read_checked(latents, LATENTS) is None:
            log.warning("clip %d in %s is damaged and is made again", index + 1, folder)
            break
        facts.append(read_facts(latents))
    return facts


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
    last_key: str | None = None
    """The key of the last of them."""

    @property
    def frames(self) -> int:
        return sum(self.clip_frames)

    def path(self, index: int, suffix: str = ".mkv") -> Path:
        return clip_path(self.folder, index, suffix)

    def latents(self, index: int) -> Tensor:
        """B C F h w, as sampled.

        Raises:
            ConfigError: if they are no longer there.
        """
        latents = read_checked(self.path(index, ".safetensors"), LATENTS)
        if latents is None:
            raise ConfigError(f"{self.path(index, '.safetensors')} is missing or damaged. Sample again.")
        return latents

    def motion_video(self) -> Tensor | None:
        """B 3 T H W: the frames that the next clip starts from; None if those of the last clip were not kept."""
        path = motion_path(self.folder)
        is_newest = self.last_key is not None and read_facts(path).get("key") == self.last_key
        return read_checked(path, MOTION) if is_newest else None

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
        keys: of the clips of the video; without them no later run can go on from these clips.
        earlier: clips to begin with. Those in `folder` itself are gone on with there; others are linked, or copied
            where the disk has no links, so that neither folder needs the other.
    Raises:
        ConfigError: if the folder is there.
    """

    def __init__(
        self,
        folder: Path,
        fps: float,
        recording: Recording,
        settings: dict[str, Any],
        keys: Sequence[str] | None = None,
        earlier: EarlierClips | None = None,
    ):
        is_continued = earlier is not None and earlier.folder == folder
        if not is_continued:
            check_unused(folder)
        self.folder, self.fps, self.recording, self.settings, self.keys = folder, fps, recording, settings, keys
        self.clip_frames: list[int] = []
        self.size_px = (0, 0)
        self.is_begun = is_continued
        if earlier is not None:
            self.size_px = earlier.size_px
            self.clip_frames += earlier.clip_frames if is_continued else self._take_over(earlier)
        if is_continued:
            with contextlib.suppress(OSError):  # the older settings made the same clips
                self._write_settings()

    @property
    def stored(self) -> StoredClips:
        """What has been kept so far."""
        height, width = self.size_px
        frames = tuple(self.clip_frames)
        last_key = self.keys[len(frames) - 1] if self.keys and frames else None
        return StoredClips(self.folder, self.fps, width, height, self.recording, self.settings, frames, last_key)

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
        stored, sound = self.stored, sound_of(self.recording, self.fps, sum(self.clip_frames), len(frames))
        height, width = self.size_px
        try:
            if not index:
                self._begin()
            with VideoWriter(stored.path(index), width, height, self.fps, sound, LOSSLESS) as writer:
                writer.write(frames)
            key = {"key": self.keys[index]} if self.keys else {}
            facts = {"frames": str(len(frames)), "height": str(height), "width": str(width)}
            facts["film"] = file_digest(stored.path(index))
            save_checked(stored.path(index, ".safetensors"), LATENTS, latents, key | facts)
            save_checked(motion_path(self.folder), MOTION, motion_video, key)
        except (OSError, SafetensorError, ConfigError) as error:
            if not index and self.is_begun:  # a folder without a clip would only be in the way of the next run
                shutil.rmtree(self.folder, ignore_errors=True)
                self.is_begun = False
            raise ConfigError(
                f"clip {index + 1} cannot be kept in {self.folder} ({str(error).rstrip('.')}). "
                f"Free some space or save elsewhere; finished clips there: {index}."
            ) from error
        self.clip_frames.append(len(frames))

    def _begin(self) -> None:
        self.folder.mkdir(parents=True)
        self.is_begun = True
        self._write_settings()

    def _write_settings(self) -> None:
        text, partial = json.dumps(self.settings, ensure_ascii=False, indent=1), self.folder / f".{SETTINGS}.part"
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.folder / SETTINGS)
        finally:
            partial.unlink(missing_ok=True)

    def _take_over(self, earlier: EarlierClips) -> list[int]:
        """Bring clips of another folder here -> the frames of each that could be brought."""
        taken: list[int] = []
        try:
            self._begin()
            for index, frames in enumerate(earlier.clip_frames):
                for suffix in (".mkv", ".safetensors"):
                    link_or_copy(clip_path(earlier.folder, index, suffix), clip_path(self.folder, index, suffix))
                taken.append(frames)
            if self.keys and read_facts(motion_path(earlier.folder)).get("key") == self.keys[len(taken) - 1]:
                link_or_copy(motion_path(earlier.folder), motion_path(self.folder))
        except OSError as error:
            log.warning("%s of %s cannot be used here (%s)", f"clip {len(taken) + 1}", earlier.folder, error.strerror)
        if not taken and self.is_begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.is_begun = False
        return taken


def sound_of(recording: Recording, fps: float, start: int, frames: int) -> Recording:
    """The stretch of sound that belongs to some frames, silence past the end."""
    samples, rate = recording.samples, recording.rate_hz
    first, stop = (round(frame / fps * rate) for frame in (start, start + frames))
    shortest = -(-SHORTEST_SPEECH_SAMPLES * rate // SPEECH_HZ)
    own = samples[:, first:stop]
    return Recording(F.pad(own, (0, max(stop - first, shortest) - own.shape[1])), rate)


def check_unused(folder: Path) -> None:
    """Raises ConfigError if the folder is there."""
    if folder.exists():
        raise ConfigError(
            f"{folder} is there already, with clips of an earlier run that did not end. Move or delete it."
        )


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; neither name needs the other one."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
