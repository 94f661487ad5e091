"""Sound and pictures that other programs hand over as values: each taken for what it is, or refused in one line."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, shown
from .audio import MOST_CHANNELS, Recording, check_rate
from .outside import foreign_parser

log = logging.getLogger(__name__)

AUDIO, IMAGE = "the audio input", "the image input"
CURE = "Look at the node that it comes from."
"""Of tensors that cannot be read: without values (on the meta device), sparse, nested, of a lost GPU."""
WHOLE_SCALES = {torch.uint8: 2.0**7, torch.int8: 2.0**7, torch.int16: 2.0**15, torch.int32: 2.0**31}
"""What the integers of a type are divided by; those of uint8 lie around 128."""


def looks_like_mapping(value: Any) -> bool:
    """Whether values can be asked for by name; some packs hand over what reads a file only when it is asked."""
    return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def value_of(holder: Any, key: str, origin: str) -> Any:
    """What a mapping holds under a name, None where it has no such name.

    Raises:
        ConfigError: if it cannot be read.
    """
    with foreign_parser(origin, CURE):
        return holder[key] if key in holder.keys() else None  # noqa: SIM118 (not everything with keys has `in`)


def recording_of(audio: Any, origin: str = AUDIO) -> Recording:
    """{"waveform": B C N, "sample_rate": Hz} -> the first recording of the batch.

    C N and N are taken too, and integers, which are scaled by their type.

    Raises:
        ConfigError: if there is none, it cannot be read, or it has no usable rate, shape or scale.
    """
    with foreign_parser(origin, CURE):
        return _recording_of(audio, origin)


def _recording_of(audio: Any, origin: str) -> Recording:
    if isinstance(audio, (list, tuple)) and len(audio) == 1:
        audio = audio[0]
    nothing = f"{origin} holds no sound (batch, channels, samples). Connect Load Audio, or a video that has sound."
    if not looks_like_mapping(audio):
        raise ConfigError(nothing)
    waveform = as_tensor(value_of(audio, "waveform", origin))
    if waveform is None or not 1 <= waveform.ndim <= 3 or not waveform.numel():
        raise ConfigError(nothing)
    rate = rate_of(value_of(audio, "sample_rate", origin), origin)
    while waveform.ndim < 3:
        waveform = waveform[None]
    if len(waveform) > 1:
        log.warning("%s holds %d recordings; the first one is used", origin, len(waveform))
    if waveform.shape[1] > MOST_CHANNELS:
        raise ConfigError(
            f"{origin} has {waveform.shape[1]:,} channels of {waveform.shape[2]:,} samples; up to {MOST_CHANNELS} "
            "channels are taken. Its two sides may be swapped: batch, channels, samples are expected."
        )
    return Recording(scaled(waveform[0], origin), rate)


def rate_of(value: Any, origin: str) -> int:
    """Raises ConfigError unless it is a sample rate."""
    try:
        rate = float(value)
        whole = round(rate)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(
            f"{origin} has sample_rate={shown(value)}, which is no number. Samples per second are expected: connect "
            "Load Audio, or a node that gives them."
        ) from None
    check_rate(whole, origin)
    return whole


def scaled(samples: Tensor, origin: str) -> Tensor:
    """C N of any real type -> float32 in host memory, full scale at -1 and 1.

    Raises:
        ConfigError: for types without a known full scale.
    """
    samples, kind = samples.detach().cpu(), samples.dtype
    if kind.is_floating_point:
        return samples.float()
    if kind in WHOLE_SCALES:
        return (samples.float() - (128 if kind == torch.uint8 else 0)) / WHOLE_SCALES[kind]
    raise ConfigError(
        f"{origin} holds samples of {kind}, whose full scale is not known. Make them float from -1 to 1, or int16."
    )


def pictures_of(image: Any, most: int | None = None) -> Tensor:
    """B H W C in 0..1, or integers up to the largest of their type -> B H W 3 uint8; grey as RGB, transparency on
    black. H W C is taken as one picture. With `most`, only so many of the first are read.

    Raises:
        ConfigError: if it has no picture, cannot be read, or has another number of channels or values that are not
            finite.
    """
    with foreign_parser(IMAGE, CURE):
        return _pictures_of(image, most)


def _pictures_of(image: Any, most: int | None) -> Tensor:
    if isinstance(image, (list, tuple)) and image:
        if len(image) > 1:
            log.warning("the image input is a list of %d; the first one is used", len(image))
        image = image[0]
    pictures = as_tensor(image)
    if pictures is None:
        raise ConfigError(f"{IMAGE} is {shown(type(image).__name__)}, no picture. Connect Load Image.")
    if pictures.ndim == 3 and pictures.shape[-1] <= 4:
        pictures = pictures[None]
    if pictures.ndim != 4 or not pictures.numel() or pictures.shape[-1] > 4 or pictures.dtype.is_complex:
        raise ConfigError(
            f"an image of shape {tuple(pictures.shape)} and {pictures.dtype} is no picture. Batch, height, width and 1 "
            "to 4 channels are expected: connect Load Image."
        )
    return torch.stack([_picture(picture) for picture in pictures[:most].detach()])


def _picture(picture: Tensor) -> Tensor:
    """H W C -> H W 3 uint8 in host memory; one at a time, so that a long batch is not held in float as well."""
    kind, picture = picture.dtype, picture.float().cpu()
    if not kind.is_floating_point and kind != torch.bool:
        picture = picture / torch.iinfo(kind).max
    if not math.isfinite(float(picture.sum())) and not torch.isfinite(picture).all():
        raise ConfigError("the image holds values that are not finite. Values from 0 to 1 are expected; make it anew.")
    if picture.shape[-1] in (2, 4):
        picture = picture[..., :-1] * picture[..., -1:]
    return (picture.expand(*picture.shape[:2], 3).clamp(0, 1) * 255).round().to(torch.uint8)


def as_tensor(value: Any) -> Tensor | None:
    """A tensor or numpy array as a tensor; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        native = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("=")))
        return torch.from_numpy(native)
    if not isinstance(value, Tensor):
        return None
    return value if value.layout is torch.strided else value.to_dense()
