"""Finished clips in a folder of their own, so that nothing already made is lost when a run ends early.

Each clip is a film and its latents. With the latents stand the clip's key, see `conditioning.keys`, what the film is,
and a digest of all of it: a later run takes over clips whose keys are its own and whose files are as they were
written. Anything else in such a folder is made again; only what is not ours, or a finished clip of another video, is
never overwritten.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, shown
from ..geometry import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT
from .audio import SHORTEST_SPEECH_SAMPLES, SPEECH_HZ, Recording
from .digest import file_digest
from .locks import sweep, written
from .outside import file_size, read_json
from .records import Record, Shapes, read_facts, read_record, write_record
from .video import VideoWriter, read_frames

log = logging.getLogger(__name__)

LOSSLESS = "lossless-mkv"
SETTINGS = "settings.json"
LARGEST_SETTINGS_BYTES = 4_000_000
SAVED = "saved"
"""In the settings: whether the clips have become a video, so that they may go."""
LATENTS, MOTION = "latents", "motion_video"
OUR_FILE = re.compile(
    rf"clip_\d{{4,6}}\.(mkv|safetensors)|motion\.safetensors|{re.escape(SETTINGS)}|\.(clip_\d{{4,6}}|motion|settings)\..*part"
)
NUMBERED = re.compile(r"clip_(\d{4,6})\.safetensors")
NUMBER = re.compile(r"[1-9][0-9]{0,8}")

Sizes = Callable[[int], tuple[int, int, int]]
"""Of a clip by its index: the frames that it adds, their height and width."""


def clip_path(folder: Path, index: int, suffix: str = ".mkv") -> Path:
    return folder / f"clip_{index:04d}{suffix}"


def motion_path(folder: Path) -> Path:
    """The frames that the clip after the newest starts from."""
    return folder / "motion.safetensors"


def save_checked(path: Path, name: str, tensor: Tensor, facts: dict[str, str]) -> None:
    """Write a tensor with facts about it, and a digest of both."""
    write_record(path, {name: tensor}, facts)


def stored_keys(folder: Path) -> list[str]:
    """The keys of the clips in a folder, up to the first without one, as the files say."""
    keys: list[str] = []
    while key := read_facts(clip_path(folder, len(keys), ".safetensors")).get("key"):
        keys.append(key)
    return keys


def clip_numbers(folder: Path) -> list[int]:
    """Indices of the clips that have latents, damaged or not. A film without latents was never finished."""
    try:
        return sorted(int(found[1]) for name in os.listdir(folder) if (found := NUMBERED.fullmatch(name)))
    except OSError:
        return []


def clips_in(folder: Path) -> int:
    """How many clips a folder holds or held, damaged ones included."""
    return max(clip_numbers(folder), default=-1) + 1


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that clips were made with, as anybody may have written them; none if they cannot be read."""
    try:
        return read_json(folder / SETTINGS, largest_bytes=LARGEST_SETTINGS_BYTES)
    except ConfigError:
        return {}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises OSError if the disk does not take them."""
    with written(folder / SETTINGS) as partial:
        text = json.dumps(settings, ensure_ascii=False, indent=1)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def keeps_clips(settings: dict[str, Any]) -> bool:
    """Whether clips with these settings are to be kept, or nobody can tell."""
    return settings.get("keep_clips") is not False


def is_saved(folder: Path) -> bool:
    """Whether the clips there have become a video and were not to be kept: nobody misses them."""
    settings = read_settings(folder)
    return settings.get(SAVED) is True and not keeps_clips(settings)


def read_clip(folder: Path, index: int) -> Record | None:
    """The record of a clip; None if it is missing, damaged, or no record of a clip."""

    def fits(facts: dict[str, str], shapes: Shapes) -> bool:
        return facts.get("clip") == str(index) and latents_fit(facts, shapes)

    return read_record(clip_path(folder, index, ".safetensors"), fits)


def latents_fit(facts: dict[str, str], shapes: Shapes) -> bool:
    """Whether facts and shapes are those of one clip."""
    numbers = [facts.get(name, "") for name in ("frames", "height", "width", "film_bytes")]
    if set(shapes) != {LATENTS} or not all(map(NUMBER.fullmatch, numbers)):
        return False
    frames, height, width, _ = map(int, numbers)
    shape = shapes[LATENTS]
    sides = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return (
        len(shape) == 5
        and shape[:2] == (1, LATENT_CHANNELS)
        and shape[3:] == sides
        and (height, width) == tuple(PIXELS_PER_LATENT * side for side in sides)
        and FRAMES_PER_LATENT * shape[2] >= frames
    )


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings that the first clip was made with, which stand under its digest; none if it is damaged."""
    record = read_clip(folder, 0)
    try:
        settings = json.loads(record.facts["settings"]) if record else {}
    except (KeyError, ValueError):
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
    films: tuple[str, ...] = ()
    """Digests of the films."""

    @property
    def clips(self) -> int:
        return len(self.clip_frames)


