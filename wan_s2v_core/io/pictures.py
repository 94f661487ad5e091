"""Picture files to pixels as they are meant to be seen, through Pillow."""

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, shown, shown_path
from .outside import file_size, foreign_parser

log = logging.getLogger(__name__)

FORMATS = "PNG JPEG MPO WEBP AVIF HEIF JPEG2000 JXL TIFF GIF BMP DIB TGA PPM ICO DDS PCX SGI QOI PSD"
"""Names that Pillow and its plug-ins have for what is opened. EPS and WMF, which other programs draw, are not there."""
CURE = "Use a PNG, JPEG or WebP file."
LARGEST_FILE_BYTES = 1_000_000_000
ROWS_AT_ONCE = 256
ORIENTATION = 0x0112
BITS, SAMPLE_FORMAT, SIGNED = 258, 339, 2
"""Tags of TIFF."""
SAME_COLOURS = 2
"""Of 255: a profile that changes no colour by more is sRGB itself, and the pixels stay as they are."""
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


def decode_picture(path: str | Path, check_size: Callable[[int, int], None]) -> Tensor:
    """The first picture of a file, H W 3 uint8: upright, in sRGB, transparency on black, grey as RGB.

    Args:
        check_size: called with height and width before anything is decoded; may raise.
    Raises:
        ConfigError: if it is missing, no picture or not decodable.
    """
    from PIL import Image

    if not file_size(path, LARGEST_FILE_BYTES):
        raise ConfigError(f"{shown_path(path)} is empty (0 bytes). Fetch the picture again.")
    Image.init()
    formats = [name for name in FORMATS.split() if name in Image.OPEN]
    with warnings.catch_warnings(), foreign_parser(path, CURE):
        warnings.simplefilter("ignore")  # of pictures of more than 89 million pixels; our bound is lower
        try:
            image = Image.open(path, formats=formats)
        except Image.UnidentifiedImageError as error:
            reason = "cannot be read as a picture: its format is unknown"
            raise ConfigError(f"{shown_path(path)} {reason}. {CURE}") from error
        with image:
            check_size(image.height, image.width)
            image.load()
            check_size(image.height, image.width)  # a few formats learn it while they decode
            turn, profile = _orientation(image, path), image.info.get("icc_profile")
            colours, alpha = _colours(image)
        del image  # a large one and its copies in other modes do not fit beside each other
        colours = _in_srgb(colours, profile, path)
        if turn is not None:
            colours, alpha = colours.transpose(turn), alpha and alpha.transpose(turn)
        return torch.from_numpy(_on_black(colours, alpha))


def _orientation(image: Any, path: str | Path) -> int | None:
    """Pillow's turn that makes the picture upright."""
    from PIL import Image

    turns = Image.Transpose
    wanted = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    try:
        return wanted.get(image.getexif().get(ORIENTATION))
    except Exception as error:  # whatever a damaged EXIF makes Pillow raise: the pixels are there all the same
        log.warning("%s has a damaged EXIF block (%s); it is not turned", shown_path(path), shown(error))
        return None


def _colours(image: Any) -> tuple[Any, Any]:
    """The picture as L, RGB, CMYK or LAB with 8 bits, and its transparency as L or None."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return _eight_bits(image)
    if mode in ("L", "RGB", "CMYK", "LAB") and "transparency" not in image.info:
        return image, None
    if mode == "1" and "transparency" not in image.info:
        return image.convert("L"), None
    if mode in ("YCbCr", "HSV", "RGBX"):
        return image.convert("RGB"), None
    if mode != "RGBA":
        image = (image.convert("LA") if mode == "La" else image).convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")


def _eight_bits(image: Any) -> tuple[Any, Any]:
    """A grey picture of more than 8 bits, scaled: its own full scale becomes white."""
    from PIL import Image

    values = np.asarray(image)
    clear = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        full = _full_scale(float(values.max()))
    else:
        tags = getattr(image, "tag_v2", {})
        signed, bits = _first(tags.get(SAMPLE_FORMAT)) == SIGNED, _first(tags.get(BITS)) or 16
        if bits == 32 and not signed:
            values = values.view(np.uint32)  # Pillow reads them as signed
        full = float(2 ** (bits - signed) - 1)
        full = full if values.max() <= full else float(2**32 - 1)
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = values[start : start + ROWS_AT_ONCE].astype(np.float64)
        pixels[start : start + ROWS_AT_ONCE] = np.rint(rows.clip(0, full) * (255 / full))
    return Image.fromarray(pixels), alpha


def _first(value: Any) -> int:
    """A number of a TIFF tag, which Pillow may give as a tuple."""
    return int(value[0] if isinstance(value, tuple) else value or 0)


def _full_scale(highest: float) -> float:
    """What is white in floats: 1, or the full scale of integers that they were made from."""
    return next((full for full in (1.0, 255.0, 65535.0) if highest <= full), highest)


def _in_srgb(image: Any, profile: bytes | None, path: str | Path) -> Any:
    """The colours as sRGB has them, mode L or RGB. A profile that cannot be used is passed over, and logged."""
    from PIL import ImageCms

    if image.mode == "LAB":
        return _through(image, ImageCms.createProfile("LAB"))
    if profile:
        try:
            return _by_profile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except Exception as error:  # a damaged profile makes Pillow raise several kinds; viewers pass it over too
            log.warning("the colour profile of %s cannot be used (%s); sRGB is assumed", shown_path(path), shown(error))
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _by_profile(image: Any, profile: Any) -> Any:
    """Raises ValueError for a profile of other channels than the picture's."""
    from PIL import Image

    space = profile.profile.xcolor_space.strip()
    mode = PROFILE_MODES.get(space)
    if mode == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if mode != image.mode:
        raise ValueError(f"it is for {space} and the picture is {image.mode}")
    if mode in ("RGB", "L"):
        steps = np.linspace(0, 255, 16).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
        probe = Image.fromarray(cube if mode == "RGB" else np.repeat(steps[None], 16, 0))
        seen = np.asarray(_through(probe, profile), int) - np.asarray(probe.convert("RGB"), int)
        if abs(seen).max() <= SAME_COLOURS:
            return image
    return _through(image, profile)


def _through(image: Any, profile: Any) -> Any:
    from PIL import ImageCms

    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, profile, srgb, intent, outputMode="RGB", flags=flags)


def _on_black(colours: Any, alpha: Any) -> np.ndarray:
    """H W 3 uint8, a few rows at a time: composing takes several copies."""
    from PIL import Image

    pixels = np.empty((colours.height, colours.width, 3), np.uint8)
    for top in range(0, colours.height, ROWS_AT_ONCE):
        box = (0, top, colours.width, min(colours.height, top + ROWS_AT_ONCE))
        rows = colours.crop(box).convert("RGB")
        if alpha is not None:
            rows.putalpha(alpha.crop(box))
            rows = Image.alpha_composite(Image.new("RGBA", rows.size, "black"), rows).convert("RGB")
        pixels[box[1] : box[3]] = np.asarray(rows)
    return pixels
