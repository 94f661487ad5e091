"""What a forward of the DiT holds at its peak besides weights, predicted from sizes alone: stdlib only.

Each term follows the code: what lives all through a clip, what lives all through a forward, and the largest of what the
phases of a forward hold for the tokens that they take at once. Measured against counted storages in
tests/core/test_activations.py, where it is within 10 %.
"""

import math
from dataclasses import dataclass

from ..config import UNUSED, S2VModelConfig
from ..geometry import PATCH, TILE, frame_slices, tiles_of, token_slices

FLOAT, COMPLEX, INTEGER = 4, 8, 8
"""Bytes of the stream's numbers, of a rotation and of an index."""


GAP_ROWS = 3
"""Rows of the compute precision for each token that is taken at once, see `gap_bytes`."""


@dataclass(frozen=True)
class ClipShape:
    """How many tokens there are."""

    grid: tuple[int, int, int]
    """Latent frames, rows and columns of the noisy tokens."""
    side_tokens: int
    """Of reference picture and motion."""
    has_pose: bool = False
    batch: int = 1

    @property
    def noisy_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.noisy_tokens + self.side_tokens


@dataclass(frozen=True)
class ForwardWay:
    """How a forward computes."""

    slice_tokens: int | None = None
    """As for `slices.slice_tokens`."""
    dtype_bytes: int = 2
    """Of the compute precision."""
    fused: bool = True
    """Whether the steps between products are fused kernels."""
    keeps_keys_values: bool = True
    """Whether keys and values of text and voice are kept over the steps."""
    branches: int = 1
    """Guidance branches, of which each has a prompt and a voice of its own."""
    rows_in_8_bits: bool = False
    """Whether products take 8-bit rows, which fused steps make."""
    attention_bits: int = 16
    """8: attention makes 8-bit copies of queries, keys and values."""
    sparse_keep: float = 1.0


def activation_bytes(config: S2VModelConfig, shape: ClipShape, way: ForwardWay) -> int:
    """Bytes at once at the peak of sampling a clip, besides weights."""
    return sum(activation_terms(config, shape, way).values())


def activation_terms(config: S2VModelConfig, shape: ClipShape, way: ForwardWay) -> dict[str, int]:
    """The same by name: what the clip is made from, what each branch and each forward hold, and the largest phase."""
    phases = Phases(config, shape, way).all()
    largest = max(phases, key=phases.get)
    return {
        "latents": latents_bytes(config, shape),
        "clip": clip_bytes(config, shape, way),
        "branches": way.branches * branch_bytes(config, shape, way),
        "modulation": 2 * shape.batch * 2 * 6 * config.width * FLOAT,
        largest: round(phases[largest]),
    }


def gap_bytes(config: S2VModelConfig, shape: ClipShape, way: ForwardWay) -> int:
    """What must be free besides, because it lies between tensors and is too small for the next one. Of those that are
    taken at once, see `tests/core/test_gaps.py` for what torch's allocator makes of the tensors of a forward."""
    phases = Phases(config, shape, way)
    return GAP_ROWS * phases.row * phases.at_once


def latents_bytes(config: S2VModelConfig, shape: ClipShape) -> int:
    """Noise, velocity and pose of a clip."""
    frames, rows, columns = shape.grid
    channels = 2 * config.latent_channels + (config.pose_channels if shape.has_pose else 0)
    return FLOAT * shape.batch * channels * frames * rows * columns * PATCH**2


def clip_bytes(config: S2VModelConfig, shape: ClipShape, way: ForwardWay) -> int:
    """What all branches share: side tokens, rotations, frame numbers. Strips have rotations in their own order."""
    tables = shape.tokens * config.head_width // 2 * COMPLEX * (1 if way.sparse_keep == 1 else 2)
    return shape.batch * shape.side_tokens * config.width * FLOAT + tables + shape.noisy_tokens * INTEGER


def branch_bytes(config: S2VModelConfig, shape: ClipShape, way: ForwardWay) -> int:
    """Text and voice of a branch, embedded, and their keys and values if these are kept."""
    voice = shape.grid[0] * (config.audio_tokens + 1)
    kept = 2 * config.text_tokens  # of the block at work
    if way.keeps_keys_values:
        injectors = sum(block != UNUSED for block in config.injected_blocks)
        kept = 2 * (config.blocks * config.text_tokens + injectors * voice)
    return shape.batch * config.width * way.dtype_bytes * (config.text_tokens + voice + shape.grid[0] + kept)


