"""The memory-bound steps between the products of the DiT, as they are: plain, one thing after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..seams import BlockContext, Rows8
from .rope import rotate

Activations = Tensor | Rows8
"""What enters a product: a tensor in the compute precision, or its rows in 8 bits where the product takes them."""


class Pointwise:
    """The memory-bound steps between the products, one method each. The seam for fused kernels.

    The stream of tokens is float32; what enters a product is in the compute precision. Shifts, scales and gates
    have two rows, one for noisy tokens and one for the others. The others are few: doing all tokens with the first
    row and then these again costs less than putting two parts together.

    Every module that has such steps holds one of these as `pointwise`. The plain ones never write into what they are
    given. Others may, outside of training, and as one pass over memory: into the stream `x` of the steps that add to
    it, and into the product whose result a step takes.
    """

    rotate = staticmethod(rotate)

    def modulated_norm(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, context: BlockContext) -> Activations:
        """LayerNorm(x) * (1 + scale) + shift. x: B L E; shift, scale: B S E -> B L E in the compute precision."""
        out = norm_rows(x, shift[:, 0], scale[:, 0], eps).to(context.dtype)
        context.segments(out)[1].copy_(norm_rows(context.segments(x)[1], shift[:, 1], scale[:, 1], eps))
        return out

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor, context: BlockContext) -> Tensor:
        """x + gate * y. x, y: B L E; gate: B S E -> B L E in float32."""
        out = torch.addcmul(x, y, gate[:, :1])
        context.segments(out)[1].copy_(torch.addcmul(context.segments(x)[1], context.segments(y)[1], gate[:, 1:]))
        return out

    def gated_add_norm(
        self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm, context: BlockContext
    ) -> tuple[Tensor, Activations]:
        """x + gate * y, the new stream; and `norm` of it in the compute precision."""
        x = self.gated_add(x, y, gate, context)
        return x, norm(x).to(context.dtype)

    def add_modulated_norm(
        self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, context: BlockContext
    ) -> tuple[Tensor, Activations]:
        """x + y, the new stream; and its `modulated_norm`."""
        x = x + y
        return x, self.modulated_norm(x, shift, scale, eps, context)

    def heads_of(self, x: Tensor, norm: nn.RMSNorm, heads: int, rope: Tensor | None = None) -> Tensor:
        """Queries or keys: `norm` over the whole width, then each head turned by `rope`, L D/2 2. B L E -> B L N D."""
        x = norm(x).unflatten(-1, (heads, -1))
        return x if rope is None else self.rotate(x, rope)

    def activated(self, linear: nn.Module, x: Activations) -> Activations:
        """tanh-GELU of linear(x)."""
        return F.gelu(linear(x), approximate="tanh")

    def frame_norm(
        self, x: Tensor, shift: Tensor | None, gain: Tensor | None, eps: float, context: BlockContext
    ) -> Activations:
        """LayerNorm of the noisy tokens, times the gain of their latent frame, plus its shift.

        Args:
            x: B L E, all tokens.
            shift, gain: B F E in float32, or None for neither.
        Returns:
            B L(noisy) E in the compute precision.
        """
        noisy, _ = context.segments(x)
        normed = F.layer_norm(noisy, noisy.shape[-1:], eps=eps)
        if gain is not None:
            normed = torch.addcmul(shift[:, context.frame_index], normed, gain[:, context.frame_index])
        return normed.to(context.dtype)

    def add_to_noisy(self, x: Tensor, y: Tensor, context: BlockContext) -> Tensor:
        """x with y added to its noisy tokens. B L E, B L(noisy) E -> B L E in float32."""
        noisy, rest = context.segments(x)
        return torch.cat([noisy + y, rest], dim=1)


def norm_rows(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift as the norm's own weight and bias. x: B L E; shift, scale: B E -> B L E."""
    rows = [F.layer_norm(t, t.shape[-1:], 1 + a, b, eps) for t, a, b in zip(x.split(1), scale, shift, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