def find_earlier(folders: Iterable[Path], keys: Sequence[str], sizes: Sizes | None = None) -> EarlierClips | None:
    """The longest beginning of a video among `folders`, undamaged; None if none has its first clip.

    Args:
        keys: of the clips of the video; only as many are looked at as a folder could match.
        sizes: of its clips.
    """
    best: EarlierClips | None = None
    ranked = []
    for folder in folders:
        stored = stored_keys(folder)
        matching = next((i for i, key in enumerate(stored) if i == len(keys) or keys[i] != key), len(stored))
        has_motion = bool(matching) and read_facts(motion_path(folder)).get("key") == stored[matching - 1]
        ranked.append((matching, has_motion, folder))
    for matching, _, folder in sorted(ranked, key=lambda found: found[:2], reverse=True):
        if matching <= (best.clips if best else 0):
            break
        facts = undamaged(folder, matching, sizes)
        if len(facts) > (best.clips if best else 0):
            frames, films = (tuple(fact[name] for fact in facts) for name in ("frames", "film"))
            size = int(facts[0]["height"]), int(facts[0]["width"])
            is_all = other_clip(folder, keys) is None
            best = EarlierClips(folder, tuple(map(int, frames)), size, is_all, films)
    return best


def undamaged(folder: Path, clips: int, sizes: Sizes | None = None) -> list[dict[str, str]]:
    """The facts of the first clips, up to one whose film or latents are no longer what was written."""
    facts: list[dict[str, str]] = []
    for index in range(clips):
        record = read_clip(folder, index)
        if record is None or not is_film_of(clip_path(folder, index), record.facts, sizes and sizes(index)):
            log.warning("clip %d in %s is damaged and is made again", index + 1, folder)
            break
        facts.append(record.facts)
    return facts


def is_film_of(path: Path, facts: dict[str, str], size: tuple[int, int, int] | None = None) -> bool:
    """Whether a film is the one that a record of a clip tells of, and as large as the clip is to be."""
    told = int(facts["frames"]), int(facts["height"]), int(facts["width"])
    try:
        is_whole = file_size(path) == int(facts["film_bytes"]) and file_digest(path) == facts.get("film")
    except (OSError, ConfigError):
        return False
    return is_whole and size in (None, told)


def other_clip(folder: Path, keys: Sequence[str]) -> int | None:
    """The index of a finished clip in the folder that is of another video than the one of `keys`, or None."""
    for index in clip_numbers(folder):
        if index < len(keys) and read_facts(clip_path(folder, index, ".safetensors")).get("key") == keys[index]:
            continue
        if read_clip(folder, index) is not None:
            return index
    return None


def foreign_file(folder: Path) -> Path | None:
    """Something in the folder that no run of ours has put there, or None."""
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if not OUR_FILE.fullmatch(path.name) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            return path
    return None


