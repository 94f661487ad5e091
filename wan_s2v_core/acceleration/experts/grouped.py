"""The products of all experts at once, instead of one expert after the other: fewer and larger kernels."""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.block import FeedForward
from ...model.experts import Round, RoutedFeedForward, add_share, apply_each
from ...private_torch import HAS_GROUPED_PRODUCT, grouped_product, has_hooks

log = logging.getLogger(__name__)

Multiply = Callable[[Tensor, Tensor, list[int]], Tensor]
"""(rows: R I, sorted by expert; weights: X O I; how many rows each expert has) -> R O."""
HOPPER = (9, 0)
LARGE_SHARE = 512
"""Tokens of one expert beyond which grouping does not pay: what it saves is kernel launches, and it holds the
activations of all experts at once. On an H200 (benchmarks/README.md) it takes 0.6 to 0.7 of the loop's time with 256
tokens and 0.98 to 1.10 of it with 1,024; this lies between the two."""


def multiply_grouped(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """One kernel for all experts (CUTLASS grouped GEMM)."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return grouped_product(rows, weights, ends.to(rows.device, non_blocking=True))


def multiply_padded(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """A batched product in which every expert has as many rows as the busiest, for cards without the kernel."""
    padded = nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True)  # X R E
    out = torch.bmm(padded, weights.transpose(1, 2))
    return torch.cat([part[:count] for part, count in zip(out, counts, strict=True)])


def has_grouped_kernel(x: Tensor) -> bool:
    """Whether torch multiplies groups of such tokens in one kernel."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and HAS_GROUPED_PRODUCT):
        return False
    return torch.cuda.get_device_capability(x.device) >= HOPPER and x.shape[1] % 8 == 0


def are_plain(experts: Sequence[nn.Module]) -> bool:
    """Whether experts are two ordinary products each: 8-bit weights and low-rank additions have their own forward."""
    if not all(type(expert) is FeedForward for expert in experts):
        return False
    linears = [linear for expert in experts for linear in (expert.up, expert.down)]
    return all(type(one) is nn.Linear and not has_hooks(one) for one in linears)


def apply_grouped(
    x: Tensor, experts: Sequence[nn.Module], rounds: list[Round], multiply: Multiply | None = None
) -> Tensor:
    """All experts of a round together; one after the other where that is not possible, or one has a large share.

    For `apply_experts`. The weights of a layer's experts are put together once per call, a copy that is freed at its
    end and that a short last round alone is not worth: one large share decides for all rounds.
    """
    largest = max((len(share.tokens) for shares in rounds for share in shares), default=0)
    if largest > LARGE_SHARE or not (are_plain(experts) and (multiply or x.is_cuda)):
        return apply_each(x, experts, rounds)
    multiply = multiply or (multiply_grouped if has_grouped_kernel(x) else multiply_padded)
    up, down = (torch.stack([getattr(expert, name).weight for expert in experts]) for name in ("up", "down"))
    out = torch.zeros_like(x, dtype=torch.float32)
    for shares in rounds:
        counts = [0] * len(experts)
        for share in shares:
            counts[share.expert] = len(share.tokens)
        rows = x[torch.cat([share.tokens for share in shares])]
        hidden = add_biases(multiply(rows, up, counts), [expert.up.bias for expert in experts], counts)
        hidden = F.gelu(hidden, approximate="tanh")
        rows = multiply(hidden, down, counts)
        rows = add_biases(rows, [expert.down.bias for expert in experts], counts).split(counts)
        for share in shares:
            add_share(out, share, rows[share.expert])
    return out


def add_biases(rows: Tensor, biases: list[Tensor | None], counts: list[int]) -> Tensor:
    """To the rows of each expert its bias, in place; experts without one stay as they are."""
    for part, bias in zip(rows.split(counts), biases, strict=True):
        if bias is not None:
            part += bias
    return rows


def group_products(model: nn.Module) -> None:
    """Let every routed feed-forward of a model multiply its experts together where the device can."""
    layers = [module for module in model.modules() if isinstance(module, RoutedFeedForward)]
    for layer in layers:
        layer.apply_experts = apply_grouped
    log.info("experts: the products of %d layers are grouped on a card", len(layers))
