"""A trained dense feed-forward split into experts: groups of its hidden neurons, and a gate that is computed.

A feed-forward is a sum over hidden neurons, so any partition of them gives experts whose plain sum is the dense layer.
Groups: neurons with similar input weights, balanced, after MoEfication (arXiv 2110.01786). Gate: the size of what a
group would add, predicted from a few of its neurons, after CMoE (arXiv 2502.04416); the formula is our own.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...config import ExpertRouting
from ...errors import CheckpointError, ConfigError, shown, shown_path
from ...io.outside import file_size, foreign_parser, parse_json
from ...model.block import FeedForward
from ...model.dit import S2VTransformer
from ...model.experts import ROWS_AT_ONCE, UNWEIGHTED, RoutedFeedForward
from ...seams import Rows8
from ..quantization import Linear8
from .router import check_routing, check_split, routed_layers

log = logging.getLogger(__name__)

PROBES = 32
"""Neurons of a group that its gate looks at, at most; 8 groups of the 14B model: 2 % of the feed-forward's work."""
SAMPLED_TOKENS = 4096
"""Of each layer, for the fit of its gate: many more than a gate has numbers to fit (257 for 8 groups). Of all layers of
the 14B model 1.7 GB."""
HELD_OUT = 4
"""One in so many calibration tokens is kept for measuring the error."""
CLUSTER_ROUNDS = 10
RIDGE = 1e-4
FORMAT = "wan-s2v split experts 1"


@dataclass(frozen=True)
class LayerSplit:
    """How one feed-forward is split. Any file of the right sizes gives an exact model at top_k = all."""

    groups: Tensor
    """X H: numbers of the hidden neurons of each expert, shared experts first."""
    probes: Tensor
    """X R: numbers of the neurons that the gate looks at, for the experts that are not shared."""
    readout: Tensor
    """X XR: from the probes of all groups to what each group is expected to add; float32."""
    offset: Tensor
    """X."""
    errors: Tensor
    """X(all): relative L2 error of the layer's output with top_k = 1, 2, ..., on tokens held out; NaN: not measured."""


@dataclass(frozen=True)
class ExpertSplit:
    """How all feed-forwards of a model are split: no weights, only which neurons go where."""

    layers: tuple[LayerSplit, ...]
    shared: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.layers[0].groups)

    def top_k_errors(self) -> list[tuple[int, float, float]]:
        """Each top_k with its relative error, that of the median layer and of the worst; empty if not measured."""
        errors = torch.stack([layer.errors for layer in self.layers])[:, self.shared :]
        if errors.isnan().any():
            return []
        columns = (errors.quantile(0.5, dim=0).tolist(), errors.amax(dim=0).tolist())
        return list(zip(range(self.shared + 1, self.num_experts + 1), *columns, strict=True))

    def __str__(self) -> str:
        """The measured error of each top_k as a table, in percent."""
        if not (errors := self.top_k_errors()):
            return "the error of fewer experts was not measured: split with calibration tokens"
        lines = [f"top_k  median   worst  (error of a feed-forward's output, {len(self.layers)} layers)"]
        lines += [f"{top_k:>5}  {100 * median:>5.1f}%  {100 * worst:>5.1f}%" for top_k, median, worst in errors]
        return "\n".join(lines)


class ProbeGate(nn.Module):
    """Scores of groups from the activations of a few neurons of each: readout @ |gelu(probes)| + offset."""

    def __init__(self, weight: Tensor, bias: Tensor, readout: Tensor, offset: Tensor):
        super().__init__()
        self.weight, self.bias, self.readout, self.offset = (
            nn.Parameter(value, requires_grad=False) for value in (weight, bias, readout, offset)
        )

    def forward(self, x: Tensor) -> Tensor:  # L E -> L X
        return torch.cat([self.score(rows) for rows in x.split(ROWS_AT_ONCE)])

    def score(self, x: Tensor) -> Tensor:
        seen = probe_features(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))
        return F.linear(seen.float(), self.readout.float(), self.offset.float())


