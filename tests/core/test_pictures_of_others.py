"""Pictures and driving videos as people and other programs have them: seen as every viewer shows them, or refused."""

import io
import math
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from wan_s2v_core.conditioning.image import read_picture
from wan_s2v_core.conditioning.pose import pose_pixels
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io import pictures, video
from wan_s2v_core.io.display import HLG, PQ, to_sdr, turned
from wan_s2v_core.io.foreign import pictures_of, recording_of
from wan_s2v_core.io.video import DrivingVideo, frames_of, read_frames

RAMP = np.linspace(0, 1, 64)[:, None].repeat(48, 1)
"""From black at the top to white at the bottom."""


def grey(path: Path) -> np.ndarray:
    """H W of a picture whose three channels are one."""
    picture = read_picture(path).numpy()
    assert (picture == picture[..., :1]).all()
    return picture[..., 0].astype(int)


# Depths


def sixteen_bit_png(folder: Path) -> Path:
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(folder / "x.png")
    return folder / "x.png"


def tiff(folder: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(folder / "x.tif")
    return folder / "x.tif"


def twelve_bit_tiff(folder: Path) -> Path:
    """Two pixels in three bytes."""
    values = (RAMP * 4095).astype(int)
    left, right = values[:, ::2], values[:, 1::2]
    data = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8).tobytes()
    tags = [(256, 48), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    (folder / "x.tif").write_bytes(header + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return folder / "x.tif"


def pgm(folder: Path) -> Path:
    (folder / "x.pgm").write_bytes(b"P5 48 64 65535\n" + (RAMP * 65535).astype(">u2").tobytes())
    return folder / "x.pgm"


DEPTHS = {
    "16-bit PNG": sixteen_bit_png,
    "16-bit TIFF": lambda folder: tiff(folder, (RAMP * 65535).astype(np.uint16)),
    "16-bit TIFF, big endian": lambda folder: tiff(folder, (RAMP * 65535).astype(">u2")),
    "12-bit TIFF": twelve_bit_tiff,
    "32-bit TIFF": lambda folder: tiff(folder, (RAMP * (2**31 - 1)).astype(np.int32)),
    "float TIFF to 1": lambda folder: tiff(folder, RAMP.astype(np.float32)),
    "float TIFF to 255": lambda folder: tiff(folder, (RAMP * 255).astype(np.float32)),
    "16-bit PGM": pgm,
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_depth_is_scaled(tmp_path, kind):
    assert abs(grey(DEPTHS[kind](tmp_path)) - RAMP * 255).max() <= 1


def test_a_float_picture_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not finite"):
        read_picture(tiff(tmp_path, np.full((32, 32), math.nan, np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "F", "La"])
def test_every_mode_of_a_file(tmp_path, mode):
    """White on the left, black on the right, whatever the file calls it."""
    colours = np.zeros((32, 40, 3), np.uint8)
    colours[:, :20] = 255
    plain = Image.fromarray(colours)
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            plain, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode in ("I;16", "F"):
        image = Image.fromarray(
            colours[..., 0].astype(np.uint16 if mode == "I;16" else np.float32) * (257 if mode == "I;16" else 1)
        )
    else:
        image = (
            plain.convert("LA").convert("La")
            if mode == "La"
            else plain.convert("LA").convert("PA")
            if mode == "PA"
            else plain.convert(mode)
        )
    path = tmp_path / ("x.png" if mode in ("1", "LA", "P", "RGBA") else "x.tif")
    if mode in ("PA", "La"):
        seen = pictures._on_black(*pictures._colours(image))
    else:
        image.save(path)
        seen = read_picture(path).numpy()
    assert seen[:, :20].min() >= 253 and seen[:, 20:].max() <= 2


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_the_first_picture_of_an_animation(tmp_path, suffix):
    first, *others = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green"))
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=others, lossless=True)
    assert (read_picture(tmp_path / f"x.{suffix}") == torch.tensor([255, 0, 0])).all()


def test_a_palette_with_transparency_is_black_where_it_is_clear(tmp_path):
    image = Image.new("P", (32, 32), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 16, 32))
    image.save(tmp_path / "x.png", transparency=0)
    seen = read_picture(tmp_path / "x.png")
    assert not seen[:, :16].any() and (seen[:, 16:] == torch.tensor([0, 255, 0])).all()


def test_a_clear_value_among_16_bits(tmp_path):
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "x.png", transparency=40000)
    assert not read_picture(tmp_path / "x.png").any()


# Colours


def wide_profile() -> bytes:
    """Display P3, as phones write it: sRGB's curve with other primaries."""

    def s15(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = [((x / 1023 + 0.055) / 1.055) ** 2.4 if x / 1023 > 0.04045 else x / 1023 / 12.92 for x in range(1024)]
    tone = b"curv\0\0\0\0" + struct.pack(">I", 1024) + b"".join(struct.pack(">H", round(65535 * y)) for y in curve)
    tags = {
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407), b"wtpt": xyz(0.96420, 1.0, 0.82491),
        b"rTRC": tone, b"gTRC": tone, b"bTRC": tone,
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79), b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }  # fmt: skip
    table, data, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I", 128 + len(body)) + bytes(4) + b"\x02\x40\0\0mntrRGB XYZ " + bytes(12) + b"acsp"
    head += bytes(28) + s15(0.96420) + s15(1.0) + s15(0.82491)
    return head + bytes(128 - len(head)) + body


