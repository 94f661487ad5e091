"""Pictures as people have them, and damaged ones: four quarters of known colours in many formats."""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from .kinds import Kinds
from .outcome import BAD, GOOD, SAME_OR_REFUSED

KINDS = Kinds()
COLOURS = ((208, 64, 48), (56, 176, 72), (64, 80, 200), (216, 208, 72))
"""Of the quarters, row by row."""
WIDTH, HEIGHT = 96, 80
TURNED = {1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}
TURNED |= {5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0), 8: (1, 3, 0, 2)}
"""EXIF orientation -> which quarter is shown at each place."""


@dataclass(frozen=True)
class Shown:
    """What a good picture shows: colours of its quarters. None is not checked."""

    colours: tuple[tuple[int, int, int], ...] | None = COLOURS
    size: tuple[int, int] | None = (HEIGHT, WIDTH)
    tolerance: int = 26


def quarters(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """H W 3 uint8."""
    picture = np.zeros((height, width, 3), np.uint8)
    for place, colour in enumerate(COLOURS):
        rows = slice(0, height // 2) if place < 2 else slice(height // 2, None)
        columns = slice(0, width // 2) if place % 2 == 0 else slice(width // 2, None)
        picture[rows, columns] = colour
    return picture


def image(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(quarters(width, height))


def greys() -> tuple[tuple[int, int, int], ...]:
    values = [round(0.299 * red + 0.587 * green + 0.114 * blue) for red, green, blue in COLOURS]
    return tuple((value, value, value) for value in values)


def png(rows: bytes, width: int, height: int, bits: int = 8, colour: int = 2, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of unpacked rows, each with its filter byte; `more` chunks before the data."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


FORMATS = (
    "png",
    "jpg",
    "webp",
    "bmp",
    "gif",
    "tiff",
    "ppm",
    "tga",
    "ico",
    "jp2",
    "avif",
    "pcx",
    "sgi",
    "dds",
    "im",
    "mpo",
)


# --- good files ----------------------------------------------------------------------------------------------------


@KINDS.add(GOOD)
def picture_of_any_format(chance, folder):
    kind = chance.choice(FORMATS)
    path = folder / f"face.{kind}"
    if kind == "ico":
        image(64, 64).save(path, sizes=[(64, 64)])
        return path, Shown(size=(64, 64))
    image().save(path, **({"quality": 95} if kind in ("jpg", "webp", "avif", "mpo") else {}))
    return path, Shown()


@KINDS.add(GOOD)
def picture_of_any_mode(chance, folder):
    """Palettes, greys, transparency, CMYK and one bit."""
    mode, suffix = chance.choice(
        (("P", "png"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("CMYK", "tiff"), ("L", "jpg"),
         ("YCbCr", "jpg"), ("LAB", "tiff"), ("RGBA", "webp"), ("1", "png"), ("RGBA", "tiff"), ("L", "bmp"))
    )  # fmt: skip
    path = folder / f"face.{suffix}"
    converted = as_lab(image()) if mode == "LAB" else image().convert(mode)
    converted.save(path, **({"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}))
    colours = greys() if mode in ("L", "LA") else None if mode in ("1", "LAB") else COLOURS
    return path, Shown(colours, tolerance=70 if mode == "CMYK" else 40 if mode == "P" else 26)


def as_lab(picture: Image.Image) -> Image.Image:
    rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(picture, ImageCms.buildTransform(rgb, lab, "RGB", "LAB"))


@KINDS.add(GOOD)
def sixteen_bits(chance, folder):
    """Grey or in colours: depth is scaled, never clipped."""
    path = folder / "deep.png"
    if chance.random() < 0.5:
        values = np.array([[value[0] for value in greys()]]).reshape(2, 2).repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)
        deep = Image.fromarray((values * 257).astype(np.uint16))
        path = path.with_suffix(chance.choice((".png", ".tiff")))
        deep.save(path)
        return path, Shown(greys())
    values = (quarters().astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    path.write_bytes(png(rows, WIDTH, HEIGHT, 16))
    return path, Shown()


@KINDS.add(GOOD)
def turned_by_exif(chance, folder):
    turn = chance.randint(1, 8)
    path = folder / f"phone.{chance.choice(('jpg', 'png', 'webp', 'tiff'))}"
    exif = Image.Exif()
    exif[0x0112] = turn
    image().save(path, exif=exif, **({"quality": 95} if path.suffix in (".jpg", ".webp") else {}))
    size = (WIDTH, HEIGHT) if turn > 4 else (HEIGHT, WIDTH)
    return path, Shown(tuple(COLOURS[place] for place in TURNED[turn]), size)


@KINDS.add(GOOD)
def films_of_pictures(chance, folder):
    """Of an animation or of several pages the first is meant."""
    suffix = chance.choice(("gif", "webp", "png", "tiff", "avif"))
    path = folder / f"moving.{suffix}"
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("black", "white")]
    how = {"quality": 95} if suffix in ("webp", "avif") else {}
    image().save(path, save_all=True, append_images=others, **({"duration": 100} if suffix != "tiff" else {}), **how)
    return path, Shown(tolerance=40)


@KINDS.add(GOOD)
def transparent_pictures(chance, folder):
    """The right half is not to be seen; what shows there is black, whatever stands below."""
    rgba = np.dstack([quarters(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[:, WIDTH // 2 :, 3] = 0
    path = folder / f"cut.{chance.choice(('png', 'webp', 'tiff'))}"
    Image.fromarray(rgba).save(path, **({"lossless": True, "exact": True} if path.suffix == ".webp" else {}))
    black = (0, 0, 0)
    return path, Shown((COLOURS[0], black, COLOURS[2], black))


@KINDS.add(GOOD)
def pictures_with_a_wrong_suffix(chance, folder):
    path = folder / f"face.{chance.choice(('png', 'jpg', 'webp', 'heic', 'mp4', 'txt', ''))}"
    box = io.BytesIO()
    image().save(box, chance.choice(("PNG", "JPEG", "WEBP", "BMP")), quality=95)
    path.write_bytes(box.getvalue())
    return path, Shown()


@KINDS.add(GOOD)
def tags_of_many_kinds(chance, folder):
    """What cameras and tools write beside a picture: texts, a thumbnail, resolutions, gamma, profiles."""
    path = folder / "face.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", '{"3": {}}' * 99, zip=True)
    info.add_itxt("parameters", "肖像" * 50)
    profile = chance.choice(
        (None, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile", b"")
    )
    image().save(path, pnginfo=info, dpi=(300, 72), **({} if profile is None else {"icc_profile": profile}))
    return path, Shown()


@KINDS.add(GOOD)
def long_and_narrow_pictures(chance, folder):
    width, height = chance.choice(((60, 900), (900, 60), (17, 33), (3000, 2000)))
    image(width, height).save(folder / "face.png")
    return folder / "face.png", Shown(size=(height, width))


# --- odd ones ------------------------------------------------------------------------------------------------------


@KINDS.add(SAME_OR_REFUSED)
def pictures_too_large_or_small(chance, folder):
    width, height = chance.choice(((1, 1), (15, 200), (0, 5), (16384, 16384), (40_000, 16), (9000, 9000), (8001, 8001)))
    (folder / "face.png").write_bytes(png(bytes((width * 3 + 1) * min(height, 9001)), width, height))
    return folder / "face.png", Shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def claims_of_a_size(chance, folder):
    """Headers alone that claim up to 2^31 pixels a side, in several formats."""
    side = chance.choice((20_000, 65_500, 2**24, 2**31 - 1))
    box = io.BytesIO()
    gif = (
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
    )
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 60, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    Image.new("1", (64, 64)).save(box, "TIFF")
    tiff = box.getvalue().replace(
        struct.pack("<HHI", 0x0100, 4, 1) + struct.pack("<I", 64),
        struct.pack("<HHI", 0x0100, 4, 1) + struct.pack("<I", side),
    )
    ways = {
        "png": png(b"", side, side),
        "gif": gif,
        "bmp": bmp,
        "tiff": tiff,
        "ppm": b"P6 %d %d 255\n" % (side, side),
        "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0),
    }
    suffix = chance.choice(sorted(ways))
    (folder / f"face.{suffix}").write_bytes(ways[suffix])
    return folder / f"face.{suffix}", Shown(None, None)


@cache
def packed_zeros(size: int) -> bytes:
    packer, piece = zlib.compressobj(1), bytes(10_000_000)
    return b"".join([*(packer.compress(piece) for _ in range(size // len(piece))), packer.flush()])


@KINDS.add(SAME_OR_REFUSED)
def bombs_beside_the_picture(chance, folder):
    """Texts, profiles and tags that unpack to gigabytes."""
    bomb = packed_zeros(600_000_000)
    rows = b"".join(b"\0" + row.tobytes() for row in quarters())
    chunks = (
        (b"zTXt", b"comment\0\0" + bomb),
        (b"iTXt", b"comment\0\1\0\0\0" + bomb),
        (b"iCCP", b"profile\0\0" + bomb),
        (b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff\xff" + bytes(99)),
        (b"tEXt", b"comment\0" + bytes(3_000_000)),
        (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        (b"PLTE", b"\0" * 5),
        (b"cHRM", b"\0"),
        (b"gAMA", bytes(4)),
        (b"sRGB", b"\xff"),
        (b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)),
    )
    (folder / "face.png").write_bytes(png(rows, WIDTH, HEIGHT, 8, 2, chance.choice(chunks)))
    return folder / "face.png", Shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def data_that_unpacks_to_more(chance, folder):
    """Of a small picture: its compressed data holds hundreds of times what its size asks for, or less."""
    rows = b"".join(b"\0" + row.tobytes() for row in quarters())
    rows = chance.choice((rows + bytes(300_000_000), rows[: len(rows) // 2], b"", b"\x09" * len(rows)))
    (folder / "face.png").write_bytes(png(rows, WIDTH, HEIGHT))
    return folder / "face.png", Shown(None, None)


@KINDS.add(BAD)
def files_without_a_picture(chance, folder):
    path = folder / "face.png"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(/etc/passwd) (r) file\nshowpage\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    texts = (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff\xe0",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        postscript,
        svg,
        b"%PDF-1.7",
    )
    texts += (
        chance.randbytes(999),
        b"#define x_width 99999\n#define x_height 99999\nstatic char x_bits[] = {",
        b"\0\0\0 ftypheic",
    )
    ways = (
        lambda: path.write_bytes(chance.choice(texts)),
        lambda: path.write_bytes(chance.choice(texts)),
        lambda: path.write_bytes(chance.choice(texts)),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/urandom"),
        lambda: path.symlink_to(path.name),
        lambda: os.mkfifo(path),
        lambda: path.open("wb").truncate(80_000_000_000),
    )
    chance.choice(ways)()
    return path, Shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def bits_of_a_picture_flipped(chance, folder):
    path, _ = chance.choice((picture_of_any_format, picture_of_any_mode, sixteen_bits, films_of_pictures))(
        chance, folder
    )
    content = bytearray(path.read_bytes())
    stop = chance.choice((40, 300, len(content)))
    for _ in range(chance.choice((1, 6, 50))):
        content[chance.randrange(min(stop, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path, Shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def stretches_of_a_picture_moved(chance, folder):
    path, _ = chance.choice((picture_of_any_format, films_of_pictures, turned_by_exif))(chance, folder)
    content = path.read_bytes()
    first, second = sorted(chance.sample(range(len(content)), 2))
    ways = (content[:second], content[:first] + content[second:], content[:second] + content[first:])
    ways += (content[:first] + bytes(second - first) + content[second:], content[: len(content) - 2], content + content)
    path.write_bytes(chance.choice(ways))
    return path, Shown(None, None)


@KINDS.add(SAME_OR_REFUSED)
def exif_of_nonsense(chance, folder):
    """Orientations and tags that no camera writes."""
    exif = Image.Exif()
    exif[0x0112] = chance.choice((0, 9, 255, 65535))
    raw = chance.choice(
        (exif.tobytes(), b"Exif\0\0" + chance.randbytes(90), b"Exif\0\0MM\0*" + b"\xff" * 40, b"", b"Exif\0\0")
    )
    raw = chance.choice((raw, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0\0\0\0\0\0\0", raw))
    image().save(folder / "face.jpg", exif=raw, quality=95)
    return folder / "face.jpg", Shown()


@KINDS.add(SAME_OR_REFUSED)
def values_of_floats(chance, folder):
    """TIFFs of floats and of 32 bits, whose white is nobody's to know."""
    values = quarters()[..., 0]
    ways = (values.astype(np.float32) / 255, values.astype(np.float32), np.full(values.shape, np.nan, np.float32))
    ways += (values.astype(np.int32) * 2**23, np.full(values.shape, np.inf, np.float32))
    Image.fromarray(chance.choice(ways)).save(folder / "face.tiff")
    return folder / "face.tiff", Shown(None, None)