def check_ours(folder: Path) -> None:
    """Raises ConfigError if a folder for clips is none of ours; one that is not there is nobody's."""
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            kind = "a link that leads nowhere" if not folder.exists() else "no folder"
            raise ConfigError(
                f"{shown(folder)} is {kind}; finished clips are kept there. Delete it, or save under another name."
            )
        found = foreign_file(folder)
    except OSError as error:
        raise ConfigError(f"{shown(folder)} cannot be used: {error.strerror}. Move or delete it.") from error
    if found is not None:
        raise ConfigError(
            f"{shown(folder)} is there already and not of an earlier run alone: it holds {shown(found.name)}. Move or "
            "delete it, or save under another name."
        )


def check_unused(folder: Path, keys: Sequence[str] = ()) -> None:
    """Raises ConfigError if the folder holds anything that a run must not overwrite: what is not ours, or a finished
    clip of another video than the one of `keys`."""
    check_ours(folder)
    if is_saved(folder):
        return
    if (index := other_clip(folder, keys)) is not None:
        raise ConfigError(
            f"{shown(folder)} is there already, with clips of an earlier run that did not end and made another video "
            f"({clip_path(folder, index, '.safetensors').name}). Move or delete it, or save under another name."
        )


def remove_clips(folder: Path) -> None:
    """Delete a folder of clips. The settings go last: a folder of which half is left is still known for what it is."""
    try:
        names = sorted(os.listdir(folder), key=lambda name: name == SETTINGS)
        for name in names:
            if OUR_FILE.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        log.info("%s is not deleted: %s", folder, error)


AGAIN = "Run it again: what is missing is made anew."


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
    films: tuple[str, ...] = ()
    """Digests of the films."""

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
        record = read_clip(self.folder, index)
        if record is None:
            raise ConfigError(f"{self.path(index, '.safetensors')} is missing or damaged. {AGAIN}")
        return record.tensors[LATENTS]

    def motion_video(self) -> Tensor | None:
        """B 3 T H W: the frames that the next clip starts from; None if those of the last clip were not kept."""
        if self.last_key is None:
            return None

        def fits(facts: dict[str, str], shapes: Shapes) -> bool:
            shape = shapes.get(MOTION, ())
            is_right = len(shape) == 5 and shape[:2] == (1, 3) and shape[3:] == (self.height_px, self.width_px)
            return facts.get("key") == self.last_key and is_right

        record = read_record(motion_path(self.folder), fits)
        return record.tensors[MOTION] if record else None

    @property
    def files(self) -> list[Path]:
        """Of all clips: films and latents."""
        return [
            self.path(index, suffix) for index in range(len(self.clip_frames)) for suffix in (".mkv", ".safetensors")
        ]

    def __iter__(self) -> Iterator[Tensor]:
        """The pictures of clip after clip, T H W 3 uint8.

        Raises:
            ConfigError: if a clip is no longer there, or no longer what was written.
        """
        for index, frames in enumerate(self.clip_frames):
            path = self.path(index)
            if not path.is_file():
                raise ConfigError(f"{path} is no longer there: the clips were deleted. {AGAIN}")
            if self.films and file_digest(path) != self.films[index]:
                raise ConfigError(f"{path} is damaged: it is not what was written. {AGAIN}")
            found = read_frames(path, self.fps, 0, frames)
            if len(found) != frames:
                raise ConfigError(f"{path} holds {len(found)} of {frames} frames: it is damaged. {AGAIN}")
            yield found

    def mark_saved(self) -> None:
        """Note on the disk that the clips have become a video. Does nothing where the disk does not take it."""
        try:
            write_settings(self.folder, {**self.settings, SAVED: True})
        except OSError as error:
            log.info("%s: that it is saved cannot be noted (%s)", self.folder, error)

    def remove(self) -> None:
        """Delete the folder, when its clips have become a video."""
        self.mark_saved()
        remove_clips(self.folder)


