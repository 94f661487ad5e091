"""Decoded pictures of a video as a player shows them: shape, turn, mirror, colours, brightness, transparency."""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .media import LARGEST_AREA_PX, import_av

DISPLAY_MATRIX = "DISPLAYMATRIX"
WIDEST_PIXEL = 8.0
"""A file that says that its pixels are wider or higher than this is damaged."""
BT601, BT709 = "ITU601", "ITU709"
MATRICES = {1: BT709, 4: "FCC", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
"""Numbers of ITU-T H.273 (how YUV becomes RGB) to PyAV's names; what is not said is BT.601."""
BT2020_PRIMARIES, PQ, HLG = 9, 16, 18
"""Numbers of H.273 for the wide colours and the two transfer curves of HDR."""
WHITE_NITS = 203.0
"""Of HDR, what an SDR screen shows as white (ITU-R BT.2408)."""
HLG_WHITE = 0.75
"""The signal of HLG for the same."""
TO_BT709 = torch.tensor(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=torch.float32
)
"""Linear BT.2020 to BT.709, ITU-R BT.2087."""
KNEE = 0.8
"""Of white; brighter parts of HDR are pressed into what is left above."""


def picture_of(frame: Any, stream: Any, size: tuple[int, int] | None = None) -> Tensor:
    """H W 3 uint8 of one decoded frame of a stream.

    Args:
        size: width and height of the stored picture before it is turned, None for what `shown_size` says.
    """
    width, height = size or shown_size(frame.width, frame.height, pixel_shape(stream))
    has_alpha = any(component.is_alpha for component in frame.format.components)
    coded = frame if hasattr(frame, "color_trc") else stream.codec_context  # PyAV 14.0 tells it of the stream alone
    bright = coded.color_trc in (PQ, HLG)
    kind = "rgb48" + ("le" if sys.byteorder == "little" else "be") if bright else "rgba" if has_alpha else "rgb24"
    source = MATRICES.get(int(frame.colorspace), BT601)
    if source not in import_av().video.reformatter.Colorspace.__members__:
        source = BT709  # PyAV 14.0 has no BT.2020, to which this is nearest
    # RGB has no matrix, but PyAV 14.0 applies that of the source only where the two differ, also to stored RGB.
    other = source if frame.format.is_rgb else BT601 if source == BT709 else BT709
    resized = {} if (width, height) == (frame.width, frame.height) else {"interpolation": "BICUBIC"}
    made = frame.reformat(width, height, kind, src_colorspace=source, dst_colorspace=other, **resized)
    pixels = torch.from_numpy(np.ascontiguousarray(turned(made.to_ndarray(), matrix_of(frame))))
    if bright:
        return to_sdr(pixels.numpy(), coded.color_trc, int(coded.color_primaries) == BT2020_PRIMARIES)
    if has_alpha:
        return (pixels[..., :3].float() * (pixels[..., 3:].float() / 255)).round().to(torch.uint8)
    return pixels


def pixel_shape(stream: Any) -> float:
    """Width of a stored pixel by its height."""
    shape = float(stream.sample_aspect_ratio or 1)
    return shape if 1 / WIDEST_PIXEL <= shape <= WIDEST_PIXEL else 1.0


def shown_size(width: int, height: int, shape: float, largest_area: int = LARGEST_AREA_PX) -> tuple[int, int]:
    """Width and height with square pixels, no larger than an area."""
    wide, high = width * max(1.0, shape), height * max(1.0, 1 / shape)
    scale = min(1.0, (largest_area / (wide * high)) ** 0.5)
    return max(1, round(wide * scale)), max(1, round(high * scale))


def matrix_of(frame: Any) -> list[int] | None:
    """The four upper left numbers of the display matrix, a b c d: x' = a x + c y, y' = b x + d y."""
    for part in frame.side_data:
        if part.type.name == DISPLAY_MATRIX:
            numbers = np.frombuffer(bytes(part), np.int32)
            return [int(numbers[place]) for place in (0, 1, 3, 4)]
    return None


def turned(pixels: np.ndarray, matrix: list[int] | None) -> np.ndarray:
    """H W C by the quarter turn and mirror that a matrix is nearest to."""
    if matrix is None or not any(matrix):
        return pixels
    a, b, c, d = matrix
    across, down = (a, d) if abs(a) + abs(d) >= abs(b) + abs(c) else (c, b)
    if (across, down) != (a, d):
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def to_sdr(pixels: np.ndarray, transfer: int, is_wide: bool) -> Tensor:
    """H W 3 uint16 of HDR -> H W 3 uint8 as an SDR screen shows it: white at 203 nits, highlights pressed together."""
    signals = (torch.from_numpy(row.astype(np.float32) / 65535) for row in pixels)
    return torch.stack([_sdr_row(signal, transfer, is_wide) for signal in signals])


def _sdr_row(signal: Tensor, transfer: int, is_wide: bool) -> Tensor:  # signal: W 3
    light = _pq_light(signal) if transfer == PQ else _hlg_light(signal)  # 1 is white
    if is_wide:
        light = light @ TO_BT709.T
    light = light.clamp(min=0)
    brightest = light.amax(-1, keepdim=True).clamp(min=1e-6)
    light = light * (_pressed(brightest) / brightest)  # one factor for all three keeps the hue
    return (light.clamp(0, 1).pow(1 / 2.4) * 255).round().to(torch.uint8)


def _pq_light(signal: Tensor) -> Tensor:
    """SMPTE ST 2084."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = signal.pow(1 / m2)
    return ((root - c1).clamp(min=0) / (c2 - c3 * root)).pow(1 / m1) * (10_000 / WHITE_NITS)


def _hlg_light(signal: Tensor) -> Tensor:
    """ITU-R BT.2100, with the system gamma of a screen of 1000 nits on luminance."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073

    def scene(x: Tensor) -> Tensor:
        return torch.where(x <= 0.5, x.square() / 3, (((x - c) / a).exp() + b) / 12)

    light, white = scene(signal), scene(torch.tensor(HLG_WHITE))
    luminance = light @ torch.tensor([0.2627, 0.6780, 0.0593])
    return light * luminance.clamp(min=1e-6).pow(0.2)[..., None] / white**1.2


def _pressed(light: Tensor) -> Tensor:
    """What lies above the knee comes ever closer to white."""
    over = (light - KNEE).clamp(min=0)
    return torch.where(light <= KNEE, light, KNEE + (1 - KNEE) * over / (over + 1 - KNEE))
