"""Driving videos as people have them, and damaged ones: four quarters of known colours, in many codecs."""

import os
import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from . import stills
from .kinds import Kinds
from .outcome import BAD, GOOD, SAME_OR_REFUSED
from .stills import COLOURS, Shown, quarters

KINDS = Kinds()
WIDTH, HEIGHT = 64, 48
CODECS = {  # name -> containers, pixel formats
    "libx264": (("mp4", "mkv", "mov", "avi", "flv", "ts"), ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "gray")),
    "libx265": (("mp4", "mkv"), ("yuv420p", "yuv420p10le", "yuv444p")),
    "mpeg4": (("mp4", "avi", "mkv"), ("yuv420p",)),
    "mjpeg": (("avi", "mov", "mkv"), ("yuvj420p", "yuvj444p")),
    "prores_ks": (("mov",), ("yuv422p10le", "yuva444p10le")),
    "libvpx": (("webm", "mkv"), ("yuv420p", "yuva420p")),
    "libvpx-vp9": (("webm", "mp4"), ("yuv420p", "yuv444p")),
    "libsvtav1": (("mp4", "webm"), ("yuv420p",)),
    "ffv1": (("mkv", "avi"), ("yuv420p", "bgr0", "yuv444p16le", "gray", "gray16le")),
    "huffyuv": (("avi",), ("yuv422p", "rgb24")),
    "utvideo": (("avi",), ("gbrp", "yuv420p", "gbrap")),
    "png": (("mov",), ("rgb24", "rgba", "gray", "rgb48be")),
    "qtrle": (("mov",), ("rgb24", "argb")),
    "rawvideo": (("avi", "nut"), ("yuv420p", "bgr24")),
    "gif": (("gif",), ("rgb8",)),
    "apng": (("apng",), ("rgb24",)),
    "mpeg2video": (("mpg", "ts", "mkv"), ("yuv420p",)),
    "mpeg1video": (("mpg",), ("yuv420p",)),
    "wmv2": (("asf", "avi"), ("yuv420p",)),
    "flv": (("flv",), ("yuv420p",)),
}
GREY = ("gray", "gray16le")
ROUGH = ("gif", "wmv2", "flv", "mpeg1video", "mpeg2video", "libvpx")


