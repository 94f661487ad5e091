"""How much work the DiT is: tokens of a clip, and the floating point operations of one forward, by kind of product.

A multiplication and an addition are two operations. Steps that are no products (norms, rotation, activations) are not
counted: they are bound by memory, and below a thousandth of the rest.
"""

from dataclasses import dataclass

from ..config import UNUSED, S2VModelConfig
from ..geometry import FRAMES_PER_LATENT, PACKED_MOTION_LATENTS, PATCH, PIXELS_PER_LATENT, motion_tokens


@dataclass(frozen=True)
class ForwardShape:
    """What one forward is given. A clip without a past has no motion."""

    width_px: int
    height_px: int
    latent_frames: int = 20
    has_motion: bool = True
    motion_latents: int = PACKED_MOTION_LATENTS

    @property
    def latent_size(self) -> tuple[int, int]:
        """h and w."""
        return self.height_px // PIXELS_PER_LATENT, self.width_px // PIXELS_PER_LATENT

    @property
    def frames(self) -> int:
        return FRAMES_PER_LATENT * self.latent_frames

    def noisy_tokens(self) -> int:
        height, width = self.latent_size
        return self.latent_frames * (height // PATCH) * (width // PATCH)

    def motion_tokens(self, packs_motion: bool = True) -> int:
        return motion_tokens(*self.latent_size, self.motion_latents if self.has_motion else 0, packs_motion)

    def tokens(self, packs_motion: bool = True) -> int:
        """All tokens of a forward: noisy ones, those of the picture, and motion."""
        picture = self.noisy_tokens() // self.latent_frames
        return self.noisy_tokens() + picture + self.motion_tokens(packs_motion)


def shape_of_tokens(tokens: int, latent_frames: int = 20) -> ForwardShape:
    """A second clip of about that many tokens, 16:9, its sides multiples of 16."""
    per_frame = tokens / (latent_frames + 1 + 1.5)  # the picture, and motion: 1 + 1/4 + 1/4 frames
    side = PATCH * PIXELS_PER_LATENT
    rows = max(4, round((per_frame * 9 / 16) ** 0.5))
    return ForwardShape(side * max(4, round(per_frame / rows)), side * rows, latent_frames)


@dataclass(frozen=True)
class ForwardFlop:
    """Operations of one forward."""

    attention: float
    """Self-attention; what is left out by sparse attention is not counted."""
    cross_attention: float
    """To text, and to the voice: of each token to the voice of its own latent frame, though a kernel may compute and
    mask more."""
    square: float
    """Products of the blocks from the width to the width."""
    up: float
    down: float
    outside: float
    """Products outside of the blocks: audio injectors, embeddings, head."""
    dense_attention: float
    """Self-attention without anything left out."""

    @property
    def attentions(self) -> float:
        return self.attention + self.cross_attention

    @property
    def linears(self) -> float:
        return self.square + self.up + self.down + self.outside

    @property
    def total(self) -> float:
        return self.attentions + self.linears


def forward_flop(config: S2VModelConfig, shape: ForwardShape, kept: float = 1.0) -> ForwardFlop:
    """Operations of one forward with a driving video, what is embedded once per clip (`condition`) left out.

    Args:
        kept: the share of self-attention that is computed, over all blocks.
    """
    e, hidden, blocks = config.width, config.feed_forward_width, config.blocks
    tokens, noisy, text = shape.tokens(config.packs_motion), shape.noisy_tokens(), config.text_tokens
    voice = shape.latent_frames * (config.audio_tokens + 1)
    injectors = sum(block != UNUSED for block in config.injected_blocks)
    experts = config.top_k if config.num_experts else 1

    injected = noisy * 4 * e * e + voice * 4 * e * e
    if config.modulates_audio:
        injected += shape.latent_frames * 4 * e * e
    patch = PATCH * PATCH * config.latent_channels
    embeddings = noisy * 2 * patch * e + noisy * 2 * e * patch  # in, and the head out
    embeddings += noisy * 2 * PATCH * PATCH * config.pose_channels * e
    embeddings += 2 * (2 * config.time_width * e + 2 * e * e + 2 * e * 6 * e)  # two moments: noisy and still tokens
    gates = blocks * tokens * 2 * e * config.num_experts * max(1, config.gate_probes)
    dense = blocks * 4 * tokens**2 * e
    return ForwardFlop(
        attention=kept * dense,
        cross_attention=blocks * 4 * tokens * text * e + injectors * 4 * noisy * (config.audio_tokens + 1) * e,
        square=blocks * (tokens * 12 * e * e + text * 4 * e * e),
        up=blocks * tokens * experts * 2 * e * hidden,
        down=blocks * tokens * experts * 2 * e * hidden,
        outside=injectors * injected + embeddings + gates,
        dense_attention=dense,
    )


def masked_flop(config: S2VModelConfig, shape: ForwardShape) -> float:
    """What the injectors compute and mask besides: the tokens of a frame against the voice of all other frames."""
    injectors = sum(block != UNUSED for block in config.injected_blocks)
    other_frames = (shape.latent_frames - 1) * (config.audio_tokens + 1)
    return injectors * 4 * shape.noisy_tokens() * other_frames * config.width
