"""A trained dense feed-forward split into experts: groups of its hidden neurons, and a gate that is computed.

A feed-forward is a sum over hidden neurons, so any partition of them gives experts whose plain sum is the dense layer.
Groups: neurons with similar input weights, balanced, after MoEfication (arXiv 2110.01786). Gate: the size of what a
group would add, predicted from a few of its neurons (`model.experts.ProbeGate`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..acceleration.quantization import Linear8
from ..config import UNWEIGHTED, S2VModelConfig
from ..errors import ConfigError
from ..model.block import FeedForward
from ..model.dit import S2VTransformer
from ..model.experts import ProbeGate, RoutedFeedForward, probe_features
from ..seams import Rows8

PROBES = 32
"""Neurons of a group that its gate looks at, at most; 8 groups of the 14B model: 2 % of the feed-forward's work."""
SAMPLED_TOKENS = 4096
"""Of each layer, for the fit of its gate: many more than a gate has numbers to fit (257 for 8 groups). Of all layers of
the 14B model 1.7 GB."""
HELD_OUT = 4
"""One in so many calibration tokens is kept for measuring the error."""
CLUSTER_ROUNDS = 10
RIDGE = 1e-4


@dataclass(frozen=True)
class LayerSplit:
    """How one feed-forward is split: no weights, only which neurons go where, and the gate."""

    groups: Tensor
    """X H: numbers of the hidden neurons of each expert."""
    probes: Tensor
    """X R: numbers of the neurons of each that the gate looks at."""
    readout: Tensor
    """X XR: from the probes of all groups to what each group is expected to add; float32."""
    offset: Tensor
    """X."""
    errors: Tensor
    """X: relative L2 error of the layer's output with top_k = 1, 2, ..., on tokens held out; NaN: not measured."""


@dataclass(frozen=True)
class ExpertSplit:
    """How all feed-forwards of a model are split."""

    layers: tuple[LayerSplit, ...]

    @property
    def num_experts(self) -> int:
        return len(self.layers[0].groups)

    def top_k_errors(self) -> list[tuple[int, float, float]]:
        """Each top_k with its relative error, that of the median layer and of the worst; empty if not measured."""
        errors = torch.stack([layer.errors for layer in self.layers])
        if errors.isnan().any():
            return []
        columns = (errors.quantile(0.5, dim=0).tolist(), errors.amax(dim=0).tolist())
        return list(zip(range(1, self.num_experts + 1), *columns, strict=True))

    def __str__(self) -> str:
        """The measured error of each top_k as a table, in percent."""
        if not (errors := self.top_k_errors()):
            return "the error of fewer experts was not measured: split with calibration tokens"
        lines = [f"top_k  median   worst  (error of a feed-forward's output, {len(self.layers)} layers)"]
        lines += [f"{top_k:>5}  {100 * median:>5.1f}%  {100 * worst:>5.1f}%" for top_k, median, worst in errors]
        return "\n".join(lines)


# --- groups ------------------------------------------------------------------------------------------------------


def assign_balanced(likeness: Tensor, size: int) -> Tensor:
    """Put every row into a column it likes, `size` rows in each. R X -> R, column numbers.

    Stable matching: rows ask for the best column that has not refused them, full columns keep the most alike. It
    ends, since every round refuses at least one more.
    """
    open_to = likeness.clone()
    while True:
        wanted = open_to.argmax(dim=1)
        crowded = (wanted.bincount(minlength=likeness.shape[1]) > size).nonzero().flatten().tolist()
        if not crowded:
            return wanted
        for column in crowded:
            asking = (wanted == column).nonzero().flatten()
            order = likeness[asking, column].argsort(descending=True, stable=True)
            open_to[asking[order[size:]], column] = -torch.inf


def cluster_neurons(weights: Tensor, groups: int) -> Tensor:
    """Neurons in equal groups by the direction of their input weights (balanced k-means). H E -> X H/X, rising."""
    rows = F.normalize(weights.float(), dim=1)
    size = len(rows) // groups
    centers = spread_rows(rows, groups)
    assigned = None
    for _ in range(CLUSTER_ROUNDS):
        before, assigned = assigned, assign_balanced(rows @ centers.T, size)
        if before is not None and torch.equal(before, assigned):
            break
        sums = torch.zeros_like(centers).index_add_(0, assigned, rows)
        centers = F.normalize(sums, dim=1)
    return assigned.argsort(stable=True).unflatten(0, (groups, size))


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """Rows that are far apart, to begin with: each is the one least like those before it."""
    picked = [0]
    nearest = rows @ rows[0]
    while len(picked) < count:
        picked.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[picked[-1]])
    return rows[picked]


