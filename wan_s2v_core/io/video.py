"""Frames to video files and back, through PyAV. Encoders are data: video_presets.json."""

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError, shown
from .audio import Recording, check_recording, layout_name, resample, sound_blocks, sound_frame
from .display import picture_of, pixel_shape, shown_size
from .locks import PartialFile
from .media import CURE, best_stream, decoded_frames, import_av, open_media
from .outside import check_path, foreign_parser

log = logging.getLogger(__name__)

DEFAULT_PRESET = "h264-mp4"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPARE_NAME_BYTES = 24
"""For what stands beside a video while it is made: .NAME.clips.12.lock, and so on."""
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
CLOCK_TOLERANCE = 0.0015
"""Seconds; Matroska and WebM round time stamps to milliseconds."""
TIE_SECONDS = 1e-5
"""Closer than this two pictures count as equally near to a moment."""
BT709, LIMITED_RANGE = 1, 1
"""Numbers of ITU-T H.273 for the colour tags, and FFmpeg's for the range."""
LARGEST_DRIVING_AREA_PX = 9_000_000
"""Frames of a driving video that are larger than 4K are read smaller: a clip holds 80 and more of them."""
PLAIN_COLOURS = ("rgb", "bgr", "gbr", "gray", "pal")
"""Starts of pixel format names that hold no YUV and so need no matrix."""


@dataclass(frozen=True)
class VideoPreset:
    """One entry of video_presets.json. No entry in `audio_rates_hz` means any rate."""

    suffix: str
    container: str
    container_options: dict[str, str]
    video_codec: str
    pixel_format: str
    video_options: dict[str, str]
    size_multiple: int
    audio_codec: str
    audio_bit_rate: int
    audio_rates_hz: tuple[int, ...]
    most_channels: int

    def sound_rate(self, rate_hz: int) -> int:
        """The rate to store: `rate_hz` or the next higher one that the encoder takes, else its highest."""
        if not self.audio_rates_hz:
            return rate_hz
        return min((rate for rate in self.audio_rates_hz if rate >= rate_hz), default=max(self.audio_rates_hz))


@dataclass(frozen=True)
class VideoFacts:
    """What a video file holds, counted by decoding it."""

    frames: int
    fps: float
    width_px: int
    height_px: int
    seconds: float
    audio_seconds: float | None


@dataclass(frozen=True)
class VideoHeader:
    """What a video file says of itself, before anything is decoded."""

    fps: float
    has_sound: bool
    tags: dict[str, str]
    """By lower-case name: Matroska and WebM store them in upper case."""


@cache
def video_presets() -> dict[str, VideoPreset]:
    """All presets by name."""
    entries = json.loads(Path(__file__).with_name("video_presets.json").read_text(encoding="utf-8"))
    return {name: VideoPreset(**entry) for name, entry in entries.items()}


