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
    next_shift: Tensor
    """This and the next two: of the feed-forward."""
    next_scale: Tensor
    next_gate: Tensor


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
        self.run: RunBlock = Block.whole

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:  # B L E, float32
        return self.run(self, x, context)

    def whole(self, x: Tensor, context: BlockContext) -> Tensor:
        """The plain way: all tokens at once. What a sublayer gives has no name here that would hold it too long."""
        ops, rows = self.pointwise, self.rows(context)
        normed = ops.modulated_norm(x, rows.shift, rows.scale, self.eps, context)
        x, normed = ops.gated_add_norm(x, self.attention(normed, context, ops), rows.gate, self.cross_norm, context)
        x, normed = ops.add_modulated_norm(
            x,
            self.cross_attention(normed, self.text(context), ops),
            rows.next_shift,
            rows.next_scale,
            self.eps,
            context,
        )
        return ops.gated_add(x, self.feed_forward(normed), rows.next_gate, context)

    def rows(self, context: BlockContext) -> BlockRows:
        return BlockRows(*(self.modulation[:, None] + context.modulation).unbind(2))

    def text(self, context: BlockContext) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, for `cross_attention`."""
        return self.cross_attention.keys_values(context.text, context.memory.text)
