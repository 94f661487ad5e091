"""One transformer block: self-attention, cross-attention to the text, feed-forward; two of the three are modulated."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import UNWEIGHTED, S2VModelConfig
from ..seams import BlockContext
from .attention import CrossAttention, SelfAttention
from .experts import Gate, ProbeGate, RoutedFeedForward
from .pointwise import Activations, Pointwise


class FeedForward(nn.Module):
    """Two products with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int, has_bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=has_bias)
        self.pointwise = Pointwise()

    def forward(self, x: Activations) -> Tensor:  # B L E
        return self.down(self.pointwise.activated(self.up, x))


def make_feed_forward(config: S2VModelConfig) -> FeedForward | RoutedFeedForward:
    """A block's feed-forward: one, or experts of which a gate chooses some for each token."""
    width, hidden, count = config.width, config.feed_forward_width, config.num_experts
    if not count:
        return FeedForward(width, hidden)
    are_parts = config.gate_over == UNWEIGHTED
    experts = [FeedForward(width, hidden, has_bias=not are_parts) for _ in range(count)]
    gate = ProbeGate(width, count, config.gate_probes) if config.gate_probes else Gate(width, count)
    return RoutedFeedForward(experts, gate, config.top_k, config.gate_over, torch.zeros(width) if are_parts else None)


class BlockRows(NamedTuple):
    """The modulation of one block, six of B S E in float32."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    forward_shift: Tensor
    forward_scale: Tensor
    forward_gate: Tensor


RunBlock = Callable[["Block", Tensor, BlockContext], Tensor]
"""(block, x: B L E, context) -> B L E; outside of training it may write its result over x."""


class Block(nn.Module):
    """One block of the DiT. `feed_forward` is the seam for routed experts, `run` that for activations in slices.

    Source: Wan2.2 model_s2v.py at 42bf4cf (Apache-2.0). Differs: a feed-forward may have experts.
    """

    def __init__(self, config: S2VModelConfig):
        super().__init__()
        self.eps = config.eps
        self.attention = SelfAttention(config.width, config.heads, config.eps)
        self.cross_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.cross_attention = CrossAttention(config.width, config.heads, config.eps)
        self.feed_forward = make_feed_forward(config)
        self.modulation = nn.Parameter(torch.randn(1, 6, config.width) / config.width**0.5)
        self.pointwise = Pointwise()
        self.run: RunBlock = run_whole

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:  # B L E, float32
        return self.run(self, x, context)

    def rows(self, context: BlockContext) -> BlockRows:
        return BlockRows(*(self.modulation[:, None] + context.modulation).unbind(2))

    def normed(self, x: Tensor, rows: BlockRows, context: BlockContext) -> Activations:
        """What self-attention reads. B L E of any tokens, and `context` for them, here and below."""
        return self.pointwise.modulated_norm(x, rows.shift, rows.scale, self.eps, context)

    def hear(
        self,
        x: Tensor,
        attend: Callable[[Tensor], Tensor],
        text: tuple[Tensor, Tensor],
        rows: BlockRows,
        context: BlockContext,
    ) -> tuple[Tensor, Activations]:
        """Add what self-attention and cross-attention give.

        Args:
            x: B L E.
            attend: x -> what self-attention gives for these tokens, B L E; a function, so that nobody holds it longer
                than needed.
            text: keys and values of the text, for `cross_attention`.
        Returns:
            The new stream, and what the feed-forward reads.
        """
        step = self.pointwise
        x, normed = step.gated_add_norm(x, attend(x), rows.gate, self.cross_norm, context)
        heard = self.cross_attention(normed, text, step)
        return step.add_modulated_norm(x, heard, rows.forward_shift, rows.forward_scale, self.eps, context)

    def feed(self, x: Tensor, normed: Activations, rows: BlockRows, context: BlockContext) -> Tensor:
        """Add what the feed-forward makes of `normed`."""
        return self.pointwise.gated_add(x, self.feed_forward(normed), rows.forward_gate, context)


def run_whole(block: Block, x: Tensor, context: BlockContext) -> Tensor:
    """The plain way at `Block.run`: all tokens at once."""
    rows = block.rows(context)

    def attend(x: Tensor) -> Tensor:
        return block.attention(block.normed(x, rows, context), context, block.pointwise)

    x, normed = block.hear(x, attend, block.cross_attention.keys_values(context.text), rows, context)
    return block.feed(x, normed, rows, context)