class Phases:
    """Bytes that the phases of one forward hold, all but the terms that stay.

    Letters: `stream` and `wide` are a float32 row of the width, `row` one in the compute precision, `read` one as a
    product reads it, each for all tokens that are taken at once.
    """

    def __init__(self, config: S2VModelConfig, shape: ClipShape, way: ForwardWay):
        self.config, self.shape, self.way = config, shape, way
        self.all_tokens = shape.batch * shape.tokens
        self.wide, self.row = FLOAT * config.width, way.dtype_bytes * config.width
        self.cast = self.row if way.dtype_bytes != FLOAT else 0
        """What a cast to the compute precision makes anew."""
        self.read = config.width if self.is_in_8_bits else self.row

    @property
    def is_in_8_bits(self) -> bool:
        return self.way.fused and self.way.rows_in_8_bits

    @property
    def at_once(self) -> int:
        """Tokens of the largest slice."""
        size = self.way.slice_tokens
        if size is None:
            return self.all_tokens
        return self.shape.batch * max(stop - start for start, stop in token_slices(self.shape.tokens, max(TILE, size)))

    @property
    def is_sliced(self) -> bool:
        return self.at_once < self.all_tokens

    @property
    def noisy_at_once(self) -> int:
        """Noisy tokens that an injector or the embedding takes."""
        frames, rows, columns = self.shape.grid
        if self.way.slice_tokens is None:
            return self.shape.batch * self.shape.noisy_tokens
        parts = frame_slices(frames, rows * columns, max(TILE, self.way.slice_tokens))
        return self.shape.batch * rows * columns * max(last - first for first, last in parts)

    def all(self) -> dict[str, float]:
        injects = any(block != UNUSED for block in self.config.injected_blocks)
        return {
            "embedding": self.embedding(),
            "keys and values": self.keys_values(),
            "attention": self.attention(),
            "additions": self.additions(),
            "feed-forward": self.feed_forward(),
            **({"injection": self.injection()} if injects else {}),
            "head": self.head(),
        }

    @property
    def held(self) -> int:
        """The streams that a block or injector finds: its own, and the first one, which the forward holds on to; steps
        that write in place, and slices, leave one."""
        is_one = self.way.fused or self.is_sliced or self.config.blocks == 1
        return self.all_tokens * self.wide * (1 if is_one else 2)

    @property
    def keys(self) -> int:
        """Keys and values of all tokens while slices look at them."""
        if not self.is_sliced:
            return 0
        return self.all_tokens * (2 * self.config.width if self.way.attention_bits == 8 else 2 * self.row)

    def embedding(self) -> int:
        noisy = self.noisy_at_once
        pose = self.wide + self.row if self.shape.has_pose else 0
        patches = FLOAT * PATCH**2 * self.config.latent_channels
        return self.all_tokens * self.wide + noisy * (max(self.row, pose) + patches)

    def norm(self) -> float:
        """Per token while a norm of the stream is made. The plain one puts batch entries together, and does side tokens
        a second time."""
        if self.way.fused:
            return self.read
        sides = min(1.0, self.shape.batch * self.shape.side_tokens / self.at_once)
        side_norm = (self.cast or self.wide) + sides * (self.wide + self.joined)
        return max(self.wide + self.cast, side_norm, self.wide + self.joined)

    @property
    def joined(self) -> int:
        """Per token for the parts of a norm that is made for one batch entry after the other."""
        return self.wide if self.shape.batch > 1 else 0

    def turn(self) -> int:
        """Per token while queries or keys are normed and turned, their product included."""
        return self.row if self.way.fused else max(self.row + self.wide + self.cast, 3 * self.row)

    def keys_values(self) -> float:
        """While keys and values of all tokens are made, slice by slice. Attention in 8 bits makes copies of the keys,
        frees them, and then does the same with the values."""
        if not self.is_sliced:
            return 0
        both, copies = (self.all_tokens * size for size in (2 * self.row, 2 * self.config.width))
        is_short = self.way.attention_bits == 8
        made = self.at_once * max(self.norm(), self.read + max(self.turn(), self.row if is_short else 2 * self.row))
        if is_short:
            return self.held + (both + copies) / 2 + max(made, copies / 2)
        return self.held + both + made

    def attention(self) -> float:
        config, n = self.config, self.at_once
        rows = 2 if self.is_sliced else 4  # queries and result, and keys and values
        rounded = 0
        if self.way.attention_bits == 8:
            rounded = config.width * (1 if self.is_sliced else 3)
        turning = self.turn() if self.is_sliced else self.row + self.turn()
        most = max(self.norm(), self.read + max(rows * self.row + rounded, turning))
        return self.held + self.keys + n * most + self.lists()

    def lists(self) -> int:
        """Scores of tiles, the best of them and the lists."""
        if self.way.sparse_keep == 1:
            return 0
        tiles = tiles_of(self.shape.tokens)
        scores = self.shape.batch * self.config.heads * tiles_of(self.at_once // self.shape.batch) * tiles
        return round(scores * (FLOAT + FLOAT + (FLOAT + INTEGER) * self.way.sparse_keep))

    def additions(self) -> float:
        """While what cross-attention has heard is added, and the feed-forward's input is made."""
        n = self.at_once
        if self.way.fused:
            return self.held + self.keys + n * (2 * self.read + self.row)
        new = 1 if self.is_sliced else 2  # streams; of a slice the first is written back at the end
        return self.held + self.keys + n * ((new + self.is_sliced) * self.wide + 2 * self.row + self.norm())

    def feed_forward(self) -> int:
        config, n, b = self.config, self.at_once, self.way.dtype_bytes
        hidden = b * config.feed_forward_width * (config.top_k if config.num_experts else 1)  # more than experts take
        if not self.way.fused:
            new = 0 if self.is_sliced else self.wide
            return self.held + self.keys + n * (new + self.row + max(2 * hidden, hidden + self.row))
        second = config.feed_forward_width if self.is_in_8_bits else 0
        after = (second or hidden) + self.row
        return self.held + self.keys + n * (self.read + max(hidden + second, after))

    def injection(self) -> int:
        n = self.noisy_at_once
        if self.way.fused:
            return self.held + n * (self.read + 3 * self.row)
        modulated = 4 if self.config.modulates_audio else 1
        rest = 0 if self.is_sliced else self.shape.batch * self.shape.side_tokens * self.wide
        return self.held + rest + n * max(modulated * self.wide + self.cast, 2 * self.wide + 2 * self.row)

    def head(self) -> int:
        n = self.shape.batch * self.shape.noisy_tokens
        normed = n if self.way.slice_tokens is None else min(n, self.at_once)
        velocity = FLOAT * PATCH**2 * self.config.latent_channels
        return self.all_tokens * self.wide + normed * (self.wide + self.joined) + 2 * n * velocity
