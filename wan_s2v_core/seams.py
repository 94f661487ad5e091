"""The places where speed is attached from outside, as types, and what travels through them.

Shape letters used everywhere: `B` batch, `C` channels, `T` video frames, `F` latent frames, `H W` pixels,
`h w` latent size, `L` tokens, `N` heads, `D` head size, `E` model width, `A` audio layers, `S` segments (2).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Memory:
    """What is remembered from step to step while a clip lasts; the clip holds it, and it goes with the clip.

    Techniques keep things in these dictionaries under names of their own. The plain model keeps nothing.
    """

    own: dict[Any, Any] = field(default_factory=dict)
    """Of one guidance branch. In a block or injector: its own part."""
    text: dict[Any, Any] = field(default_factory=dict)
    """The same, of the text alone: guidance branches that read the same text share it."""
    clip: dict[Any, Any] = field(default_factory=dict)
    """Shared by all layers and branches of the clip."""

    def of_layer(self, name: str) -> "Memory":
        """What a layer of that name remembers."""
        return Memory(self.own.setdefault(name, {}), self.text.setdefault(name, {}), self.clip)

    def of_branch(self, has_same_text: bool) -> "Memory":
        """What another guidance branch of the clip remembers."""
        return Memory({}, self.text if has_same_text else {}, self.clip)


@dataclass(frozen=True)
class BlockContext:
    """What every block needs besides the tokens. It is shared out with the tokens when a sequence is split.

    The tokens at hand are `noisy_tokens` noisy ones followed by reference and motion tokens, in that order.
    """

    rope: Tensor
    """L D/2 2, float32: cosine and sine of the rotation of each token and pair of channels."""
    noisy_tokens: int
    """How many of the tokens at hand are noisy; they come first."""
    frame_index: Tensor
    """L(noisy): latent frame of each noisy token."""
    modulation: Tensor
    """B S 6 E, float32: row 0 for noisy tokens, row 1 for the others."""
    text: Tensor
    """B L(text) E in the compute precision."""
    audio_tokens: Tensor
    """B F L(audio) E: what the noisy tokens of a latent frame listen to."""
    audio_frames: Tensor | None
    """B F E: one vector per latent frame that modulates the injection; None in models without it."""
    dtype: torch.dtype
    """Precision of the products; the token stream itself is float32."""
    grid: tuple[int, int, int]
    """Latent frames, rows and columns of the noisy tokens of the whole clip."""
    timestep: float
    """How noisy they are, 0 to 1000; the largest where batch entries differ."""
    branch: str = "cond"
    """Which guidance branch this is."""
    memory: Memory = field(default_factory=Memory)
    """Of the clip and branch; in a layer of the stack, that layer's part."""

    @property
    def has_all_frames(self) -> bool:
        """Whether the noisy tokens at hand are all there are: every latent frame, whole and in order."""
        frames, rows, columns = self.grid
        return self.noisy_tokens == frames * rows * columns

    def segments(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy tokens, and the rest. B L ... -> two views."""
        return tokens[:, : self.noisy_tokens], tokens[:, self.noisy_tokens :]

    def of_layer(self, name: str) -> "BlockContext":
        """The same for one layer of the stack, which remembers things of its own."""
        return replace(self, memory=self.memory.of_layer(name))

    def part(self, start: int, stop: int) -> "BlockContext":
        """The same for the tokens at hand from `start` to `stop` alone, which may be noisy ones, others or both."""
        noisy = max(0, min(stop, self.noisy_tokens) - start)
        return replace(
            self,
            rope=self.rope[start:stop],
            noisy_tokens=noisy,
            frame_index=self.frame_index[start : start + noisy],
        )


@dataclass(frozen=True)
class Rows8:
    """Activations as 8-bit rows, in place of a tensor B L E where a product takes them. row = values * scale.

    A layer that takes them says so in an attribute `rows_dtype`, the 8-bit type that it wants; others get tensors.
    """

    LARGEST: ClassVar[Mapping[torch.dtype, float]] = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
    """The 8-bit types and their largest number, which the largest value of a row becomes."""
    FAINTEST: ClassVar[float] = 2.0**-100
    """A row whose values are all below this, such as one of zeros, is scaled as if this were its largest."""

    values: Tensor
    """B L E, float8_e4m3fn or int8."""
    scale: Tensor
    """B L 1, float32; NaN for a row that held one."""
    dtype: torch.dtype
    """Precision of the product's result."""

    def dequantized(self) -> Tensor:
        """B L E in `dtype`, for whoever cannot multiply 8-bit rows."""
        return (self.values.float() * self.scale).to(self.dtype)


Attend = Callable[[Tensor, Tensor, Tensor, BlockContext], Tensor]
"""(q, k, v: B L N D, context) -> B L N D, without a mask.

It may be called with the queries of some of the tokens; keys, values and context are those of all at hand. What is
to be made of keys and values once for many slices of queries is a `PreparedAttend`.
"""
AttendQueries = Callable[[Tensor, int], Tensor]
"""(q: B L N D, the number of its first token, which is a multiple of `geometry.TILE`) -> B L N D, what these queries
find in keys and values that are known."""


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of all tokens at hand, each B L N D, made when they are asked for: whoever turns them into
    something smaller is the only one to hold them. Each is asked for once, by itself or with the other."""

    keys: Callable[[], Tensor]
    values: Callable[[], Tensor]
    both: Callable[[], tuple[Tensor, Tensor]]
    """Faster than one after the other."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "KeysValues":
        return cls(lambda: k, lambda: v, lambda: (k, v))


@dataclass(frozen=True)
class PreparedAttend:
    """An `Attend` that makes something of keys and values first, such as 8-bit tiles, and can do so just once for
    many slices of queries."""

    prepare: Callable[[KeysValues, BlockContext], AttendQueries]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        return self.prepare(KeysValues.of(k, v), context)(q, 0)


def with_keys(attend: Attend, made: KeysValues, context: BlockContext) -> AttendQueries:
    """`attend` for queries that come slice by slice."""
    if isinstance(attend, PreparedAttend):
        return attend.prepare(made, context)
    k, v = made.both()
    return lambda q, start: attend(q, k, v, context)


RunStack = Callable[[nn.Module, Tensor, BlockContext], Tensor]
"""(the stack of blocks, tokens: B L E, context) -> B L E. It is told the stack, and holds no network of its own, so
that a copy of a model does not run the original's blocks.

Outside of training it may write its result over the tokens it was given, and a block likewise: who needs them
afterwards, such as a cache of differences, takes a copy first.
"""
Denoiser = Callable[[Tensor, float], Tensor]
"""(latents: B C F h w, timestep in 0..1000) -> velocity of the same shape."""

Technique = Callable[[Any], AbstractContextManager[None]]
"""model -> context. Within, the model runs with the technique; afterwards it is as it was, whatever has happened.

What it closes over is no model: made once for a plan, it serves every clip and every model of that plan.
"""


@contextmanager
def replaced(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within, attributes have other values; afterwards those of before. The only way in which techniques set things.

    Args:
        changes: (owner, name, value) of attributes that exist, in order.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in changes:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
