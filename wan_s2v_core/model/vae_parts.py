"""How the video VAE's work is cut into parts: tiles of the picture and steps in time. Integer arithmetic only."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ConfigError
from ..geometry import PIXELS_PER_LATENT

ENCODER_REACH, DECODER_REACH = 5, 7
"""Latent pixels around one that its features depend on, or that depend on it, in the part that may be tiled.

Encoder, pixels right of the 8 i that latent i begins at: 2 for the last halving and 4 for two residual blocks, twice
that plus 2 and 4, twice that plus 2, 4 and 1: 43, so 5 latents beyond i. Decoder, from full size: 1 + 6, halved and one
for each enlarging (4), plus 6, again (6), plus 6, again (7)."""
ENCODER_STEP, DECODER_STEP, LATENT_STEP = 4, 2, 24
"""Frames of a step: of the video into the encoder, at latent size and double time into the part of the decoder that may
be tiled (each becomes two of the video), and at most of latent frames through what runs at latent size."""
STEP_POSITIONS = 150_000
"""Latent positions that a step through what runs at latent size holds at most, unless one frame has more: 24 frames of
832x480. A picture that fills the card gains nothing from more frames at once."""


@dataclass(frozen=True)
class VaeParts:
    """What a VAE holds on its device at a time. Results differ by rounding alone: it is a choice of memory and time.

    Args:
        tile_px: side of the tiles that pictures are computed in, a multiple of 8; None for whole pictures.
        is_apart: whole videos, and the features between the two halves of the network, lie in main memory; only parts
            of them come to the device. What it holds then does not grow with the number of frames.
    Raises:
        ConfigError: if `tile_px` is none of those.
    """

    tile_px: int | None = None
    is_apart: bool = False

    def __post_init__(self):
        if self.tile_px is not None and (self.tile_px < PIXELS_PER_LATENT or self.tile_px % PIXELS_PER_LATENT):
            raise ConfigError(
                f"tile_px={self.tile_px} is not a multiple of {PIXELS_PER_LATENT}. Use such as 256, or None for none."
            )

    @property
    def tile(self) -> int | None:
        """Side of a tile in latent pixels."""
        return self.tile_px and self.tile_px // PIXELS_PER_LATENT


def steps(frames: int, step: int) -> Iterator[slice]:
    """The first frame of a video alone, then `step` at a time."""
    yield slice(0, 1)
    for start in range(1, frames, step):
        yield slice(start, min(start + step, frames))


def latent_steps(frames: int, height: int, width: int) -> list[slice]:
    """How latent frames of that size pass through what runs at latent size, the first one among them."""
    step = max(1, min(LATENT_STEP, STEP_POSITIONS // (height * width)))
    return [slice(start, min(start + step, frames)) for start in range(0, frames, step)]


def tiles(length: int, size: int | None, reach: int) -> list[tuple[slice, slice]]:
    """Cut latent pixels into parts of about equal length, at most `size`: each with what surrounds it, and alone."""
    count = -(-length // size) if size else 1
    edges = [length * i // count for i in range(count + 1)]
    return [(slice(max(0, a - reach), min(length, b + reach)), slice(a, b)) for a, b in pairwise(edges)]