def profile_of(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_wide_profile_becomes_srgb(tmp_path, suffix):
    """Measured with lcms from Apple's Display P3: (200, 80, 60) is (216, 69, 50)."""
    options = {"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (64, 48), (200, 80, 60)).save(path, icc_profile=wide_profile(), **options)
    assert (read_picture(path).int() - torch.tensor([216, 69, 50])).abs().max() <= 2


def test_transparency_and_palettes_keep_their_profile(tmp_path):
    clear = Image.new("RGBA", (32, 32), (200, 80, 60, 255))
    clear.paste((200, 80, 60, 0), (0, 0, 16, 32))
    clear.save(tmp_path / "x.png", icc_profile=wide_profile())
    seen = read_picture(tmp_path / "x.png").int()
    assert not seen[:, :16].any() and (seen[:, 16:] - torch.tensor([216, 69, 50])).abs().max() <= 1
    Image.new("RGB", (32, 32), (200, 80, 60)).quantize(4).save(tmp_path / "p.png", icc_profile=wide_profile())
    assert (read_picture(tmp_path / "p.png").int() - torch.tensor([216, 69, 50])).abs().max() <= 1


def test_srgb_itself_changes_no_pixel(tmp_path, caplog):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", icc_profile=profile_of("sRGB"))
    assert np.array_equal(read_picture(tmp_path / "x.png").numpy(), noise) and not caplog.messages


@pytest.mark.parametrize("damage", ["noise", "cut", "other channels"])
def test_a_profile_that_cannot_be_used_is_passed_over(tmp_path, caplog, damage):
    wide = wide_profile()
    profile = {"noise": os.urandom(600), "cut": wide[:200], "other channels": profile_of("LAB")}[damage]
    Image.new("RGB", (32, 32), (200, 80, 60)).save(tmp_path / "x.png", icc_profile=profile)
    assert (read_picture(tmp_path / "x.png") == torch.tensor([200, 80, 60])).all()
    assert len(caplog.messages) == 1 and "sRGB is assumed" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation):
    upright = np.random.default_rng(2).integers(0, 256, (32, 40, 3), np.uint8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "x.png").numpy(), upright)


def test_a_damaged_exif_block_does_not_hide_the_picture(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + os.urandom(99))
    assert read_picture(tmp_path / "x.jpg").shape == (32, 32, 3)


# Bounds and parsers


