"""One transformer block: self-attention, cross-attention to the text, feed-forward; two of the three are modulated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import S2VModelConfig
from ..seams import BlockContext
from .attention import CrossAttention, SelfAttention
from .experts import Gate, RoutedFeedForward
from .rope import rotate


class Pointwise:
    """The memory-bound steps between the products, one at a time. The seam for fused kernels.

    The stream of tokens is float32; what enters a product is in the compute precision. Shifts, scales and gates
    have two rows, one for noisy tokens and one for the others. The others are few: doing all tokens with the first
    row and then these again costs less than putting two parts together.
    """

    rotate = staticmethod(rotate)

    @staticmethod
    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, context: BlockContext) -> Tensor:
        """LayerNorm(x) * (1 + scale) + shift. x: B L E; shift, scale: B S E -> B L E in the compute precision."""
        out = norm_rows(x, shift[:, 0], scale[:, 0], eps).to(context.dtype)
        context.segments(out)[1].copy_(norm_rows(context.segments(x)[1], shift[:, 1], scale[:, 1], eps))
        return out

    @staticmethod
    def gated_add(x: Tensor, y: Tensor, gate: Tensor, context: BlockContext) -> Tensor:
        """x + gate * y. x, y: B L E; gate: B S E -> B L E in float32."""
        out = torch.addcmul(x, y, gate[:, :1])
        context.segments(out)[1].copy_(torch.addcmul(context.segments(x)[1], context.segments(y)[1], gate[:, 1:]))
        return out


def norm_rows(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift as the norm's own weight and bias. x: B L E; shift, scale: B E -> B L E."""
    rows = [F.layer_norm(t, t.shape[-1:], 1 + a, b, eps) for t, a, b in zip(x.split(1), scale, shift, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class FeedForward(nn.Module):
    """Two products with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # B L E
        return self.down(F.gelu(self.up(x), approximate="tanh"))


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
        x = step.gated_add(x, self.attention(normed, context, step.rotate), gate, context)
        x = x + self.cross_attention(self.cross_norm(x).to(context.dtype), context.text)
        normed = step.modulated_norm(x, forward_shift, forward_scale, self.eps, context)
        return step.gated_add(x, self.feed_forward(normed), forward_gate, context)