class ClipStore:
    """Keeps clip after clip as it is finished.

    Args:
        folder: made with the first clip. What a run that ended early left there unfinished is removed.
        recording: the sound of the whole video.
        settings: anything JSON, kept as `settings.json` for people, and with the first clip.
        keys: of the clips of the video; without them no later run can go on from these clips.
        earlier: clips to begin with. Those in `folder` itself are gone on with there; others are linked, or copied
            where the disk has no links, so that neither folder needs the other.
    Raises:
        ConfigError: if the folder holds what is not ours, or a finished clip of another video.
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
        check_ours(folder) if is_continued else check_unused(folder, keys or ())
        self.folder, self.fps, self.recording, self.settings, self.keys = folder, fps, recording, settings, keys
        self.clip_frames: list[int] = []
        self.films: list[str] = []
        self.size_px = (0, 0)
        if is_continued:
            sweep(folder)
            with contextlib.suppress(OSError):  # the older settings made the same clips
                write_settings(folder, settings)
        elif folder.exists():
            remove_clips(folder)
        if earlier is not None:
            self.size_px = earlier.size_px
            brought = earlier.clips if is_continued else self._take_over(earlier)
            self.clip_frames += earlier.clip_frames[:brought]
            self.films += earlier.films[:brought]

    @property
    def stored(self) -> StoredClips:
        """What has been kept so far."""
        height, width = self.size_px
        frames = tuple(self.clip_frames)
        last_key = self.keys[len(frames) - 1] if self.keys and frames else None
        films = tuple(self.films)
        return StoredClips(self.folder, self.fps, width, height, self.recording, self.settings, frames, last_key, films)

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
            film = stored.path(index)
            with VideoWriter(film, width, height, self.fps, sound, LOSSLESS) as writer:
                writer.write(frames)
            key = {"key": self.keys[index]} if self.keys else {}
            facts = {"clip": str(index), "frames": str(len(frames)), "height": str(height), "width": str(width)}
            facts |= {"film": file_digest(film), "film_bytes": str(film.stat().st_size)}
            told = {} if index else {"settings": json.dumps(self.settings)}
            save_checked(stored.path(index, ".safetensors"), LATENTS, latents, key | facts | told)
            save_checked(motion_path(self.folder), MOTION, motion_video, key)
        except (OSError, ConfigError) as error:
            if not index:  # a folder without a clip would only be in the way
                remove_clips(self.folder)
            raise ConfigError(
                f"clip {index + 1} cannot be kept in {self.folder} ({str(error).rstrip('.')}). "
                f"Free some space or save elsewhere; finished clips there: {index}."
            ) from error
        self.clip_frames.append(len(frames))
        self.films.append(facts["film"])

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_settings(self.folder, self.settings)

    def _take_over(self, earlier: EarlierClips) -> int:
        """Bring clips of another folder here -> how many could be brought."""
        taken = 0
        try:
            self._begin()
            for index in range(earlier.clips):
                for suffix in (".mkv", ".safetensors"):
                    link_or_copy(clip_path(earlier.folder, index, suffix), clip_path(self.folder, index, suffix))
                taken += 1
            if self.keys and read_facts(motion_path(earlier.folder)).get("key") == self.keys[taken - 1]:
                link_or_copy(motion_path(earlier.folder), motion_path(self.folder))
        except OSError as error:
            log.warning("%s of %s cannot be used here (%s)", f"clip {taken + 1}", earlier.folder, error.strerror)
        if not taken:
            remove_clips(self.folder)
        return taken


def sound_of(recording: Recording, fps: float, start: int, frames: int) -> Recording:
    """The stretch of sound that belongs to some frames, silence past the end."""
    samples, rate = recording.samples, recording.rate_hz
    first, stop = (round(frame / fps * rate) for frame in (start, start + frames))
    shortest = -(-SHORTEST_SPEECH_SAMPLES * rate // SPEECH_HZ)
    own = samples[:, first:stop]
    return Recording(F.pad(own, (0, max(stop - first, shortest) - own.shape[1])), rate)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; neither name needs the other one."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with written(target) as partial:
            shutil.copyfile(source, partial)