# --- the gate ----------------------------------------------------------------------------------------------------


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a product in float32, whichever way it is stored."""
    if isinstance(linear, Linear8):
        return linear.dequantized(torch.float32)
    return linear.weight.detach().float()


def split_layer(
    layer: FeedForward,
    num_experts: int,
    samples: Tensor | None = None,
    device: torch.device | str | None = None,
) -> LayerSplit:
    """Find the groups of one feed-forward and a gate for them.

    Without samples the gate adds up its probes, each weighted by its output weights; with samples it is a least
    squares fit to the size of what each group really adds, and the error of every top_k is measured.

    Args:
        samples: L E, tokens that came to this layer.
        device: where to compute; where the layer is if None.
    """
    device = device or layer.up.weight.device
    up, down = dense_weight(layer.up).to(device), dense_weight(layer.down).to(device)
    check_split(len(up), num_experts)
    bias = layer.up.bias.detach().float().to(device)
    strength = up.norm(dim=1) * down.norm(dim=0)
    if samples is not None:
        samples = samples.to(device).float()
        strength = probe_features(F.linear(samples, up, bias)).mean(dim=0) * down.norm(dim=0)
    groups = cluster_neurons(up, num_experts)  # X H
    probes = groups.gather(1, strength[groups].topk(min(PROBES, groups.shape[1]), dim=1).indices)
    own = torch.eye(len(groups), device=device).repeat_interleave(probes.shape[1], dim=1)  # which probe is whose
    readout, offset = own * down.norm(dim=0)[probes.flatten()], own.new_zeros(len(groups))
    errors = torch.full((num_experts,), torch.nan)
    if samples is not None:
        parts = [F.gelu(F.linear(samples, up[g], bias[g]), approximate="tanh") @ down[:, g].T for g in groups]
        seen = probe_features(F.linear(samples, up[probes.flatten()], bias[probes.flatten()]))
        sizes = torch.stack([part.norm(dim=1) for part in parts], dim=1)  # L X
        held_out = torch.arange(len(samples), device=device) % HELD_OUT == 0
        readout, offset = fit(seen[~held_out], sizes[~held_out])
        scores = F.linear(seen[held_out], readout, offset)
        errors = routing_errors(torch.stack([part[held_out] for part in parts], dim=1), scores)
    return LayerSplit(groups.cpu(), probes.cpu(), readout.cpu(), offset.cpu(), errors.cpu())


def fit(seen: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression: weights X M and offsets X with which `seen` L M gives `wanted` L X."""
    seen, wanted = seen.double(), wanted.double()
    middle, target = seen.mean(dim=0), wanted.mean(dim=0)
    centered = seen - middle
    square = centered.T @ centered
    square.diagonal().add_(RIDGE * square.diagonal().mean() + 1e-12)
    weights = torch.linalg.solve(square, centered.T @ (wanted - target)).T
    return weights.float(), (target - weights @ middle).float()


def routing_errors(parts: Tensor, scores: Tensor) -> Tensor:
    """Relative L2 error of the sum over all parts when only the best top_k are taken, for each top_k.

    Args:
        parts: L X E, what each expert adds.
        scores: L X.
    Returns:
        X.
    """
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
    total, errors = parts.sum(dim=1).norm(), []
    for top_k in range(1, parts.shape[1] + 1):
        left_out = (ranks >= top_k).unsqueeze(-1)
        errors.append(float((parts * left_out).sum(dim=1).norm() / total))
    return torch.tensor(errors)


class TokenSample:
    """Some of the tokens that it is shown, all with the same chance, in bfloat16 in main memory."""

    def __init__(self, size: int, generator: torch.Generator):
        self.size, self.generator = size, generator
        self.draws = torch.empty(0)
        """L: a random number for each token that is kept; the highest of all are."""
        self.tokens: Tensor | None = None
        """L E."""

    def show(self, x: Tensor) -> None:  # ... L E
        rows, held = x.flatten(0, -2), len(self.draws)
        draws = torch.cat([self.draws, torch.rand(len(rows), generator=self.generator)])
        kept = draws.topk(min(self.size, len(draws))).indices
        stay, come = kept[kept < held], kept[kept >= held]
        taken = rows[(come - held).to(rows.device)].to("cpu", torch.bfloat16)
        self.tokens = taken if self.tokens is None else torch.cat([self.tokens[stay], taken])
        self.draws = draws[torch.cat([stay, come])]


