"""What makes training the tiny DiT fast, attached at the seams of the engine: it computes what it did before."""

from dataclasses import replace
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.pointwise import Pointwise
from wan_s2v_core.seams import BlockContext


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).to(x.dtype)


def of_segment(rows: Tensor, tokens: int, noisy: int) -> Tensor:
    """B S E -> B L E: the first row for noisy tokens, the second for the others."""
    is_noisy = torch.arange(tokens, device=rows.device) < noisy
    return torch.where(is_noisy[:, None], rows[:, :1], rows[:, 1:])


def norm_moved(x: Tensor, shift: Tensor, scale: Tensor, eps: float, noisy: int, dtype: torch.dtype) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    moved = normed * (1 + of_segment(scale, x.shape[1], noisy)) + of_segment(shift, x.shape[1], noisy)
    return moved.to(dtype)


def added(x: Tensor, y: Tensor, gate: Tensor, noisy: int) -> Tensor:
    return x + y.float() * of_segment(gate, x.shape[1], noisy)


def root_mean_square_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def gelu_weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """L XI, L X -> L XI: what expert x has made counts as much as the gate says."""
    made = F.gelu(hidden.float(), approximate="tanh").unflatten(-1, (weights.shape[-1], -1))
    return (made * weights[..., None]).flatten(-2).to(hidden.dtype)


class BatchedPointwise(Pointwise):
    """At the seam `block.pointwise`, for batches: equal to the plain one."""

    @staticmethod
    def rotate(x: Tensor, rope: Tensor) -> Tensor:
        return turned(x, *(part.contiguous()[:, None] for part in rope.unbind(-1)))

    @staticmethod
    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, context: BlockContext) -> Tensor:
        return norm_moved(x, shift, scale, eps, context.noisy_tokens, context.dtype)

    @staticmethod
    def gated_add(x: Tensor, y: Tensor, gate: Tensor, context: BlockContext) -> Tensor:
        return added(x, y, gate, context.noisy_tokens)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
    """At the seam `attend`: torch chooses the kernel; its backward has other preferences than the forward."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def all_experts(layer: nn.Module, x: Tensor) -> Tensor:
    """A routed feed-forward as one wide one whose hidden parts are weighted by the gate: the same sum, no sorting."""
    tokens = x.flatten(0, -2)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(tokens.float(), layer.gate.weight)
    taken, weights = layer.choose(logits)
    weights = weights * taken
    up, down = [expert.up for expert in layer.experts], [expert.down for expert in layer.experts]
    hidden = F.linear(tokens, torch.cat([one.weight for one in up]), torch.cat([one.bias for one in up]))
    hidden = gelu_weighted(hidden, weights)
    out = F.linear(hidden, torch.cat([one.weight for one in down], dim=1)).float()
    return (out + weights @ torch.stack([one.bias for one in down])).to(x.dtype).view_as(x)


def routed_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if hasattr(layer, "experts") and hasattr(layer, "gate")]


def prepare_training(model: S2VTransformer, gate_dropout: float) -> None:
    """Attach what makes training fast at the seams; the function that the model computes stays the same."""
    for block in model.stack.blocks:
        block.pointwise, block.attention.attend = BatchedPointwise(), plain_attention
    for layer in model.modules():
        if isinstance(layer, nn.RMSNorm):
            layer.forward = MethodType(lambda norm, x: root_mean_square_norm(x, norm.weight, norm.eps), layer)
    encode_clip = model.audio_encoder.encode_clip

    def encode_in_float32(*arguments):
        with torch.autocast(model.device.type, enabled=False):
            return encode_clip(*arguments)

    model.audio_encoder.encode_clip = encode_in_float32
    for layer in routed_layers(model):
        layer.forward = MethodType(all_experts, layer)
        if gate_dropout:
            layer.routing = replace(layer.routing, gate_dropout=gate_dropout)
