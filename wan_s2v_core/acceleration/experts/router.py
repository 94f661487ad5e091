"""How a model's experts are used: settings of a run, what was loaded onto whom, and the losses of their gates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config import LARGEST_SEED, UNWEIGHTED, ExpertRouting, S2VModelConfig, check_top_k
from ...errors import ConfigError
from ...model.experts import ExpertLoad, RoutedFeedForward
from ...seams import Technique, replaced

DENSE = (
    "Not applicable: this checkpoint is one dense DiT, as Wan2.2-S2V-14B was released. Its feed-forwards have no "
    "experts and no gate, so top_k, expert_capacity and gate_dropout do nothing."
)
WAY_OUT = "Use a checkpoint with experts; python -m wan_s2v_core.research split makes one of a dense one."


def routed_layers(model: nn.Module) -> list[RoutedFeedForward]:
    """The feed-forwards with experts, in order."""
    return [module for module in model.modules() if isinstance(module, RoutedFeedForward)]


def describe_experts(config: S2VModelConfig) -> str:
    """What experts a model has, in a sentence or two, for people."""
    if not config.num_experts:
        return f"{DENSE} {WAY_OUT}"
    kind = "learned experts" if config.gate_over != UNWEIGHTED else "experts, parts of a dense layer,"
    among = {"chosen": ", weighted by a softmax over those", "all": ", weighted by a softmax over all"}
    return (
        f"{config.num_experts} {kind} in each of {config.blocks} feed-forwards, {config.feed_forward_width} wide each; "
        f"a token sees {config.top_k}{among.get(config.gate_over, ', which add up')}."
    )


def check_routing(config: S2VModelConfig, routing: ExpertRouting) -> None:
    """Whether settings fit a checkpoint, before it is loaded.

    Raises:
        ConfigError: also if there are settings and the model has no experts.
    """
    if not config.num_experts:
        if routing != ExpertRouting():
            raise ConfigError(f"{DENSE} {WAY_OUT}")
    elif routing.top_k is not None:
        check_top_k(routing.top_k, config.num_experts)


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
                check_top_k(routing.top_k, len(layer.experts))
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
