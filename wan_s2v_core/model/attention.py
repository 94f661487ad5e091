"""Self-attention over all tokens and cross-attention to text or audio tokens."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..seams import Attend, BlockContext
from .rope import rotate

EXACT_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Fastest first on a Hopper card (benchmarks/); all of them compute exact attention."""


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Exact attention. B L N D -> B L N D; `mask`: L(q) L(k), true where a query sees a key."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # Flash attention takes no mask; the memory-efficient kernel takes one of any width.
    backends = EXACT_BACKENDS if mask is None else EXACT_BACKENDS[2:]
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
    """The plain attention at the `attend` seam: torch's own, exact."""
    return scaled_dot_product(q, k, v)


class Attention(nn.Module):
    """What both kinds of attention have: four products, and norms over the whole width of queries and keys."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)


class SelfAttention(Attention):
    """Self-attention over all tokens. `attend` is the seam: replace the callable, not this class."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__(width, heads, eps)
        self.attend: Attend = sdpa

    def forward(self, x: Tensor, context: BlockContext, turn=rotate) -> Tensor:  # x: B L E
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))  # B L N D
        return self.out(self.attend(turn(q, context.rope), turn(k, context.rope), v, context).flatten(2))


class CrossAttention(Attention):
    """Attention of the tokens to a few others. `keys_values` is a seam: they depend on no timestep."""

    def keys_values(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """B L E -> two of B L N D."""
        k, v = self.norm_k(self.k(others)), self.v(others)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, others: Tensor, mask: Tensor | None = None) -> Tensor:
        """B L E, B L(others) E -> B L E; `mask`: L L(others), true where a token sees another."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        return self.out(scaled_dot_product(q, *self.keys_values(others), mask).flatten(2))