def encode(
    path: Path, pictures: Sequence[np.ndarray], codec: str, pixels: str, rate: Any = 16, times: Any = None
) -> None:
    """Write pictures H W 3; times: their time stamps in milliseconds, for a rate that varies."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if codec not in ("gif", "apng", "libx264", "libx265", "libsvtav1", "libvpx-vp9"):
            stream.bit_rate = 4_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        feed(
            container,
            stream,
            pictures,
            Fraction(1, 1000) if times else 1 / Fraction(rate).limit_denominator(1001),
            times,
        )


def feed(container: Any, stream: Any, pictures: Sequence[np.ndarray], tick: Fraction, times: Any = None) -> None:
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = times[number] if times else number, tick
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def still(frames: int = 12, width: int = WIDTH, height: int = HEIGHT) -> list[np.ndarray]:
    return [quarters(width, height)] * frames


def any_film(chance: random.Random, folder: Path, codec: str | None = None) -> tuple[Path, Shown]:
    codec = codec or chance.choice(sorted(CODECS))
    containers, formats = CODECS[codec]
    suffix, pixels = chance.choice(containers), chance.choice(formats)
    if suffix == "avi" and pixels in ("yuv420p10le",):
        pixels = "yuv420p"
    path = folder / f"pose.{suffix}"
    encode(path, still(), codec, pixels, 25 if suffix in ("mpg", "ts") else 16)
    return path, shown(stills.greys() if pixels in GREY else COLOURS, tolerance=45 if codec in ROUGH else 26)


def shown(colours: Any = COLOURS, size: tuple[int, int] | None = (HEIGHT, WIDTH), tolerance: int = 26) -> Shown:
    return Shown(tuple(colours) if colours is not None else None, size, tolerance)


# --- good files ----------------------------------------------------------------------------------------------------


@KINDS.add(GOOD)
def film_of_any_codec(chance, folder):
    return any_film(chance, folder)


@KINDS.add(GOOD)
def films_of_other_rates(chance, folder):
    rate = chance.choice((1, 5, 12, 24, 25, 29.97, 30, 50, 59.94, 60, 120, 240, 1000))
    codec, suffix = chance.choice((("libx264", "mp4"), ("ffv1", "mkv"), ("mpeg4", "avi")))
    encode(folder / f"pose.{suffix}", still(20), codec, "yuv420p", rate)
    return folder / f"pose.{suffix}", shown()


@KINDS.add(GOOD)
def films_of_a_varying_rate(chance, folder):
    """As phones and screen recorders make them."""
    times, place = [], 0
    for _ in range(16):
        times.append(place)
        place += chance.choice((1, 20, 33, 40, 100, 900))
    encode(folder / "pose.mkv", still(16), "ffv1", "yuv420p", 16, times)
    return folder / "pose.mkv", shown()


@KINDS.add(GOOD)
def films_of_odd_sizes(chance, folder):
    width, height = chance.choice(((17, 33), (1, 1), (2, 2), (15, 200), (640, 36), (1280, 720), (66, 50), (50, 66)))
    encode(folder / "pose.mkv", still(4, width, height), "ffv1", "bgr0")
    return folder / "pose.mkv", shown(COLOURS if min(width, height) > 15 else None, (height, width))


def boxes(content: bytes | bytearray, kind: bytes) -> list[int]:
    """Where boxes of a kind begin, their size first."""
    places, place = [], content.find(kind)
    while place >= 0:
        places.append(place - 4)
        place = content.find(kind, place + 4)
    return places


DISPLAYED = {  # a b c d of the display matrix -> which quarter is at each place, whether the sides change
    (1, 0, 0, 1): ((0, 1, 2, 3), False),
    (-1, 0, 0, 1): ((1, 0, 3, 2), False),
    (1, 0, 0, -1): ((2, 3, 0, 1), False),
    (-1, 0, 0, -1): ((3, 2, 1, 0), False),
    (0, 1, -1, 0): ((2, 0, 3, 1), True),
    (0, -1, 1, 0): ((1, 3, 0, 2), True),
    (0, 1, 1, 0): ((0, 2, 1, 3), True),
    (0, -1, -1, 0): ((3, 1, 2, 0), True),
}


@KINDS.add(GOOD)
def films_with_a_display_matrix(chance, folder):
    """Turned and mirrored, as phones write it."""
    matrix = chance.choice(sorted(DISPLAYED))
    path = folder / f"phone.{chance.choice(('mp4', 'mov'))}"
    encode(path, still(), "libx264", "yuv420p")
    content = bytearray(path.read_bytes())
    (place,) = boxes(content, b"tkhd")
    a, b, c, d = (value * 65536 for value in matrix)
    struct.pack_into(">9i", content, place + 8 + 4 + 36, a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(content)
    order, turns = DISPLAYED[matrix]
    return path, shown([COLOURS[place] for place in order], (WIDTH, HEIGHT) if turns else (HEIGHT, WIDTH))


@KINDS.add(GOOD)
def pixels_that_are_not_square(chance, folder):
    """As camcorders and DVDs have them."""
    path = folder / "wide.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = chance.choice((Fraction(4, 3), Fraction(16, 11), Fraction(1, 2)))
        feed(container, stream, still(), Fraction(1, 16))
    return path, shown(size=None)


@KINDS.add(GOOD)
def pictures_as_films(chance, folder):
    """One picture, or an animation of pictures."""
    suffix = chance.choice(("png", "jpg", "gif", "webp", "bmp", "apng"))
    path, picture = folder / f"pose.{suffix}", Image.fromarray(quarters(WIDTH, HEIGHT))
    how = {"save_all": True, "append_images": [picture] * 3, "duration": 80} if suffix in ("gif", "apng") else {}
    picture.save(path, **how, **({"format": "PNG"} if suffix == "apng" else {}))
    return path, shown(tolerance=45)


@KINDS.add(GOOD)
def films_with_a_cover(chance, folder):
    """A picture of another size is a stream of its own, before the film or behind it; the film is the default one."""
    cover_first = chance.random() < 0.5
    path, codec = folder / f"cover.{'mkv' if cover_first else 'mp4'}", "mjpeg" if cover_first else "png"
    with av.open(str(path), "w") as container:
        streams = [
            container.add_stream(name, rate=16) for name in ((codec, "mpeg4") if cover_first else ("mpeg4", codec))
        ]
        cover, film = streams if cover_first else streams[::-1]
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p" if cover_first else "rgb24"
        film.height, film.width, film.pix_fmt, film.bit_rate = HEIGHT, WIDTH, "yuv420p", 4_000_000
        cover.disposition = av.stream.Disposition.attached_pic
        film.disposition = av.stream.Disposition.default
        feed(container, cover, [np.zeros((32, 32, 3), np.uint8)], Fraction(1, 16))
        feed(container, film, still(), Fraction(1, 16))
    return path, shown()


@KINDS.add(GOOD)
def films_that_start_elsewhere(chance, folder):
    """Time stamps that begin before 0, or hours behind it: the first picture is the first all the same."""
    first = chance.choice((-500, 3_600_000, 90_000_000))
    encode(folder / "pose.mkv", still(), "ffv1", "bgr0", 16, [first + round(62.5 * number) for number in range(12)])
    return folder / "pose.mkv", shown()


# --- odd ones ------------------------------------------------------------------------------------------------------


@KINDS.add(SAME_OR_REFUSED)
def very_large_films(chance, folder):
    """Kilobytes of one colour, of very many pixels."""
    side, codec, suffix = chance.choice(((5000, "ffv1", "mkv"), (16000, "png", "mov"), (9000, "png", "mov")))
    path = folder / f"pose.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height = stream.width = side
        stream.pix_fmt = "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((side, side), np.uint8), format="gray")
        for number in range(2):
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path, shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def films_whose_size_changes(chance, folder):
    """Joined of two, as stream recorders do it."""
    parts = [folder / "a.ts", folder / "b.ts"]
    encode(parts[0], still(6), "mpeg2video", "yuv420p", 25)
    encode(parts[1], still(6, 96, 96), "mpeg2video", "yuv420p", 25)
    (folder / "pose.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder / "pose.ts", shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def time_stamps_of_nonsense(chance, folder):
    """All alike, years apart, or a rate of millions."""
    jump = chance.choice((0, 10**9, 10**12))
    encode(
        folder / "pose.mkv",
        still(4),
        "ffv1",
        "bgr0",
        chance.choice((16, 1000)),
        [number * jump + number for number in range(4)],
    )
    return folder / "pose.mkv", shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def matrices_of_nonsense(chance, folder):
    """Display matrices that turn by 37 degrees, scale by thousands or are all 0; edit lists that begin nowhere."""
    encode(folder / "pose.mp4", still(), "libx264", "yuv420p")
    content = bytearray((folder / "pose.mp4").read_bytes())
    (place,) = boxes(content, b"tkhd")
    odd = [chance.choice((0, 1, 65536, -65536, 2**31 - 1, -(2**31), 52_000)) for _ in range(9)]
    struct.pack_into(">9i", content, place + 48, *odd)
    for edit in boxes(content, b"elst"):
        struct.pack_into(">i", content, edit + 20, chance.choice((-1, 0, 2**31 - 1)))
    (folder / "pose.mp4").write_bytes(content)
    return folder / "pose.mp4", shown(None, None)


@KINDS.add(BAD)
def files_without_a_film(chance, folder):
    path = folder / "pose.mp4"
    texts = (
        b"",
        b"\0\0\0\x18ftypmp42",
        b"RIFF",
        b"\x1aE\xdf\xa3",
        chance.randbytes(3000),
        bytes(3000),
        b"#EXTM3U\nx.ts\n",
    )
    ways = (
        lambda: path.write_bytes(chance.choice(texts)),
        lambda: path.write_bytes(chance.choice(texts)),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: os.mkfifo(path),
    )
    chance.choice(ways)()
    return path, shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def text_as_a_film(chance, folder):
    """FFmpeg draws text files as pictures."""
    path = folder / f"pose.{chance.choice(('ans', 'txt', 'nfo', 'asc', 'srt', 'vtt', 'ass'))}"
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\x1b[31m world\n" * 9)
    return path, shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def bits_of_a_film_flipped(chance, folder):
    path, _ = any_film(chance, folder)
    content = bytearray(path.read_bytes())
    stop = chance.choice((80, 900, len(content)))
    for _ in range(chance.choice((1, 8, 60))):
        content[chance.randrange(min(stop, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path, shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def stretches_of_a_film_moved(chance, folder):
    path, _ = any_film(chance, folder)
    content = path.read_bytes()
    first, second = sorted(chance.sample(range(len(content)), 2))
    ways = (content[:second], content[:first] + content[second:], content[:second] + content[first:])
    ways += (content[:first] + bytes(second - first) + content[second:], content[second:] + content[:second])
    path.write_bytes(chance.choice(ways))
    return path, shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def numbers_in_a_films_boxes(chance, folder):
    """Sizes, counts, rates and times in the index of an MP4 or a Matroska file."""
    path, _ = any_film(chance, folder, chance.choice(("libx264", "mpeg4", "libvpx-vp9", "ffv1")))
    content = bytearray(path.read_bytes())
    names = (
        b"tkhd",
        b"mdhd",
        b"stsd",
        b"stts",
        b"stsz",
        b"stco",
        b"stsc",
        b"elst",
        b"mvhd",
        b"avcC",
        b"ctts",
        b"\x44\x89",
        b"\xb0\x82",
    )
    places = [place for name in names for place in boxes(content, name)] or [0]
    for _ in range(chance.choice((1, 2, 5))):
        place = min(chance.choice(places) + 4 * chance.randrange(2, 12), len(content) - 4)
        content[place : place + 4] = chance.choice(
            (bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x01", b"\x80\0\0\0")
        )
    path.write_bytes(content)
    return path, shown(None, None)
