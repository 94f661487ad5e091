"""The places where speed is attached from outside, as types, and what travels through them.

Shape letters used everywhere: `B` batch, `C` channels, `T` video frames, `F` latent frames, `H W` pixels,
`h w` latent size, `L` tokens, `N` heads, `D` head size, `E` model width, `A` audio layers, `S` segments (2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockContext:
    """What every block needs besides the tokens. It is shared out with the tokens when a sequence is split.

    The tokens at hand are `noisy_tokens` noisy ones followed by reference and motion tokens, in that order.
    """

    rope: Tensor
    """L D/2, complex64: one rotation per token and pair of channels."""
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
    """Which guidance branch this is, for caches that must keep the branches apart."""

    def segments(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy tokens, and the rest. B L ... -> two views."""
        return tokens[:, : self.noisy_tokens], tokens[:, self.noisy_tokens :]


Attend = Callable[[Tensor, Tensor, Tensor, BlockContext], Tensor]
"""(q, k, v: B L N D, context) -> B L N D, without a mask."""
Stack = Callable[[Tensor, BlockContext], Tensor]
"""(tokens: B L E, context) -> B L E."""
Denoiser = Callable[[Tensor, float], Tensor]
"""(latents: B C F h w, timestep in 0..1000) -> velocity of the same shape."""