def probe_features(before: Tensor) -> Tensor:
    """What the gate sees of neurons, given their values before the activation."""
    return F.gelu(before, approximate="tanh").abs()


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
    shared: int = 0,
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
    check_split(len(up), num_experts, shared)
    bias = layer.up.bias.detach().float().to(device)
    size = len(up) // num_experts
    strength = up.norm(dim=1) * down.norm(dim=0)
    if samples is not None:
        samples = samples.to(device).float()
        strength = probe_features(F.linear(samples, up, bias)).mean(dim=0) * down.norm(dim=0)
    order = strength.argsort(descending=True, stable=True)
    always, rest = order[: shared * size].sort().values, order[shared * size :].sort().values
    groups = rest[cluster_neurons(up[rest], num_experts - shared)]  # X H
    probes = groups.gather(1, strength[groups].topk(min(PROBES, size), dim=1).indices)
    own = torch.eye(len(groups), device=device).repeat_interleave(probes.shape[1], dim=1)  # which probe is whose
    readout, offset = own * down.norm(dim=0)[probes.flatten()], own.new_zeros(len(groups))
    groups = torch.cat([always.unflatten(0, (shared, size)), groups]) if shared else groups
    errors = torch.full((num_experts,), torch.nan)
    if samples is not None:
        parts = [F.gelu(F.linear(samples, up[g], bias[g]), approximate="tanh") @ down[:, g].T for g in groups]
        seen = probe_features(F.linear(samples, up[probes.flatten()], bias[probes.flatten()]))
        sizes = torch.stack([part.norm(dim=1) for part in parts[shared:]], dim=1)  # L X
        held_out = torch.arange(len(samples), device=device) % HELD_OUT == 0
        readout, offset = fit(seen[~held_out], sizes[~held_out])
        scores = F.linear(seen[held_out], readout, offset)
        errors = routing_errors(torch.stack([part[held_out] for part in parts], dim=1), scores, shared)
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


def routing_errors(parts: Tensor, scores: Tensor, shared: int) -> Tensor:
    """Relative L2 error of the sum over all parts when only the best top_k are taken, for each top_k.

    Args:
        parts: L X E, what each expert adds, shared ones first.
        scores: L X, of the others.
    Returns:
        X; NaN where top_k is too small.
    """
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1) + shared
    total = parts.sum(dim=1).norm()
    errors = [torch.nan] * shared
    for top_k in range(shared + 1, parts.shape[1] + 1):
        left_out = (ranks >= top_k).unsqueeze(-1)
        errors.append(float((parts[:, shared:] * left_out).sum(dim=1).norm() / total))
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
    shared: int = 0,
    samples: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> ExpertSplit:
    """How to split every feed-forward of a dense model; `samples` has one tensor L E per block.

    Raises:
        ConfigError: if the neurons cannot be shared out evenly, or the model has experts already.
    """
    check_routing(model.config, ExpertRouting(), num_experts, shared)
    check_dense(model)
    layers = []
    for index, block in enumerate(model.stack.blocks):
        tokens = None if samples is None else samples[index]
        layers.append(split_layer(block.feed_forward, num_experts, shared, tokens, device))
    return ExpertSplit(tuple(layers), shared)


def apply_split(model: S2VTransformer, split: ExpertSplit) -> None:
    """Put routed feed-forwards in the place of dense ones, in place, one layer at a time. The sum over all experts
    is the dense layer, since every expert counts in full; `top_k` starts at all of them.

    Raises:
        CheckpointError: if the split was made for a model of other sizes.
    """
    check_dense(model)
    check_sizes(split, model)
    for block, layer in zip(model.stack.blocks, split.layers, strict=True):
        block.feed_forward = split_feed_forward(block.feed_forward, layer, split.shared)
    log.info("experts: %d feed-forwards are split into %d each", len(split.layers), split.num_experts)


def check_dense(model: S2VTransformer) -> None:
    """Raises ConfigError if the feed-forwards have experts already."""
    if layers := routed_layers(model):
        raise ConfigError(
            f"{len(layers)} feed-forwards of this model have experts already. Load the checkpoint again to split it "
            "another way."
        )


def check_sizes(split: ExpertSplit, model: S2VTransformer) -> None:
    """Raises CheckpointError unless every layer's groups hold each hidden neuron once."""
    blocks, neurons = len(model.stack.blocks), model.config.feed_forward_width
    whole = torch.arange(neurons)
    fits = len(split.layers) == blocks and all(
        layer.groups.ndim == 2
        and layer.probes.numel() > 0
        and torch.equal(layer.groups.flatten().long().sort().values, whole)
        and layer.readout.shape == (split.num_experts - split.shared, layer.probes.numel())
        and 0 <= layer.probes.min() <= layer.probes.max() < neurons
        for layer in split.layers
    )
    if not fits:
        raise CheckpointError(
            f"these experts do not share out the {neurons} neurons of {blocks} feed-forwards: they were split from "
            "another model. Split this checkpoint anew."
        )