def png(path: Path, width: int, height: int, *extra: bytes, data: bytes = b"") -> Path:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    extras = b"".join(chunk(part[:4], part[4:]) for part in extra)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + extras + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("size", [(16384, 10900), (16384, 16384), (8192, 8192), (2**31 - 1, 2**31 - 1)])
def test_the_area_is_bounded_before_anything_is_decoded(tmp_path, monkeypatch, size):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ConfigError, match=r"million|px|exceeds limit"):
        read_picture(png(tmp_path / "x.png", *size))


def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size))


HOSTILE = {
    "text": lambda path: png(path, 32, 32, b"zTXtname\0\0" + bomb(80_000_000)),
    "texts": lambda path: png(path, 32, 32, *[b"zTXtname\0\0" + bomb(1_000_000)] * 90),
    "profile": lambda path: png(path, 32, 32, b"iCCPname\0\0" + bomb(80_000_000)),
    "exif": lambda path: png(path, 32, 32, b"eXIf" + os.urandom(64)),
    "no pixels": lambda path: png(path, 32, 32),
    "pipe": lambda path: os.mkfifo(path),
    "ppm": lambda path: path.write_bytes(b"P6 99999999999999999999999 5 255\n"),
    "xbm": lambda path: path.write_bytes(b"#define x_width 99999999999999999999\n#define x_height 20\n"),
    "eps": lambda path: path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    ),
    "tiff": lambda path: path.write_bytes(b"II*\0\x08\0\0\0\xff\xff" + b"\x01\x01\x04\0\xff\xff\xff\xff" * 200),
    "gif": lambda path: path.write_bytes(b"GIF89a" + b"\x40\0\x40\0\xf7\0\0"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_a_parser_raises_is_one_line(tmp_path, kind):
    path = tmp_path / "x.png"
    HOSTILE[kind](path)
    with pytest.raises(ConfigError, match=r"x\.png") as caught:
        read_picture(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_memory_that_runs_out_is_one_line(tmp_path, monkeypatch):
    def refuse(_):
        raise MemoryError

    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", refuse)
    with pytest.raises(ConfigError, match=r"x\.png cannot be read: MemoryError"):
        read_picture(tmp_path / "x.png")


# Values of other programs

RED = torch.tensor([1.0, 0.0, 0.5]).expand(1, 20, 30, 3)
SEEN = torch.tensor([255, 0, 128], dtype=torch.uint8).expand(1, 20, 30, 3)
IMAGES = {
    "batch": (lambda: torch.cat([RED, RED]), torch.cat([SEEN, SEEN])),
    "one picture": (lambda: RED[0], SEEN),
    "half": (lambda: RED.half(), SEEN),
    "bfloat16": (lambda: RED.bfloat16(), SEEN),
    "double": (lambda: RED.double(), SEEN),
    "gradient": (lambda: RED.clone().requires_grad_(), SEEN),
    "uint8": (lambda: SEEN, SEEN),
    "int16": (lambda: (RED.double() * 32767).round().to(torch.int16), SEEN),
    "numpy": (lambda: RED.numpy(), SEEN),
    "beyond white": (lambda: RED * 3 - 1, torch.tensor([255, 0, 128], dtype=torch.uint8).expand(1, 20, 30, 3)),
    "grey": (lambda: RED[..., 2:], torch.full((1, 20, 30, 3), 128, dtype=torch.uint8)),
    "grey and clear": (
        lambda: torch.cat([RED[..., :1], RED[..., 2:]], -1), torch.full((1, 20, 30, 3), 128, dtype=torch.uint8)
    ),
    "half clear": (
        lambda: torch.cat([RED, RED[..., 2:]], -1), torch.tensor([128, 0, 64], dtype=torch.uint8).expand(1, 20, 30, 3)
    ),
    "half clear bytes": (
        lambda: torch.cat([SEEN, torch.full((1, 20, 30, 1), 51, dtype=torch.uint8)], -1),
        torch.tensor([51, 0, 26], dtype=torch.uint8).expand(1, 20, 30, 3),
    ),
    "list": (lambda: [RED[0]], SEEN),
    "sparse": (lambda: RED.to_sparse(), SEEN),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_are_taken(case):
    make, expected = IMAGES[case]
    made = pictures_of(make())
    assert made.dtype == torch.uint8 and (made.int() - expected.int()).abs().max() <= (1 if case == "bfloat16" else 0)


@pytest.mark.parametrize(
    "value",
    [None, "x" * 9999, [], {}, RED[:0], RED[..., 0], RED[0, 0], RED * math.nan, RED.expand(1, 20, 30, 3)[..., :0],
     torch.zeros(1, 20, 30, 5), RED.to(torch.complex64), np.array(["a"])],
)  # fmt: skip
def test_images_that_are_refused_in_one_line(value):
    with pytest.raises(ConfigError) as caught:
        pictures_of(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


UNREADABLE = {
    "no values": lambda values: values.to("meta"),
    "nested": lambda values: torch.nested.as_nested_tensor([*values, *values]),
    "nested, jagged": lambda values: torch.nested.nested_tensor([*values, *values], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_that_cannot_be_read_are_one_line(kind):
    for name, read in (
        ("image", lambda: pictures_of(UNREADABLE[kind](RED))),
        ("audio", lambda: recording_of({"waveform": UNREADABLE[kind](RED[0]), "sample_rate": 16000})),
        ("audio", lambda: recording_of({"waveform": RED[0], "sample_rate": torch.zeros((), device="meta")})),
    ):
        with pytest.raises(ConfigError, match=f"^the {name} input .*(comes from|give[s] them)") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Driving videos


def write_frames(path: Path, frames: list[np.ndarray], codec: str, pixels: str, kind: str = "rgb24", **tags) -> Path:
    """A video of arrays, with tags of its stream and pictures such as color_trc."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pixels
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number, content in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(content, format=kind)
            if kind != pixels:
                frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32], QUADRANTS[:24, 32:], QUADRANTS[24:, :32] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
ONE = 1 << 16
MATRICES = {
    "as it is": ([ONE, 0, 0, ONE], QUADRANTS),
    "mirrored": ([-ONE, 0, 0, ONE], QUADRANTS[:, ::-1]),
    "upside down": ([ONE, 0, 0, -ONE], QUADRANTS[::-1]),
    "half a turn": ([-ONE, 0, 0, -ONE], QUADRANTS[::-1, ::-1]),
    "quarter turn": ([0, ONE, -ONE, 0], np.rot90(QUADRANTS, -1)),
    "three quarters": ([0, -ONE, ONE, 0], np.rot90(QUADRANTS)),
    "transposed": ([0, ONE, ONE, 0], QUADRANTS.swapaxes(0, 1)),
    "transposed the other way": ([0, -ONE, -ONE, 0], QUADRANTS[::-1, ::-1].swapaxes(0, 1)),
    "not quite a quarter": ([900, ONE, -ONE, 900], np.rot90(QUADRANTS, -1)),
    "nothing": ([0, 0, 0, 0], QUADRANTS),
}


@pytest.mark.parametrize("case", MATRICES)
def test_the_whole_display_matrix(tmp_path, case):
    (a, b, c, d), expected = MATRICES[case]
    path = write_frames(tmp_path / "x.mp4", [QUADRANTS] * 2, "libx264", "yuv444p")
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer to volume
    numbers = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    content[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in numbers)
    path.write_bytes(content)
    seen = read_frames(path, 16, 0, 1)[0].numpy().astype(int)
    assert seen.shape == expected.shape and abs(seen - expected)[4:-4, 4:-4].mean() < 8


def test_turning_knows_no_matrix():
    assert turned(QUADRANTS, None) is QUADRANTS


@pytest.mark.parametrize(
    "shape, size", [((2, 1), (48, 128)), ((1, 2), (96, 64)), ((12, 11), (48, 70)), ((99, 1), (48, 64))]
)
def test_pixels_that_are_not_square(tmp_path, shape, size):
    path = write_frames(tmp_path / "x.mkv", [QUADRANTS], "libx264", "yuv444p", sample_aspect_ratio=Fraction(*shape))
    seen = read_frames(path, 16, 0, 1)[0]
    assert tuple(seen.shape[:2]) == size
    assert (seen[size[0] // 4, size[1] // 4].int() - torch.tensor([250, 10, 10])).abs().max() < 12


@pytest.mark.parametrize(
    "pixels, full", [("yuv420p", 1), ("yuv420p", 2), ("yuv420p10le", 1), ("yuv444p10le", 2), ("gray10le", 2)]
)
def test_depth_and_range(tmp_path, pixels, full):
    """White, grey and black come back, whether 16 or 0 is black."""
    levels = [np.full((32, 32, 3), level, np.uint8) for level in (255, 128, 0)]
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        stream.codec_context.color_range = full
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(level, format="rgb24").reformat(
                format=pixels,
                dst_colorspace="ITU601",
                src_color_range="JPEG",
                dst_color_range=["MPEG", "JPEG"][full - 1],
            )
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    seen = read_frames(tmp_path / "x.mkv", 16, 0, 3)
    assert (seen.float().mean((1, 2, 3)) - torch.tensor([255.0, 128, 0])).abs().max() <= 2


def test_transparency_of_a_video_is_black(tmp_path):
    clear = np.full((32, 32, 4), 200, np.uint8)
    clear[:, :16, 3], clear[:, 16:, 3] = 0, 255
    seen = read_frames(write_frames(tmp_path / "x.mov", [clear], "png", "rgba", "rgba"), 16, 0, 1)[0]
    assert not seen[:, :16].any() and (seen[:, 16:] == 200).all()


@pytest.mark.parametrize("transfer, signal", [(PQ, 0.5807), (HLG, 0.75)])
def test_hdr_is_read_as_an_sdr_screen_shows_it(tmp_path, transfer, signal):
    """White of 203 nits is bright, nothing above it is lost, and darker greys keep their order."""
    levels = [0.0, signal / 2, signal, (1 + signal) / 2, 1.0]
    frames = [np.full((32, 32, 3), round(level * 65535), np.uint16) for level in levels]
    path = write_frames(
        tmp_path / "x.mkv", frames, "ffv1", "gbrp16le", "rgb48le", color_trc=transfer, color_primaries=9
    )
    seen = read_frames(path, 16, 0, 5)
    means = seen.float().mean((1, 2, 3)).tolist()
    assert means[0] == 0 and 10 < means[1] < 130 and 225 <= means[2] <= 245
    assert means == sorted(means) and means[2] < means[3] <= means[4] <= 255
    assert (seen.float().std(-1) < 2).all(), "grey stays grey"


def test_wide_colours_of_hdr_get_those_of_an_ordinary_screen():
    """A saturated red of BT.709 is a paler red in the wide space that it is stored in."""
    linear = np.array([0.6274, 0.0691, 0.0164]) * 203 / 10_000  # red of BT.709 in BT.2020, ITU-R BT.2087
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    stored = ((c1 + c2 * linear**m1) / (1 + c3 * linear**m1)) ** m2
    seen = to_sdr((stored * 65535).round().astype(np.uint16)[None, None], PQ, True)[0, 0].tolist()
    assert seen[0] > 225 and max(seen[1:]) < 30


@pytest.mark.skipif(not hasattr(av.stream, "Disposition"), reason="this PyAV does not tell marks of streams")
def test_a_cover_is_no_video(tmp_path):
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt, stream.disposition = 64, 48, "yuvj420p", 0x400
        content = io.BytesIO()
        Image.new("RGB", (64, 48), "red").save(content, "JPEG")
        packet = av.Packet(content.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 16)
        container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams[0].disposition & 0x400
    with pytest.raises(ConfigError, match="has no video stream"):
        read_frames(path, 16, 0, 1)


def test_the_largest_track_of_several_is_read(tmp_path):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for width, level in ((32, 10), (96, 200), (64, 90)):
            stream = container.add_stream("ffv1", rate=16)
            stream.width, stream.height, stream.pix_fmt = width, 32, "bgr0"
            streams.append((stream, np.full((32, width, 3), level, np.uint8)))
        for stream, content in streams:
            frame = av.VideoFrame.from_ndarray(content, format="rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 16)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert (read_frames(path, 16, 0, 1) == 200).all()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ico", "jp2"])
def test_a_still_is_no_driving_video(tmp_path, suffix):
    path = tmp_path / f"still.{suffix}"
    Image.new("RGB", (64, 48), "green").save(path)
    with pytest.raises(ConfigError, match=r"is a picture \(.*driving video of several frames, such as an mp4"):
        DrivingVideo(path, 16)(0, 4)


def test_what_is_no_video_at_all(tmp_path):
    path = tmp_path / "video.mp4"
    Image.new("RGB", (64, 48), "green").save(path, "PCX")
    with pytest.raises(ConfigError, match=r"sound or video: no format of these begins so. Use a complete file"):
        DrivingVideo(path, 16)(0, 4)


def test_frames_that_change_their_size(tmp_path):
    """All frames of a stretch have the size of the first one of the film."""
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.options = {}
        for number in range(4):
            single = Image.new("RGB", (64, 48) if number < 2 else (32, 96), (200, 60 * number, 0))
            content = io.BytesIO()
            single.save(content, "JPEG")
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 16)
            container.mux(packet)
    seen = DrivingVideo(path, 16)(0, 4)
    assert seen.shape == (4, 48, 64, 3) and len({int(frame[20, 20, 1]) for frame in seen}) == 4


def test_frames_larger_than_4k_are_read_smaller(tmp_path, monkeypatch):
    path = write_frames(tmp_path / "x.mkv", [QUADRANTS] * 2, "ffv1", "bgr0")
    monkeypatch.setattr(video, "LARGEST_DRIVING_AREA_PX", 24 * 32)
    seen = read_frames(path, 16, 0, 2)
    assert seen.shape == (2, 24, 32, 3) and (seen[0, 5, 5].int() - torch.tensor([250, 10, 10])).abs().max() < 3
    assert next(iter(frames_of(path)))[0].shape == (48, 64, 3), "films that are judged keep theirs"


def test_frames_of_more_than_64_million_pixels_are_refused(tmp_path):
    path = write_frames(tmp_path / "x.mkv", [np.zeros((8, 8, 3), np.uint8)], "ffv1", "bgr0")
    content = bytearray(path.read_bytes())
    for name in (b"\xb0", b"\xba"):  # width and height of Matroska, one byte each
        place = content.index(name + b"\x81\x08")
        content[place : place + 3] = name + b"\x81\x08"
    path.write_bytes(
        content.replace(b"\xb0\x81\x08", b"\xb0\x82\xff\xff").replace(b"\xba\x81\x08", b"\xba\x82\xff\xff")
    )
    with pytest.raises(ConfigError, match=r"x\.mkv"):
        read_frames(path, 16, 0, 1)


def test_a_long_stretch_of_large_poses_is_fitted_frame_by_frame():
    frames = torch.randint(0, 256, (3, 50, 70, 3), dtype=torch.uint8)
    fitted = pose_pixels(frames, 5, 32, 32)
    assert fitted.shape == (1, 3, 6, 32, 32) and (fitted[:, :, 4:] == -1).all()
    for number in range(3):
        assert torch.equal(fitted[:, :, number + 1], pose_pixels(frames[number : number + 1], 1, 32, 32)[:, :, 1])
