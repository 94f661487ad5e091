"""One transformer block: self-attention, cross-attention to the text, feed-forward; two of the three are modulated."""

import torch
from torch import Tensor, nn

from ..config import S2VModelConfig
from ..seams import BlockContext
from .attention import CrossAttention, SelfAttention
from .experts import Gate, RoutedFeedForward
from .pointwise import Activations, Pointwise


class FeedForward(nn.Module):
    """Two products with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.pointwise = Pointwise()

    def forward(self, x: Activations) -> Tensor:  # B L E
        return self.down(self.pointwise.activated(self.up, x))


def make_feed_forward(config: S2VModelConfig) -> FeedForward | RoutedFeedForward:
    """A block's feed-forward: one, or experts of which a gate chooses some for each token."""
    if not config.num_experts:
        return FeedForward(config.width, config.feed_forward_width)
    experts = [FeedForward(config.width, config.feed_forward_width) for _ in range(config.num_experts)]
    return RoutedFeedForward(experts, Gate(config.width, config.num_experts), config.top_k, config.gate_over)


class Block(nn.Module):
    """One block of the DiT. `feed_forward` is the seam for routed experts and sliced activations.

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

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:  # B L E, float32
        step = self.pointwise
        rows = (self.modulation[:, None] + context.modulation).unbind(2)  # six of B S E
        shift, scale, gate, forward_shift, forward_scale, forward_gate = rows
        normed = step.modulated_norm(x, shift, scale, self.eps, context)
        x, normed = step.gated_add_norm(x, self.attention(normed, context, step), gate, self.cross_norm, context)
        heard = self.cross_attention(normed, context.text, step)
        x, normed = step.add_modulated_norm(x, heard, forward_shift, forward_scale, self.eps, context)
        del heard  # a tenth of what a forward holds at its peak
        return step.gated_add(x, self.feed_forward(normed), forward_gate, context)