def as_tensor(x: Tensor | Rows8) -> Tensor:
    return x.dequantized() if isinstance(x, Rows8) else x


@contextmanager
def sampled_tokens(model: S2VTransformer, size: int = SAMPLED_TOKENS, seed: int = 0) -> Iterator[list[TokenSample]]:
    """Within, a sample is taken of the tokens that come to each feed-forward, over all forwards of the model."""
    generator = torch.Generator().manual_seed(seed)
    samples = [TokenSample(size, generator) for _ in model.stack.blocks]
    hooks = [
        block.feed_forward.register_forward_pre_hook(lambda _, inputs, sample=sample: sample.show(as_tensor(inputs[0])))
        for block, sample in zip(model.stack.blocks, samples, strict=True)
    ]
    try:
        yield samples
    finally:
        for hook in hooks:
            hook.remove()


# --- the model ---------------------------------------------------------------------------------------------------


def plan_split(
    model: S2VTransformer,
    num_experts: int,
    samples: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> ExpertSplit:
    """How to split every feed-forward of a dense model; `samples` has one tensor L E per block.

    Raises:
        ConfigError: if the neurons cannot be shared out evenly, or the model has experts already.
    """
    check_dense(model.config)
    layers = []
    for index, block in enumerate(model.stack.blocks):
        tokens = None if samples is None else samples[index]
        layers.append(split_layer(block.feed_forward, num_experts, tokens, device))
    return ExpertSplit(tuple(layers))


def check_split(width: int, num_experts: int) -> None:
    """Raises ConfigError if a feed-forward of that many neurons cannot be split so."""
    if not 2 <= num_experts <= width or width % num_experts:
        usable = ", ".join(str(number) for number in range(2, min(width, 64) + 1) if width % number == 0)
        raise ConfigError(
            f"experts={num_experts} does not divide the {width} neurons of a feed-forward into equal parts. "
            f"Use one of: {usable}."
        )


def check_dense(config: S2VModelConfig) -> None:
    """Raises ConfigError if the feed-forwards have experts already."""
    if config.num_experts:
        raise ConfigError(f"this checkpoint has {config.num_experts} experts already. Split a dense one.")


def split_config(config: S2VModelConfig, split: ExpertSplit) -> S2VModelConfig:
    """Of the model with experts that a dense one of that config becomes; a token sees all of them."""
    count, size = split.layers[0].groups.shape
    probes = split.layers[0].probes.shape[1]
    parts = {"num_experts": count, "top_k": count, "gate_over": UNWEIGHTED, "gate_probes": probes}
    return replace(config, feed_forward_width=size, **parts)


def split_weights(dense: Mapping[str, Tensor], split: LayerSplit) -> dict[str, Tensor]:
    """The weights of a feed-forward as those of its experts, in their own types: any split of the right sizes gives
    the dense layer when all experts are in use.

    Args:
        dense: up.weight H E, up.bias H, down.weight E H and down.bias E, without the name of the layer.
    """
    up, bias, down = dense["up.weight"], dense["up.bias"], dense["down.weight"]
    groups, probes = (index.long().to(up.device) for index in (split.groups, split.probes.flatten()))
    made = {"bias": dense["down.bias"], "gate.weight": up[probes].float(), "gate.bias": bias[probes].float()}
    made |= {"gate.readout": split.readout.to(up.device), "gate.offset": split.offset.to(up.device)}
    for expert, neurons in enumerate(groups):
        made[f"experts.{expert}.up.weight"] = up[neurons]
        made[f"experts.{expert}.up.bias"] = bias[neurons]
        made[f"experts.{expert}.down.weight"] = down[:, neurons].contiguous()
    return made


def split_feed_forward(dense: FeedForward, split: LayerSplit) -> RoutedFeedForward:
    """One routed feed-forward with the weights of a dense one, in the same precision and on the same device."""
    width, (count, size) = dense.up.in_features, split.groups.shape
    with torch.device("meta"):
        experts = [FeedForward(width, size, has_bias=False) for _ in range(count)]
        gate = ProbeGate(width, count, split.probes.shape[1])
        routed = RoutedFeedForward(experts, gate, count, UNWEIGHTED, torch.zeros(width))
    routed.load_state_dict(split_weights(dense.state_dict(), split), assign=True)
    return routed.requires_grad_(False).train(dense.training)