def video_preset(name: str) -> VideoPreset:
    """The preset of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in video_presets():
        raise ConfigError(f"preset={name!r} is unknown. Use one of: {', '.join(video_presets())}.")
    return video_presets()[name]


def exact_fps(fps: float | Fraction) -> Fraction:
    """Frames per second as a fraction: 23.976024 becomes 24000/1001.

    Raises:
        ConfigError: if it is not above 0, or above 1000.
    """
    if not 0.001 <= fps <= 1000:
        raise ConfigError(f"fps={fps} is no frame rate. Use a number from 0.001 to 1000, such as 16.")
    return Fraction(fps).limit_denominator(1001)


class VideoWriter:
    """A video file that grows with each `write`, with sound from its first frame on.

    A context manager. Settings are checked when it is made, the file is opened on entry. Frames are encoded as they
    come and not kept. On exit the sound is cut, or padded with silence, to the length of the pictures; then the
    finished file takes its name. After an exception nothing is left behind, and an older file of that name stays.

    Args:
        path: ends in the suffix of the preset.
        fps: frames per second.
        recording: the sound; None writes a silent film without an audio stream.
        preset: a name in video_presets.json.
        metadata: tags of the file. MP4 keeps keys as they are, Matroska and WebM store them in upper case.
    Raises:
        ConfigError: here for settings that cannot work; while writing for frames that do not fit, a disk that is
            full or a folder that is not writable; on exit if no frame was written.
        BackendUnavailable: if PyAV or the encoder is missing.
    """

    def __init__(
        self,
        path: str | Path,
        width_px: int,
        height_px: int,
        fps: float | Fraction,
        recording: Recording | None = None,
        preset: str = DEFAULT_PRESET,
        metadata: dict[str, str] | None = None,
    ):
        self.path, self.preset, self.fps = Path(path), video_preset(preset), exact_fps(fps)
        self.width_px, self.height_px, self.metadata = width_px, height_px, metadata or {}
        check_target(self.path, preset)
        _check_size(width_px, height_px, preset)
        if recording is not None:
            check_recording(recording, math.inf)
        self.sound = _fitting_sound(recording, self.preset) if recording is not None else None
        self.frames = self.sound_samples = 0
        self._partial: PartialFile | None = None
        self._container: Any = None

    def __enter__(self) -> "VideoWriter":
        with self._nothing_left_behind(), self._named_errors():
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._discard()
            return
        with self._nothing_left_behind():
            if not self.frames:
                raise ConfigError(f"no frame was written to {self.path}. A video needs at least one: write() it first.")
            with self._named_errors():
                self._finish()

    def write(self, frames: Tensor) -> None:
        """Encode T H W 3 uint8 RGB, and the sound up to their end.

        Raises:
            ConfigError: if they have another size or type, or the file cannot grow.
        """
        assert self._container is not None, "write() belongs inside the with block"
        wanted = (self.height_px, self.width_px, 3)
        if frames.ndim != 4 or tuple(frames.shape[1:]) != wanted or frames.dtype != torch.uint8:
            raise ConfigError(
                f"frames of shape {tuple(frames.shape)} and type {frames.dtype} do not fit {self.path.name}. "
                f"T x {' x '.join(map(str, wanted))} in torch.uint8 is expected: resize and convert them."
            )
        with self._named_errors():
            for frame in frames.cpu():
                self._encode_picture(frame)
            self._encode_sound(math.floor(self._samples_at(self.frames)))

    def _open(self) -> None:
        av, preset, self._partial = import_av(), self.preset, PartialFile(self.path)
        self._container = av.open(
            str(self._partial.path.absolute()), "w", format=preset.container, container_options=preset.container_options
        )
        self._container.metadata.update(self.metadata)
        self._pictures = self._container.add_stream(preset.video_codec, rate=self.fps, options=preset.video_options)
        context = self._pictures.codec_context
        context.width, context.height, context.pix_fmt = self.width_px, self.height_px, preset.pixel_format
        context.time_base, context.bit_rate = 1 / self.fps, 0
        if _is_yuv(preset.pixel_format):
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
        if self.sound is not None:
            layout = layout_name(len(self.sound.samples))
            self._voice = self._container.add_stream(preset.audio_codec, rate=self.sound.rate_hz, layout=layout)
            if preset.audio_bit_rate:
                self._voice.codec_context.bit_rate = preset.audio_bit_rate
        self._container.start_encoding()

    def _encode_picture(self, picture: Tensor) -> None:  # picture: H W 3
        av = import_av()
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.numpy()), format="rgb24")
        if _is_yuv(self.preset.pixel_format):
            frame = frame.reformat(
                format=self.preset.pixel_format,
                src_colorspace="ITU709",
                dst_colorspace="ITU709",
                src_color_range="JPEG",
                dst_color_range="MPEG",
            )
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        self._container.mux(self._pictures.encode(frame))
        self.frames += 1

    def _samples_at(self, frames: int) -> Fraction:
        return frames / self.fps * self.sound.rate_hz if self.sound is not None else Fraction(0)

    def _encode_sound(self, stop: int) -> None:
        """Encode the sound up to sample `stop`, silence where the recording has ended."""
        count = stop - self.sound_samples
        if self.sound is None or count <= 0:
            return
        samples = self.sound.samples[:, self.sound_samples : stop].numpy()  # C N
        limited = np.nan_to_num(samples.clip(-1, 1))  # encoders may hang on what lies far beyond full scale
        frame = sound_frame(np.pad(limited, ((0, 0), (0, count - samples.shape[1]))), self.sound.rate_hz)
        frame.pts, frame.time_base = self.sound_samples, Fraction(1, self.sound.rate_hz)
        self._container.mux(self._voice.encode(frame))
        self.sound_samples = stop

    def _finish(self) -> None:
        self._encode_sound(round(self._samples_at(self.frames)))
        self._container.mux(self._pictures.encode(None))
        if self.sound is not None:
            self._container.mux(self._voice.encode(None))
        self._container.close()
        self._partial.publish()

    def _discard(self) -> None:
        """Close and remove the unfinished file."""
        if self._container is not None:
            with contextlib.suppress(import_av().error.FFmpegError):  # a full disk refuses the trailer too
                self._container.close()
        if self._partial is not None:
            self._partial.discard()

    @contextlib.contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._discard()
            raise

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say what PyAV and the file system object to."""
        av = import_av()
        try:
            yield
        except av.codec.codec.UnknownCodecError as error:
            raise BackendUnavailable(
                f"encoder {error} is missing in this build of PyAV. {self.path.name} needs it: "
                "install av from PyPI, or pick another of the presets: " + ", ".join(video_presets()) + "."
            ) from error
        except (av.error.FFmpegError, OSError) as error:
            raise ConfigError(_refusal(self.path, error.errno, error.strerror)) from error
        except (ValueError, TypeError, ArithmeticError, MemoryError) as error:  # PyAV's own checks
            raise ConfigError(_refusal(self.path, None, shown(error))) from error


