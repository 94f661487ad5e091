"""Self-attention over all tokens and cross-attention to text or audio tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..seams import Attend, BlockContext
from .pointwise import Activations, Pointwise

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

    def forward(self, x: Activations, context: BlockContext, ops: Pointwise) -> Tensor:  # B L E
        # Nothing here holds queries, keys and values any longer than the attention itself needs them.
        return self.out(self.attended(x, context, ops).flatten(2))

    def attended(self, x: Activations, context: BlockContext, ops: Pointwise) -> Tensor:
        """B L E -> B L N D."""
        return self.attend(self.queries(x, context, ops), *self.keys_values(x, context, ops), context)

    def queries(self, x: Activations, context: BlockContext, ops: Pointwise) -> Tensor:
        """B L E -> B L N D."""
        return ops.heads_of(self.q(x), self.norm_q, self.heads, context.rope)

    def keys_values(self, x: Activations, context: BlockContext, ops: Pointwise) -> tuple[Tensor, Tensor]:
        """B L E -> two of B L N D."""
        return self.keys(x, context, ops), self.values(x)

    def keys(self, x: Activations, context: BlockContext, ops: Pointwise) -> Tensor:
        """B L E -> B L N D."""
        return ops.heads_of(self.k(x), self.norm_k, self.heads, context.rope)

    def values(self, x: Activations) -> Tensor:
        """B L E -> B L N D."""
        return self.v(x).unflatten(-1, (self.heads, -1))


Recall = Callable[["CrossAttention", Tensor, dict[Any, Any]], tuple[Tensor, Tensor]]
"""(attention, others: B ... E, what its layer remembers of them) -> keys and values, two of B ... N D."""


def compute_anew(attention: "CrossAttention", others: Tensor, memory: dict[Any, Any]) -> tuple[Tensor, Tensor]:
    """The plain way at `CrossAttention.recall`: nothing is remembered."""
    return attention.project(others)


class CrossAttention(Attention):
    """Attention of the tokens to a few others. `recall` is a seam: their keys and values depend on no timestep."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__(width, heads, eps)
        self.recall: Recall = compute_anew

    def keys_values(self, others: Tensor, memory: dict[Any, Any]) -> tuple[Tensor, Tensor]:
        """B ... E -> two of B ... N D. `memory`: of the layer and of these others alone."""
        return self.recall(self, others, memory)

    def project(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """B ... E -> two of B ... N D."""
        k, v = self.norm_k(self.k(others)), self.v(others)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(
        self, x: Activations, keys_values: tuple[Tensor, Tensor], ops: Pointwise, seen: Tensor | None = None
    ) -> Tensor:
        """What the tokens hear of the others.

        Args:
            x: B L E.
            keys_values: of the others, each B L(others) N D, which every token sees, or B G L(others) N D, groups.
            seen: L, the group that each token sees. None where the tokens are as many equal runs as there are groups,
                in order: each run then sees its own.
        Returns:
            B L E.
        """
        return self.out(self.mix(ops.heads_of(self.q(x), self.norm_q, self.heads), *keys_values, seen).flatten(2))

    @staticmethod
    def mix(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """q: B L N D; k, v: B L(others) N D or B G L(others) N D -> B L N D."""
        if k.dim() == 4:
            return scaled_dot_product(q, k, v)
        groups, size = k.shape[1:3]
        if seen is None:
            runs = q.unflatten(1, (groups, -1)).flatten(0, 1)  # BG L/G N D
            k, v = (t.expand(len(q), -1, -1, -1, -1).flatten(0, 1) for t in (k, v))
            return scaled_dot_product(runs, k, v).unflatten(0, (-1, groups)).flatten(1, 2)
        group_of_key = torch.arange(groups, device=q.device).repeat_interleave(size)
        return scaled_dot_product(q, k.flatten(1, 2), v.flatten(1, 2), seen[:, None] == group_of_key)
