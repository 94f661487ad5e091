"""Sound and video files opened and decoded through PyAV: what reading of both shares.

PyAV is imported inside functions: it is slow to load, and a check of settings needs none of it.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BackendUnavailable, ConfigError, shown_path
from .outside import file_size, foreign_parser

log = logging.getLogger(__name__)

LARGEST_SHORTFALL_SECONDS = 0.5
LARGEST_AREA_PX = 64_000_000
"""Of a picture and of a frame of a video: 8K has 33 million pixels."""
MANY_THREADS_AREA_PX, FEW_THREADS = 9_000_000, 2
"""Each thread of a decoder holds frames; those of videos larger than 4K are large."""
DEFAULT, COMMENT, IMPAIRED, COVER = 0x1, 0x8, 0x80 | 0x100, 0x400
"""FFmpeg's marks of a stream (AV_DISPOSITION_...): the one to take, a commentary, for people who see or hear badly, a
picture of the cover."""
CONTAINERS = (
    "3gp aac ac3 aiff amr amrnb amrwb ape apng asf asf_o au av1 avi avr caf dsf dts dtshd dv eac3 flac flv gif "
    "gsm h264 hevc iamf iff ircam ivf latm lc3 loas m4v matroska mjpeg mlp mov mp3 mpc mpc8 mpeg mpegts mpegvideo "
    "mxf nistsphere nut obu ogg oma qcp qoa rm sbc shn sox spdif swf tak truehd tta voc vqf vvc w64 wav webp wtv "
    "wv xwma yuv4mpegpipe"
)
"""FFmpeg's names of what is opened. Playlists and scripts that open other files or addresses are not among them."""
STILLS = {
    b"\x89PNG\r\n": "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\1\0": "ICO", b"8BPS": "Photoshop",
    b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"\0\0\0\x0cjP  ": "JPEG 2000",
}  # fmt: skip
"""How files of pictures begin. FFmpeg says of most only that an argument is invalid."""
CURE = "Use a complete file of a known kind, such as wav, mp3 or mp4."


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        BackendUnavailable: if it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise BackendUnavailable(
            f"package av cannot be imported ({error}). Sound and video files are read and written with it: "
            "install it with 'pip install av'."
        ) from error
    return av


def still_kind(path: Path) -> str | None:
    """What kind of picture a file begins as; None for anything else."""
    with path.open("rb") as file:
        start = file.read(12)
    if start[:4] + start[8:] == b"RIFFWEBP":
        return "WebP"
    if start[:2] + start[6:10] == b"BM\0\0\0\0":
        return "BMP"
    return next((kind for mark, kind in STILLS.items() if start.startswith(mark)), None)


@contextlib.contextmanager
def open_media(path: Path) -> Iterator[Any]:
    """Open a sound or video file for reading.

    Raises:
        ConfigError: if it is missing, empty, no regular file, not readable or of no known format.
    """
    name = shown_path(path)
    if not file_size(path):
        raise ConfigError(f"{name} is empty (0 bytes). The copy or download may have been cut short: fetch it again.")
    av = import_av()
    options = {"format_whitelist": CONTAINERS.replace(" ", ","), "protocol_whitelist": "file"}
    with foreign_parser(path, CURE):
        try:  # an absolute path cannot be mistaken for an address such as "take:1.wav"
            container = av.open(str(path.absolute()), metadata_errors="replace", container_options=options)
        except av.error.PermissionError as error:
            raise ConfigError(f"{name} may not be read by this user. Change its permissions, or copy it.") from error
        except av.error.FFmpegError as error:
            if still := still_kind(path):
                raise ConfigError(
                    f"{name} is a picture ({still}), no sound or video. A voice needs a recording; poses need a "
                    "driving video of several frames, such as an mp4. A picture to be animated is the reference image."
                ) from error
            reason = "no format of these begins so" if error.errno == errno.EINVAL else error.strerror
            raise ConfigError(f"{name} cannot be opened as sound or video: {reason}. {CURE}") from error
    with container:
        yield container


