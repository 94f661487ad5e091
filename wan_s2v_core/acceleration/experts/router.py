"""How a model's experts are used: settings of a run, what was loaded onto whom, and the losses of their gates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config import LARGEST_SEED, ExpertRouting, S2VModelConfig, check_top_k
from ...errors import ConfigError
from ...model.experts import ExpertLoad, RoutedFeedForward
from ...seams import Technique, replaced

DENSE = (
    "Not applicable: this checkpoint is one dense DiT, as Wan2.2-S2V-14B was released. Its feed-forwards have no "
    "experts and no gate, so top_k, expert_capacity and gate_dropout do nothing."
)
WAY_OUT = "Split its feed-forwards (split_experts=8), or use a checkpoint that was trained with experts."


def routed_layers(model: nn.Module) -> list[RoutedFeedForward]:
    """The feed-forwards with experts, in order."""
    return [module for module in model.modules() if isinstance(module, RoutedFeedForward)]


def describe_experts(config: S2VModelConfig, split: int = 0, shared: int = 0) -> str:
    """What experts a model has, in a sentence or two, for people.

    Args:
        split: into how many experts a dense checkpoint is to be split; 0 leaves it dense.
        shared: how many of those every token sees.
    """
    width = config.feed_forward_width
    if config.num_experts:
        return (
            f"{config.num_experts} learned experts in each of {config.blocks} feed-forwards, {width} wide each; "
            f"a token sees {config.top_k}, weighted by a softmax over "
            f"{'those' if config.gate_over == 'chosen' else 'all'}."
        )
    if not split:
        return f"{DENSE} {WAY_OUT}"
    always = f", {shared} of which every token sees" if shared else ""
    return (
        f"{split} experts split from each of {config.blocks} dense feed-forwards, {width // split} of {width} neurons "
        f"each{always}. top_k={split} is the dense model up to rounding; fewer is approximate."
    )


def check_routing(config: S2VModelConfig, routing: ExpertRouting, split: int = 0, shared: int = 0) -> None:
    """Whether settings fit a checkpoint, before it is loaded. `split`, `shared`: as for `describe_experts`.

    Raises:
        ConfigError: also if there are settings and the model has no experts.
    """
    if split and config.num_experts:
        raise ConfigError(
            f"split_experts={split}: this checkpoint has {config.num_experts} experts already. Leave it at 0: only a "
            "dense one can be split."
        )
    if split:
        check_split(config.feed_forward_width, split, shared)
    if not (experts := config.num_experts or split):
        if routing != ExpertRouting():
            raise ConfigError(f"{DENSE} {WAY_OUT}")
    elif routing.top_k is not None:
        check_top_k(routing.top_k, experts, shared)


def check_split(width: int, num_experts: int, shared: int = 0) -> None:
    """Raises ConfigError if a feed-forward of that many neurons cannot be split so."""
    if not 2 <= num_experts <= width or width % num_experts:
        usable = ", ".join(str(number) for number in range(2, min(width, 64) + 1) if width % number == 0)
        raise ConfigError(
            f"split_experts={num_experts} does not divide the {width} neurons of a feed-forward into equal parts. "
            f"Use one of: {usable}."
        )
    if not 0 <= shared < num_experts:
        raise ConfigError(
            f"shared={shared} of {num_experts} experts leaves the gate no choice. Use 0 to {num_experts - 1}."
        )


def routed(routing: ExpertRouting) -> Technique:
    """Every routed feed-forward uses these settings, and counts its load from nothing; `take_load` reads it.

    A seed for dropout becomes another one in every layer. Attaching it raises ConfigError if the model has no experts,
    or fewer than top_k.
    """

    @contextmanager
    def attached(model: nn.Module) -> Iterator[None]:
        layers = routed_layers(model)
        if not layers and routing != ExpertRouting():
            raise ConfigError(f"{DENSE} {WAY_OUT}")
        changes: list[tuple[Any, str, Any]] = []
        for index, layer in enumerate(layers):
            if routing.top_k is not None:
                check_top_k(routing.top_k, len(layer.experts), layer.shared)
            seed = routing.gate_dropout_seed
            own = None if seed is None else (seed + index) % (LARGEST_SEED + 1)
            changes += [(layer, "routing", replace(routing, gate_dropout_seed=own)), (layer, "load", ExpertLoad())]
        with replaced(changes):
            yield

    return attached


def take_load(model: nn.Module) -> ExpertLoad:
    """What all layers did since the last call, added up; the count starts again."""
    total = ExpertLoad()
    for layer in routed_layers(model):
        total, layer.load = total + layer.load, ExpertLoad()
    return total


def gate_losses(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Balance loss and z-loss of the last forward in training, each a mean over layers; weigh and add them.

    Balance: experts * sum over experts of (share of choices) * (mean probability), 1 when all are used evenly;
    arXiv 2101.03961, section 2.2, with shares of all top_k choices. z: mean of logsumexp(logits)^2, which keeps
    logits small; arXiv 2202.08906 (ST-MoE), section 2.2.

    Raises:
        ConfigError: if no gate has run in training mode.
    """
    records = [layer.record for layer in routed_layers(model) if layer.record]
    if not records:
        raise ConfigError("no gate has run in training mode. Call model.train() and run a forward of a routed model.")
    balance, z = [], []
    for record in records:
        shares = record.taken.sum(dim=0) / record.taken.sum()
        probabilities = record.logits.softmax(dim=1).mean(dim=0)
        balance.append(len(shares) * (shares * probabilities).sum())
        z.append(record.logits.logsumexp(dim=1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()
