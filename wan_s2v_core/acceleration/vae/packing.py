"""How the weights of a convolution lie in memory for the kernels, and which tiles they compute."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME, UP, DOWN, SPREAD, POINT = range(5)
"""What a convolution gives: a picture of the same size; one of twice the size, from every pixel four times; one of
half the size, at every second pixel; one of the same size in two steps, for very few output channels (`spread_taps`);
and one that only mixes channels."""

LARGEST_CHUNK = 64
SMALLEST_CHUNK = 16
"""Input channels that one step multiplies: 128 bytes in bfloat16 are one line of shared memory, and 16 the least."""


@dataclass(frozen=True)
class Tile:
    """What one program computes: pixels, and output channels as one or two powers of two (96 = 64 + 32)."""

    pixels: int
    first: int
    second: int
    warps: int
    stages: int
    registers: int | None = None
    """At most so many for each of 32 * warps threads; 128 let two programs of 8 warps share a multiprocessor."""


def choose_tile(outputs: int, chunk: int) -> Tile:
    """The fastest of some ten on an H200 at the shapes of the 96-wide VAE; see benchmarks/README.md."""
    if outputs <= 64:
        return Tile(128, max(SMALLEST_CHUNK, 1 << (outputs - 1).bit_length()), 0, 4, 4)
    if outputs <= 96:
        return Tile(256, 64, 32, 8, 5, 128) if chunk <= 32 else Tile(128, 64, 32, 4, 4)
    if outputs % 192 == 0 and outputs % 128:
        return Tile(128, 128, 64, 8, 4)
    return Tile(256, 128, 0, 8, 4)


def chunk_of(channels: int) -> int:
    """Channels of one step: a divisor if there is one, else with zeros behind the last."""
    for size in (LARGEST_CHUNK, LARGEST_CHUNK // 2, SMALLEST_CHUNK):
        if channels % size == 0:
            return size
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 1 << (channels - 1).bit_length()))


@dataclass(frozen=True)
class Packing:
    """The plan of one convolution from `channels` to `outputs`, with kt kh kw taps (over low resolution where UP)."""

    mode: int
    kernel: tuple[int, int, int]
    channels: int
    outputs: int

    @property
    def is_folded(self) -> bool:
        """Whether the three taps of a row are read as 3 C neighbouring values: fewer steps where C is small."""
        return self.mode == FRAME and self.kernel[2] == 3 and self.channels < 2 * SMALLEST_CHUNK

    @property
    def width(self) -> int:
        return self.channels * (3 if self.is_folded else 1)

    @property
    def chunk(self) -> int:
        return min(LARGEST_CHUNK, self._power(self.width)) if self.is_folded else chunk_of(self.channels)

    @staticmethod
    def _power(width: int) -> int:
        return max(SMALLEST_CHUNK, 1 << (width - 1).bit_length())

    @property
    def chunks(self) -> int:
        return -(-self.width // self.chunk)

    @property
    def tile(self) -> Tile:
        return choose_tile(self.outputs, self.chunk)

    def pack(self, weight: Tensor) -> Tensor:
        """N C kt kh kw -> rows of taps and channels, zeros behind the channels of each tap: N K, or 4 N K where UP."""
        if self.mode == UP:
            weight = up_taps(weight)
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, self.channels - weight.shape[1]))
        rows = weight.permute(0, 2, 3, 4, 1)  # N kt kh kw C
        rows = rows.flatten(3, 4) if self.is_folded else rows
        return F.pad(rows, (0, self.chunks * self.chunk - rows.shape[-1])).flatten(1).contiguous()


def up_taps(weight: Tensor) -> Tensor:
    """N C 1 3 3 over a picture of every pixel four times -> 4*N C 1 2 2 over the picture itself.

    The four: upper left, upper right, lower left, lower right pixel. Of the three taps in a row, the left pixel of two
    sees its left neighbour once and its own origin twice; the right one its origin twice, then the right neighbour.
    Four ninths of the work. The sums are exact up to rounding in the weights' type.
    """
    low, mid, high = weight.unbind(3)
    rows = [torch.stack(pair, 3) for pair in ((low, mid + high), (low + mid, high))]
    parts = []
    for row in rows:
        low, mid, high = row.unbind(4)
        parts += [torch.stack(pair, 4) for pair in ((low, mid + high), (low + mid, high))]
    return torch.cat(parts)


def spread_taps(weight: Tensor) -> Tensor:
    """N C kt 3 3 -> 9*N C kt 1 1: what a pixel gives to each neighbour, as channels, to be summed afterwards.

    A pixel is then read kt times instead of 9*kt, which is what bounds a convolution with three output channels.
    """
    return weight.permute(3, 4, 0, 1, 2).flatten(0, 2)[..., None, None]