def _refusal(path: Path, number: int | None, reason: str | None) -> str:
    if number in DISK_FULL:
        return f"{path} cannot grow: {reason}. The disk or a quota is full: free some space, or write elsewhere."
    if number in NOT_WRITABLE:
        return f"{path} cannot be written: {reason}. Its folder must be writable: change that, or write elsewhere."
    return f"{path} cannot be written: {reason}. The encoder refused: try another size, frame rate or preset."


def preset_of(path: Path) -> str:
    """The preset whose suffix a file name has.

    Raises:
        ConfigError: if none has it.
    """
    suffixes = {preset.suffix: name for name, preset in video_presets().items()}
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{path.name} ends in no known kind of video. Use one of: {', '.join(suffixes)}.")
    return suffixes[path.suffix.lower()]


def check_target(path: Path, name: str) -> None:
    """Refuse a place to which preset `name` cannot write, before anything is made.

    Raises:
        ConfigError: if the suffix is another one's, the name is too long, or the folder is missing or not writable.
    """
    check_path("the name of the video", path, SPARE_NAME_BYTES)
    suffix = video_preset(name).suffix
    if path.suffix.lower() != suffix:
        raise ConfigError(
            f"{path.name} does not end in {suffix}, which preset {name!r} writes. "
            f"Name it {path.with_suffix(suffix).name if path.name else 'video' + suffix}, or use another preset."
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. The name of a file is expected: use another name.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not there or no folder. {path.name} goes into it: create it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(_refusal(path, errno.EACCES, os.strerror(errno.EACCES)))


def _check_size(width_px: int, height_px: int, name: str) -> None:
    if min(width_px, height_px) < 16 or max(width_px, height_px) > 16384:
        raise ConfigError(f"size {width_px} x {height_px} is no picture size. Use 16 to 16384 px on each side.")
    multiple = video_preset(name).size_multiple
    if width_px % multiple or height_px % multiple:
        others = [other for other, preset in video_presets().items() if preset.size_multiple == 1]
        fitting = [side - side % multiple for side in (width_px, height_px)]
        raise ConfigError(
            f"size {width_px} x {height_px} does not suit preset {name!r}, whose sides are multiples of {multiple}. "
            f"Use {fitting[0]} x {fitting[1]}, or a preset that takes any size: {', '.join(others)}."
        )


def _fitting_sound(recording: Recording, preset: VideoPreset) -> Recording:
    """The recording at a rate and with channels that the encoder takes."""
    channels, rate = len(recording.samples), preset.sound_rate(recording.rate_hz)
    if channels > preset.most_channels:
        recording = recording.mixed()
        mixed = len(recording.samples)
        log.warning("%d channels are mixed into %d; %s takes %d", channels, mixed, preset.suffix, preset.most_channels)
    return Recording(resample(recording.samples.float().cpu(), recording.rate_hz, rate), rate)


def _is_yuv(pixel_format: str) -> bool:
    return not pixel_format.startswith(PLAIN_COLOURS)


def read_frames(path: str | Path, fps: float | Fraction, start_frame: int, frames: int) -> Tensor:
    """Frames of a driving video on our clock: T H W 3 uint8 RGB, T <= `frames`, fewer where the video ends.

    Frame k is the last source picture whose time stamp, counted from the first one, is at most k / fps plus half a
    source frame: the nearest picture, as long as k / fps lies before the end of the last one. Pictures are as a player
    shows them. Decodes from the start and keeps what was asked for.

    Raises:
        ConfigError: if the file is missing, has no video or cannot be decoded, or a number makes no sense.
    """
    path, rate = Path(path), exact_fps(fps)
    if start_frame < 0 or frames < 1:
        raise ConfigError(
            f"start_frame={start_frame} and frames={frames} name no stretch. "
            "Start at 0 or later and ask for at least 1 frame."
        )
    kept = list(islice(_pictures_on_clock(path, rate, start_frame), frames))
    return torch.stack(kept) if kept else next(_pictures_on_clock(path, rate, 0))[None][:0]


class DrivingVideo:
    """`read_frames` of one file for stretches in order: each goes on decoding where the last one ended."""

    def __init__(self, path: str | Path, fps: float | Fraction):
        self.path, self.rate = Path(path), exact_fps(fps)
        self._pictures: Iterator[Tensor] = iter(())
        self._position: int | None = None
        self._end = math.inf

    def __call__(self, start_frame: int, frames: int) -> Tensor:
        """T H W 3 uint8, T <= `frames`; of no size once the video has ended."""
        if start_frame != self._position and start_frame < self._end:
            self._pictures, self._position = _pictures_on_clock(self.path, self.rate, start_frame), start_frame
        kept = list(islice(self._pictures, frames)) if start_frame < self._end else []
        if len(kept) < frames:
            self._end = min(self._end, start_frame + len(kept))
        self._position = start_frame + len(kept)
        return torch.stack(kept) if kept else torch.zeros(0, 0, 0, 3, dtype=torch.uint8)


def _pictures_on_clock(path: Path, rate: Fraction, start_frame: int) -> Iterator[Tensor]:
    """H W 3 uint8 for frame after frame of our clock, as long as the video lasts."""
    index, size = start_frame, None
    with open_media(path) as container:
        stream = best_stream(container, "video", path)
        for frame, until in _shown_frames(container, stream, path):
            # Some videos change their size on the way; all frames take that of the first.
            size = size or shown_size(frame.width, frame.height, pixel_shape(stream), LARGEST_DRIVING_AREA_PX)
            picture = _as_shown(frame, stream, path, size) if index / rate < until else None
            while index / rate < until:
                yield picture
                index += 1


def _shown_frames(container: Any, stream: Any, path: Path) -> Iterator[tuple[Any, float]]:
    """Decoded pictures, each with the second before which it is the one to use, counted from the first picture."""
    source_frame = float(1 / (stream.average_rate or 25))
    shown, begin = None, 0.0
    for frame, time in timed_frames(container, stream, path):
        if shown is not None:
            yield shown, time - source_frame / 2 - TIE_SECONDS  # of two equally near, the later one
        shown, begin = frame, time
    yield shown, begin + source_frame - CLOCK_TOLERANCE


def frames_of(path: str | Path) -> Iterator[tuple[Tensor, float]]:
    """Every picture of a video file, one at a time: H W 3 uint8 RGB, upright, and its seconds after the first one.

    Raises:
        ConfigError: if the file is missing, has no video or cannot be decoded.
    """
    path = Path(path)
    with open_media(path) as container:
        stream = best_stream(container, "video", path)
        for frame, time in timed_frames(container, stream, path):
            yield _as_shown(frame, stream, path), time


def timed_frames(container: Any, stream: Any, path: Path) -> Iterator[tuple[Any, float]]:
    """Decoded pictures with their seconds after the first one; counted where the file has no time stamps.

    Raises:
        ConfigError: if there is no picture.
    """
    first, count = None, 0
    for frame in decoded_frames(container, stream, path):
        time = frame.time if frame.time is not None else float(count / (stream.average_rate or 25))
        first = time if first is None else first
        yield frame, time - first
        count += 1
    if not count:
        raise ConfigError(f"{path} holds a video stream without a picture. Use a complete file.")


def _as_shown(frame: Any, stream: Any, path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """H W 3 uint8 of one decoded frame."""
    with foreign_parser(path, CURE):
        return picture_of(frame, stream, size)


def read_header(path: str | Path) -> VideoHeader:
    """What a video file says of itself.

    Raises:
        ConfigError: if it is missing or has no video.
    """
    path = Path(path)
    with open_media(path) as container:
        stream = best_stream(container, "video", path)
        has_sound = any(other.type == "audio" for other in container.streams)
        tags = {name.lower(): text for name, text in container.metadata.items()}
        return VideoHeader(float(stream.average_rate or 25), has_sound, tags)


def probe_video(path: str | Path) -> VideoFacts:
    """Count what is in a video file by decoding all of it.

    Raises:
        ConfigError: if it is missing, has no video or cannot be decoded.
    """
    path = Path(path)
    with open_media(path) as container:
        stream = best_stream(container, "video", path)
        has_sound = any(other.type == "audio" for other in container.streams)
        fps = float(stream.average_rate or 25)
        frames = 0
        for frame, time in timed_frames(container, stream, path):  # noqa: B007 (the last ones are used below)
            frames += 1
        width_px, height_px, seconds = frame.width, frame.height, time + 1 / fps
    sound = sum(block.shape[1] / rate for block, rate in sound_blocks(path)) if has_sound else None
    return VideoFacts(frames, fps, width_px, height_px, seconds, sound)