def split_feed_forward(dense: FeedForward, split: LayerSplit, shared: int) -> RoutedFeedForward:
    """One routed feed-forward with the weights of a dense one, in the same precision and on the same device."""
    groups, probes = (index.long().to(dense.up.weight.device) for index in (split.groups, split.probes.flatten()))
    experts = [part_of(dense, neurons) for neurons in groups]
    up = linear_part(dense.up, rows=probes)
    weight = dense_weight(up).to(dense.up.bias.dtype)
    readout, offset = (value.to(weight.device) for value in (split.readout, split.offset))
    gate = ProbeGate(weight, up.bias.detach(), readout, offset)
    routed = RoutedFeedForward(experts, gate, len(experts), UNWEIGHTED, shared, dense.down.bias.detach())
    return routed.train(dense.training)


def part_of(dense: FeedForward, neurons: Tensor) -> FeedForward:
    """A feed-forward of some of the hidden neurons; without an output bias, which is no neuron's."""
    with torch.device("meta"):
        part = FeedForward(dense.up.in_features, len(neurons))
    part.up, part.down = linear_part(dense.up, rows=neurons), linear_part(dense.down, columns=neurons)
    return part


def linear_part(linear: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """A product with some rows (and their bias) or some columns (and no bias) of another, stored as that is."""
    if isinstance(linear, Linear8):
        return linear.part(rows, columns)
    index, dim = (rows, 0) if rows is not None else (columns, 1)
    if type(linear) is not nn.Linear:
        raise CheckpointError(
            f"a feed-forward with {type(linear).__name__} cannot be split. Split before other changes to its products."
        )
    weight = linear.weight.detach().index_select(dim, index)
    with torch.device("meta"):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=rows is not None)
    part.weight = nn.Parameter(weight, requires_grad=False)
    if rows is not None:
        part.bias = nn.Parameter(linear.bias.detach().index_select(0, rows), requires_grad=False)
    return part


# --- the file ----------------------------------------------------------------------------------------------------


def split_path(checkpoint: str | Path, num_experts: int, shared: int = 0) -> Path:
    """Where the split of a checkpoint is kept: in its folder, or beside its file."""
    checkpoint = Path(checkpoint)
    name = f"experts_{num_experts}" + (f"_shared_{shared}" if shared else "") + ".safetensors"
    return checkpoint / name if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.stem}.{name}")


def save_split(split: ExpertSplit, path: str | Path) -> None:
    """Write groups and gates, a few megabytes for the 14B model; the weights stay in the checkpoint.

    A file that is there is replaced when the new one is whole.
    """
    path, tensors = Path(path), {}
    for index, layer in enumerate(split.layers):
        for name, value in vars(layer).items():
            stored = value.float() if value.is_floating_point() else value.int()
            tensors[f"layers.{index}.{name}"] = stored.contiguous()
    about = {"format": FORMAT, "split": json.dumps({"layers": len(split.layers), "shared": split.shared})}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata=about)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_split(path: str | Path) -> ExpertSplit:
    """Read what `save_split` wrote.

    Raises:
        CheckpointError: if it is missing, damaged or something else.
    """
    path = Path(path)
    file_size(path, error=CheckpointError)
    again = "Split the checkpoint again."
    with foreign_parser(path, again, CheckpointError, "is damaged"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{shown_path(path)} is no file of split experts. Choose one that this program wrote."
            )
        about = parse_json(metadata["split"], f"the split in {path}", CheckpointError)
        layers = tuple(_read_layer(file, index) for index in range(about["layers"]))
        split = ExpertSplit(layers, about["shared"])
        if not layers or type(split.shared) is not int or not 0 <= split.shared < split.num_experts:
            raise ValueError(f"{len(layers)} layers with {shown(split.shared)} shared experts")
    return split


def _read_layer(file: safe_open, index: int) -> LayerSplit:
    return LayerSplit(*(file.get_tensor(f"layers.{index}.{field.name}") for field in fields(LayerSplit)))