def best_stream(container: Any, kind: str, path: Path) -> Any:
    """The stream of `kind` ("audio" or "video") that a player would take: the one marked as default, else the one with
    the most channels or pixels, else the highest bit rate, else the first. Covers are no video.

    Raises:
        ConfigError: if there is none that can be decoded here, or its pictures are too large.
    """
    streams = [s for s in container.streams if s.type == kind and not _marks(s) & COVER]
    name = shown_path(path)
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise ConfigError(f"{name} has no {kind} stream (streams found: {found}). Use a file with one.")
    usable = [stream for stream in streams if stream.codec_context is not None]
    if not usable:
        raise ConfigError(f"{name} has {kind} of a kind that this PyAV cannot decode. Convert it, to wav or mp4 say.")
    with foreign_parser(path, CURE):
        best = max(usable, key=_preference)
        reason = "it is marked as default" if _marks(best) & DEFAULT else "none is marked as default"
    if len(streams) > 1:
        log.warning(
            "%s has %d %s tracks: track %d of %d is used, %s",
            name, len(streams), kind, streams.index(best) + 1, len(streams), reason,
        )  # fmt: skip
    if kind == "video":
        _check_area(best.codec_context.width, best.codec_context.height, name)
        if best.codec_context.width * best.codec_context.height > MANY_THREADS_AREA_PX:
            best.codec_context.thread_count = FEW_THREADS
    return best


def _marks(stream: Any) -> int:
    """PyAV 14.0 does not tell them."""
    return int(getattr(stream, "disposition", 0))


def _preference(stream: Any) -> tuple[int, ...]:
    context, marks = stream.codec_context, _marks(stream)
    size = context.layout.nb_channels if stream.type == "audio" else context.width * context.height
    for_all = not marks & (COMMENT | IMPAIRED)
    return bool(marks & DEFAULT), for_all, size, context.bit_rate or 0, -stream.index


def _check_area(width_px: int, height_px: int, name: str) -> None:
    if width_px * height_px > LARGEST_AREA_PX:
        raise ConfigError(
            f"{name} has frames of {width_px}x{height_px} px; up to {LARGEST_AREA_PX / 1e6:.0f} million pixels are "
            "read. Convert it to a smaller size."
        )


def decoded_frames(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Frames of one stream up to its end, or to where the file breaks (logged).

    Packets that cannot be decoded are skipped at the start, where some files carry leftovers of other formats.

    Raises:
        ConfigError: if nothing can be decoded.
    """
    av, name = import_av(), shown_path(path)
    stream.thread_type = "AUTO"
    packets, kept, broken = container.demux(stream), 0.0, None
    while True:
        packet, frames, error = None, [], None
        with foreign_parser(path, CURE):
            try:  # after an error of its own, `packets` is used up and the next turn ends the loop
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except MemoryError:
                raise
            except av.error.FFmpegError as problem:
                error = broken = problem
        if error and kept:
            log.warning("%s breaks off (%s); the %.2f s before that are used", name, error.strerror, kept)
            return
        if error:
            continue
        if packet is None:
            break
        for frame in frames:
            kept += _duration(frame, stream)
            yield frame
    if broken and not kept:
        raise ConfigError(
            f"{name} has {stream.type} that cannot be decoded: {broken.strerror}. "
            "The file may be damaged: fetch it again, or convert it."
        )
    announced = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if announced > kept + LARGEST_SHORTFALL_SECONDS:  # a damaged file may just end, without an error
        log.warning(
            "%s announces %.2f s of %s and ends early; the %.2f s it has are used", name, announced, stream.type, kept
        )


def _duration(frame: Any, stream: Any) -> float:
    if stream.type == "audio":
        return frame.samples / max(1, frame.sample_rate)
    return float(1 / (stream.average_rate or 25))
